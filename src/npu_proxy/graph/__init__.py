"""OpenVINO graphs from weights: build.py (table of families), one file per family, heads.py (pooling, Dense modules)."""
