"""Databases that a job can write to."""
