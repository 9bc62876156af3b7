"""Prometheus metrics: the names of text-embeddings-inference with our prefix, and what packing adds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from npu_proxy.devices.base import Report
from npu_proxy.engine.engine import Engine
from npu_proxy.types import EmbedResult

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)


class Metrics:
    """Metrics of one application, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        self._requests = Counter("npu_proxy_request_count", "Requests answered", ["path", "status"], registry=self.registry)
        self._failures = Counter("npu_proxy_request_failure", "Requests answered with an error", ["err"], registry=self.registry)
        self._duration = Histogram(
            "npu_proxy_request_duration", "Seconds from request to answer", ["path"], buckets=_SECONDS, registry=self.registry
        )
        self._queued = Histogram(
            "npu_proxy_embed_queue_duration",
            "Seconds a request's slowest text waited",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._infer = Histogram(
            "npu_proxy_embed_inference_duration",
            "Seconds of inference, its share",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._length = Histogram("npu_proxy_request_input_length", "Tokens of a text", buckets=_TOKENS, registry=self.registry)
        self._truncated = Counter("npu_proxy_truncated_texts", "Texts cut at the model's limit", registry=self.registry)

    def embedded(self, result: EmbedResult) -> None:
        """Note what a request cost."""
        self._queued.observe(result.timings.queued)
        self._infer.observe(result.timings.infer)
        for tokens in result.tokens:
            self._length.observe(tokens)
        self._truncated.inc(sum(result.truncated))

    def failed(self, kind: str) -> None:
        """Note an error by its kind."""
        self._failures.labels(kind).inc()

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Note an answer."""
        self._requests.labels(path, str(status)).inc()
        self._duration.labels(path).observe(seconds)


class _EngineCollector(Collector):
    """Reads the engine's own counters when somebody asks, so that the hot path counts once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("npu_proxy_ready", "1 when the engine answers", float(self._engine.state == "running"))
        if self._engine.state != "running":
            return
        stats = self._engine.stats()
        counters = stats.counters
        yield GaugeMetricFamily("npu_proxy_queue_size", "Texts waiting for a row", stats.depth.items)
        yield GaugeMetricFamily("npu_proxy_queue_tokens", "Tokens waiting for a row", stats.depth.tokens)
        yield CounterMetricFamily("npu_proxy_embed_rows", "Rows inferred", counters.rows)
        yield CounterMetricFamily("npu_proxy_embed_tokens", "Useful tokens inferred", counters.tokens)
        yield CounterMetricFamily(
            "npu_proxy_embed_positions", "Positions inferred; over tokens it is the waste", counters.positions
        )
        yield CounterMetricFamily("npu_proxy_merged_texts", "Texts that joined an equal one in flight", counters.merged)
        yield CounterMetricFamily("npu_proxy_refused_requests", "Requests refused at the queue's limit", counters.refused)
        yield CounterMetricFamily("npu_proxy_stage_faults", "Unexpected errors that a stage survived", counters.faults)
        executed = CounterMetricFamily("npu_proxy_executed_texts", "Texts by the device that embedded them", labels=["device"])
        for device, texts in counters.executed.items():
            executed.add_metric([device], texts)
        yield executed
        fallbacks = CounterMetricFamily(
            "npu_proxy_fallback_texts", "Texts by the device that embedded them in place of a better one", labels=["device"]
        )
        for device, texts in counters.fallbacks.items():
            fallbacks.add_metric([device], texts)
        yield fallbacks
        yield from _devices(self._engine.device.reports())


def _devices(reports: Sequence[Report]) -> Iterator[Metric]:
    ready = GaugeMetricFamily("npu_proxy_device_ready", "1 when the device takes rows", labels=["device", "kind"])
    breaker = GaugeMetricFamily("npu_proxy_breaker_open", "0 closed, 0.5 half-open, 1 open", labels=["device"])
    restarts = CounterMetricFamily("npu_proxy_worker_restarts", "Worker processes started anew", labels=["device"])
    for report in reports:
        ready.add_metric([report.name, report.kind], float(report.state == "serving"))
        breaker.add_metric([report.name], {"closed": 0.0, "half-open": 0.5}.get(report.breaker, 1.0))
        restarts.add_metric([report.name], report.restarts)
    yield from (ready, breaker, restarts)
