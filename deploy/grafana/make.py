"""Write npu-proxy.json, the Grafana dashboard: python deploy/grafana/make.py. Each panel is one row of PANELS."""

import json
from pathlib import Path

BY_MODEL = "sum by (model)"
PANELS = [
    ("Requests", "reqps", [("sum by (path) (rate(npu_proxy_request_count_total[$__rate_interval]))", "{{path}}")]),
    ("Errors by kind", "reqps", [("sum by (err) (rate(npu_proxy_request_failure_total[$__rate_interval]))", "{{err}}")]),
    (
        "Request duration",
        "s",
        [
            (
                f"histogram_quantile({quantile}, sum by (le) (rate(npu_proxy_request_duration_bucket[$__rate_interval])))",
                f"p{round(100 * quantile)}",
            )
            for quantile in (0.5, 0.95, 0.99)
        ],
    ),
    (
        "Mean duration by stage",
        "s",
        [
            (
                f"sum(rate(npu_proxy_request_{stage}_duration_sum[$__rate_interval]))"
                f" / sum(rate(npu_proxy_request_{stage}_duration_count[$__rate_interval]))",
                stage,
            )
            for stage in ("tokenization", "queue", "inference")
        ],
    ),
    ("Texts by device", "ops", [("sum by (device) (rate(npu_proxy_executed_texts_total[$__rate_interval]))", "{{device}}")]),
    (
        "Fallback to a later device",
        "ops",
        [("sum by (device) (rate(npu_proxy_fallback_texts_total[$__rate_interval]))", "{{device}}")],
    ),
    ("Tokens", "ops", [(f"{BY_MODEL} (rate(npu_proxy_embed_tokens_total[$__rate_interval]))", "{{model}}")]),
    (
        "Positions per useful token (waste)",
        "none",
        [
            (
                f"{BY_MODEL} (rate(npu_proxy_embed_positions_total[$__rate_interval]))"
                f" / {BY_MODEL} (rate(npu_proxy_embed_tokens_total[$__rate_interval]))",
                "{{model}}",
            )
        ],
    ),
    ("Queue (tokens by lane)", "none", [("sum by (lane) (npu_proxy_queue_tokens)", "{{lane}}")]),
    (
        "Refused and abandoned",
        "ops",
        [
            ("sum(rate(npu_proxy_refused_requests_total[$__rate_interval]))", "requests refused"),
            ("sum(rate(npu_proxy_abandoned_texts_total[$__rate_interval]))", "texts abandoned"),
        ],
    ),
    (
        "Cache hits (share of texts)",
        "percentunit",
        [
            (
                "sum by (tier) (rate(npu_proxy_cache_hits_total[$__rate_interval])) / ignoring(tier) group_left"
                " (sum(rate(npu_proxy_cache_hits_total[$__rate_interval])) + sum(rate(npu_proxy_cache_misses_total[$__rate_interval])))",
                "{{tier}}",
            )
        ],
    ),
    (
        "Cache problems",
        "ops",
        [(f"sum(rate(npu_proxy_cache_{name}_total[$__rate_interval]))", name) for name in ("errors", "dropped", "bypassed")],
    ),
    ("Device ready", "none", [("npu_proxy_device_ready", "{{model}} {{device}}")]),
    ("Breaker (1 = open)", "none", [("npu_proxy_breaker_open", "{{model}} {{device}}")]),
    (
        "Weights in memory",
        "bytes",
        [("npu_proxy_models_bytes", "loaded"), ("npu_proxy_models_limit_bytes", "limit")],
    ),
    ("Worker restarts", "none", [("sum by (device) (increase(npu_proxy_worker_restarts_total[$__rate_interval]))", "{{device}}")]),
]


def panel(number: int, title: str, unit: str, queries: list[tuple[str, str]]) -> dict:
    """A time series panel, half as wide as the dashboard."""
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "datasource": source,
        "gridPos": {"x": 12 * (number % 2), "y": 8 * (number // 2), "w": 12, "h": 8},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(65 + index), "datasource": source, "expr": query, "legendFormat": legend}
            for index, (query, legend) in enumerate(queries)
        ],
    }


BOARD = {
    "title": "npu-proxy",
    "uid": "npu-proxy",
    "schemaVersion": 39,
    "refresh": "10s",
    "time": {"from": "now-1h", "to": "now"},
    "templating": {"list": [{"name": "source", "label": "Data source", "type": "datasource", "query": "prometheus"}]},
    "panels": [panel(number, *row) for number, row in enumerate(PANELS)],
}

if __name__ == "__main__":
    Path(__file__).with_name("npu-proxy.json").write_text(json.dumps(BOARD, indent=1) + "\n")
