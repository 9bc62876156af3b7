"""Vectors that were computed before: in memory, on disk, on a server that machines share."""
