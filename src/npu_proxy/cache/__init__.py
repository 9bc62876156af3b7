"""The cache of computed vectors: in memory, on disk, and on a server shared by several machines."""
