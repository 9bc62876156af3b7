"""The APIs that clients use, one file each. contract.py defines what such a file provides."""
