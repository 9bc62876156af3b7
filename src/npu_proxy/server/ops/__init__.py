"""For operators: health, metrics, logs, traces, and the OpenAPI document."""
