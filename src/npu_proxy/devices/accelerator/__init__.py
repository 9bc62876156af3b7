"""Devices that run in a worker process: circuit breaker, certification with golden texts, and recovery."""
