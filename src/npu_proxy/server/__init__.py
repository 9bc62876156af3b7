"""HTTP: a dialect is one file, app.py joins them."""
