"""OpenTelemetry: one span per request and one per stage, made from the timings of the result, without the input texts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

from npu_proxy.errors import SettingsError
from npu_proxy.settings import Settings
from npu_proxy.types import EmbedResult
from npu_proxy.version import __version__

if TYPE_CHECKING:
    from npu_proxy.server.http.exchange import Exchange

_log = logging.getLogger("npu_proxy.server")


class Tracer:
    """Records finished requests. provider: an opentelemetry TracerProvider."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("npu_proxy", __version__)
        self._trace = import_module("opentelemetry.trace")
        propagation = import_module("opentelemetry.trace.propagation.tracecontext")
        self._context = propagation.TraceContextTextMapPropagator()

    def record(self, path: str, exchange: Exchange, status: int, seconds: float) -> None:
        """Record a request as a span, a child of the caller's `traceparent` if there is one, and its stages as child spans."""
        start, result = exchange.started_at, exchange.result
        end = start + round(1e9 * seconds)
        attributes: dict[str, Any] = {
            "http.request.method": exchange.request.method,
            "http.route": path,
            "http.response.status_code": status,
            "npu_proxy.request_id": exchange.id,
            "npu_proxy.model": exchange.model,
        }
        if result is not None:
            attributes |= {
                "npu_proxy.texts": len(result.tokens),
                "npu_proxy.tokens": sum(result.tokens),
                "npu_proxy.cached": result.cached,
                "npu_proxy.device": result.device,
                "npu_proxy.fallback": result.fallback,
                "npu_proxy.fingerprint": result.fingerprint,
            }
        if exchange.error is not None:
            attributes["error.type"] = exchange.error.kind
        span = self._tracer.start_span(
            f"{exchange.request.method} {path}",
            context=self._context.extract(dict(exchange.request.headers)),
            kind=self._trace.SpanKind.SERVER,
            attributes=attributes,
            start_time=start,
        )
        if status >= 500:
            span.set_status(self._trace.StatusCode.ERROR)
        parent = self._trace.set_span_in_context(span)
        for name, begun, ended in _stages(result, start, end) if result is not None else ():
            self._tracer.start_span(name, context=parent, start_time=begun).end(ended)
        span.end(end)

    def close(self) -> None:
        """Send the pending spans."""
        self._provider.shutdown()


def _stages(result: EmbedResult, start: int, end: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, start and end (Unix nanoseconds) of the stages in order; the remaining time counts as `finish`."""
    at = start
    for name, seconds in (
        ("tokenize", result.timings.tokenized),
        ("queue", result.timings.queued),
        ("infer", result.timings.infer),
    ):
        until = min(end, at + round(1e9 * seconds))
        yield name, at, until
        at = until
    yield "finish", at, end


def open_tracer(settings: Settings) -> Tracer | None:
    """Return a tracer that sends to `otlp_endpoint`, or None if it is not set. Raises SettingsError without the libraries."""
    if not settings.otlp_endpoint:
        return None
    try:
        sdk = import_module("opentelemetry.sdk.trace")
        export = import_module("opentelemetry.sdk.trace.export")
        otlp = import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
        resources = import_module("opentelemetry.sdk.resources")
    except ImportError as error:
        raise SettingsError(
            "`otlp_endpoint` needs additional packages: pip install npu-proxy[otel]", param="otlp_endpoint"
        ) from error
    endpoint = settings.otlp_endpoint.rstrip("/")
    exporter = otlp.OTLPSpanExporter(endpoint=endpoint if endpoint.endswith("/v1/traces") else f"{endpoint}/v1/traces")
    resource = resources.Resource.create({"service.name": "npu-proxy", "service.version": __version__})
    provider = sdk.TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(export.BatchSpanProcessor(exporter))
    return Tracer(provider)
