"""What a model is (layout), what it is called (catalog), where it comes from (pull) and where it lies (store)."""
