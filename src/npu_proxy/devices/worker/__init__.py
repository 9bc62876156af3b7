"""Worker processes: the owner's side, the worker's side, their shared memory, and compiled models on disk."""
