"""Models on disk: their names (catalog), download (pull), storage (store) and interpretation (layout)."""
