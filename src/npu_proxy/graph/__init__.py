"""Graphs from weights: packed.py (rows), one file a family, heads.py (pooling, dense), build.py (the table)."""
