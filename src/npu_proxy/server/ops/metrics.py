"""Prometheus metrics: the names of text-embeddings-inference with our prefix, and metrics of packing, caching and devices."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from npu_proxy.cache.vectors import VectorCache
from npu_proxy.devices.base import DeviceReport
from npu_proxy.engine.counters import Stats
from npu_proxy.errors import OverloadedError
from npu_proxy.server.http.exchange import Exchange
from npu_proxy.server.models.loaded import LoadedModel, LoadedModels
from npu_proxy.server.ops.loop_lag import LoopLag
from npu_proxy.server.ops.readiness import why_unready

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one application, in their own registry."""

    def __init__(self, models: LoadedModels) -> None:
        self.registry: CollectorRegistry = CollectorRegistry()
        self.lengths: Counts[int] = Counts()
        """Number of texts by their tokens; sorted into buckets only when metrics are collected."""
        self.registry.register(_Models(models, self.lengths))
        self.loop_lag: LoopLag = LoopLag()
        self.registry.register(self.loop_lag)
        self._requests = Counter("npu_proxy_request_count", "Requests answered", ["path", "status"], registry=self.registry)
        self._successes = Counter("npu_proxy_request_success", "Requests answered with vectors", ["path"], registry=self.registry)
        self._failures = Counter("npu_proxy_request_failure", "Requests answered with an error", ["err"], registry=self.registry)
        self._duration = Histogram(
            "npu_proxy_request_duration", "Seconds from request to response", ["path"], buckets=_SECONDS, registry=self.registry
        )
        self._tokenized, self._queued, self._infer = (
            Histogram(
                f"npu_proxy_request_{name}_duration", f"Seconds of a request {words}", buckets=_SECONDS, registry=self.registry
            )
            for name, words in (
                ("tokenization", "in the tokenizer"),
                ("queue", "in the queue, for its slowest text"),
                ("inference", "in inference, its share of the batches"),
            )
        )
        self._children: dict[tuple[str, int], tuple[Counter, Counter, Histogram]] = {}
        self._by_key = {
            name: Counter(f"npu_proxy_key_{name}", f"{words}, by the name of the API key", ["key"], registry=self.registry)
            for name, words in (
                ("requests", "Requests"),
                ("refused", "Requests refused because the queue or the key's part of it was full"),
                ("texts", "Texts answered"),
                ("tokens", "Tokens of the texts answered"),
            )
        }
        self._truncated = Counter("npu_proxy_truncated_texts", "Texts truncated to the limit on tokens", registry=self.registry)

    def answered(self, path: str, status: int, seconds: float, exchange: Exchange) -> None:
        """Record a response and what it cost."""
        known = self._children.get((path, status))
        if known is None:
            children = (self._requests.labels(path, str(status)), self._successes.labels(path), self._duration.labels(path))
            known = self._children[path, status] = children
        requests, successes, duration = known
        requests.inc()
        duration.observe(seconds)
        result = exchange.result
        if exchange.key is not None:
            self._count_key(exchange.key.name, exchange)
        if exchange.error is not None:
            self._failures.labels(exchange.error.kind).inc()
        elif result is not None:
            successes.inc()
            self.lengths.update(result.tokens)
            truncated = sum(result.truncated)
            if truncated:
                self._truncated.inc(truncated)
            if result.cached < len(result.tokens):
                self._tokenized.observe(result.timings.tokenized)
                self._queued.observe(result.timings.queued)
                self._infer.observe(result.timings.infer)

    def _count_key(self, name: str, exchange: Exchange) -> None:
        self._by_key["requests"].labels(name).inc()
        if isinstance(exchange.error, OverloadedError):
            self._by_key["refused"].labels(name).inc()
        self._by_key["texts"].labels(name).inc(exchange.texts)
        self._by_key["tokens"].labels(name).inc(exchange.tokens)


class _Models(Collector):
    """Reads the engines' own counters when metrics are collected, so that the hot path counts only once."""

    def __init__(self, models: LoadedModels, lengths: Counts[int]) -> None:
        self._models = models
        self._lengths = lengths

    def collect(self) -> Iterator[Metric]:
        models = self._models
        loaded = [model for model in models.loaded() if model.running]
        held, limit = models.memory
        yield GaugeMetricFamily("npu_proxy_ready", "1 if the models of the settings serve requests", float(not why_unready(models)))
        yield GaugeMetricFamily("npu_proxy_models_loaded", "Models in memory", len(loaded))
        yield GaugeMetricFamily("npu_proxy_models_bytes", "Bytes of the weights in memory", held)
        yield GaugeMetricFamily("npu_proxy_models_limit_bytes", "Limit on the bytes of weights in memory", limit)
        yield CounterMetricFamily(
            "npu_proxy_models_unloaded", "Models unloaded because they were idle or to make room", models.unloaded
        )
        yield _histogram("npu_proxy_request_input_length", "Tokens per text", dict(self._lengths), _TOKENS)
        if models.cache is not None:
            yield from _cache(models.cache)
        yield from _engines([(_name(model), model.engine.stats()) for model in loaded])
        yield from _devices([(_name(model), report) for model in loaded for report in model.engine.device.reports()])


def _name(model: LoadedModel) -> str:
    return model.engine.spec.name


def _engines(models: Sequence[tuple[str, Stats]]) -> Iterator[Metric]:
    waiting = GaugeMetricFamily("npu_proxy_queue_size", "Texts waiting for a batch", labels=["model"])
    tokens = GaugeMetricFamily("npu_proxy_queue_tokens", "Tokens waiting for a batch", labels=["model", "lane"])
    executed = CounterMetricFamily("npu_proxy_executed_texts", "Texts by the device that embedded them", labels=["model", "device"])
    fallbacks = CounterMetricFamily(
        "npu_proxy_fallback_texts",
        "Texts not embedded by the first device, by the device that embedded them",
        labels=["model", "device"],
    )
    sizes = HistogramMetricFamily("npu_proxy_batch_next_size", "Texts per batch", labels=["model"])
    useful = HistogramMetricFamily("npu_proxy_batch_next_tokens", "Useful tokens per batch", labels=["model"])
    plain = {
        field: CounterMetricFamily(f"npu_proxy_{name}", words, labels=["model"])
        for field, (name, words) in {
            "batches": ("embed_rows", "Batches computed"),
            "tokens": ("embed_tokens", "Useful tokens computed"),
            "positions": ("embed_positions", "Positions computed: useful tokens and padding"),
            "merged": ("merged_texts", "Texts merged with an equal text in progress"),
            "abandoned": (
                "abandoned_texts",
                "Texts dropped before inference because the client disconnected or the deadline passed",
            ),
            "refused": ("refused_requests", "Requests refused on arrival"),
            "retries": ("retries", "Attempts after a batch had failed on every device"),
            "faults": ("stage_faults", "Unexpected errors from which a stage recovered"),
        }.items()
    }
    for model, stats in models:
        waiting.add_metric([model], stats.depth.texts)
        for lane, count in stats.lane_tokens.items():
            tokens.add_metric([model, lane], count)
        for device, texts in stats.counters.executed.items():
            executed.add_metric([model, device], texts)
        for device, texts in stats.counters.fallbacks.items():
            fallbacks.add_metric([model, device], texts)
        for field, family in plain.items():
            family.add_metric([model], getattr(stats.counters, field))
        sizes.add_metric([model], *_buckets(stats.counters.batch_texts, _TEXTS))
        useful.add_metric([model], *_buckets(stats.counters.batch_tokens, _TOKENS))
    yield from (waiting, tokens, executed, fallbacks, sizes, useful, *plain.values())


def _cache(cache: VectorCache) -> Iterator[Metric]:
    counts = cache.counts()
    hits = CounterMetricFamily("npu_proxy_cache_hits", "Texts whose vector was found, by tier", labels=["tier"])
    for tier, count in counts.hits.items():
        hits.add_metric([tier], count)
    yield hits
    for name, words, count in (
        ("misses", "Texts whose vector was in no tier", counts.misses),
        ("written", "Entries written to tiers other than memory", counts.written),
        ("dropped", "Entries dropped because a tier was slow, full or failing", counts.dropped),
        ("bypassed", "Texts not looked up because a tier was paused", counts.bypassed),
        ("errors", "Errors of tiers", counts.errors),
        ("voided", "Entries refused or removed because their device turned out to be wrong", counts.voided),
    ):
        yield CounterMetricFamily(f"npu_proxy_cache_{name}", words, count)
    yield GaugeMetricFamily("npu_proxy_cache_entries", "Vectors in memory", counts.entries)
    yield GaugeMetricFamily("npu_proxy_cache_bytes", "Bytes of the vectors in memory", counts.size)


def _devices(models: Sequence[tuple[str, DeviceReport]]) -> Iterator[Metric]:
    ready = GaugeMetricFamily("npu_proxy_device_ready", "1 if the device accepts batches", labels=["model", "device", "kind"])
    breaker = GaugeMetricFamily("npu_proxy_breaker_open", "0 closed, 0.5 half-open, 1 open", labels=["model", "device"])
    restarts = CounterMetricFamily("npu_proxy_worker_restarts", "Restarts of worker processes", labels=["model", "device"])
    guarded = CounterMetricFamily("npu_proxy_guarded_rows", "Batches whose canaries were right", labels=["model", "device"])
    failures = CounterMetricFamily(
        "npu_proxy_canary_failures", "Batches thrown away because a canary was wrong", labels=["model", "device"]
    )
    slots = GaugeMetricFamily("npu_proxy_device_slots", "Batches that the device computes at once", labels=["model", "device"])
    examined = GaugeMetricFamily(
        "npu_proxy_examined_ratio", "Share of slots and batch shapes examined in the last hour", labels=["model", "device"]
    )
    for model, report in models:
        ready.add_metric([model, report.name, report.kind], float(report.state == "serving"))
        breaker.add_metric([model, report.name], {"closed": 0.0, "half-open": 0.5}.get(report.breaker, 1.0))
        restarts.add_metric([model, report.name], report.restarts)
        guarded.add_metric([model, report.name], report.guarded)
        failures.add_metric([model, report.name], report.canary_failures)
        if report.slots is not None:
            slots.add_metric([model, report.name], report.slots)
        if report.examined is not None:
            examined.add_metric([model, report.name], report.examined)
    yield from (ready, breaker, restarts, guarded, failures, slots, examined)


def _histogram(name: str, words: str, counts: Mapping[int, int], bounds: Sequence[int]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, words)
    family.add_metric([], *_buckets(counts, bounds))
    return family


def _buckets(counts: Mapping[int, int], bounds: Sequence[int]) -> tuple[list[tuple[str, float]], float]:
    """Return cumulative buckets and the sum of all values, from the number of times each value occurred."""
    buckets = [(str(float(bound)), float(sum(n for value, n in counts.items() if value <= bound))) for bound in bounds]
    return [*buckets, ("+Inf", float(sum(counts.values())))], float(sum(value * n for value, n in counts.items()))
