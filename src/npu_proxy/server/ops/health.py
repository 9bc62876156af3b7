"""Handlers for operators: health, metrics, the API description."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from importlib.resources import files
from pathlib import Path

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from npu_proxy.devices.base import Device
from npu_proxy.devices.fallback import Fallback
from npu_proxy.server.models.loaded import LoadedModel, LoadedModels
from npu_proxy.server.ops.metrics import Metrics
from npu_proxy.server.ops.readiness import is_live, state_of, why_unready
from npu_proxy.version import __version__

Handler = Callable[[Request], Awaitable[Response]]

_HEALTH = ("/health", "/ping", "/v1/health", "/healthz")
_LIVE = ("/health/live", "/v1/health/live", "/v2/health/live", "/livez")
_READY = ("/health/ready", "/v1/health/ready", "/v2/health/ready", "/readyz")
_WELL_KNOWN_LIVE, _WELL_KNOWN_READY = "/.well-known/live", "/.well-known/ready"
HEALTH_PATHS = (*_HEALTH, *_LIVE, *_READY, _WELL_KNOWN_LIVE, _WELL_KNOWN_READY)
"""Paths of the handlers for health."""


class DeviceHealth(msgspec.Struct, kw_only=True):
    """A device of the chain. certified: lowest cosine of golden texts with fp32 on the CPU. executed: number of texts.

    slots: how many batches it computes at once. guarded: batches whose canaries were right. canary_failures: batches thrown away
    because a canary was wrong. examined: share of slots and batch shapes whose golden texts were compared in the last hour.
    probed: seconds since its last probe.
    """

    name: str
    kind: str
    state: str
    breaker: str
    worker_pid: int | None
    certified: float | None
    executed: int
    restarts: int
    precision: str
    reason: str
    slots: int | None
    guarded: int
    canary_failures: int
    examined: float | None
    probed: float | None


class ModelHealth(msgspec.Struct, kw_only=True):
    """A model in memory. requests: how many use it now. expires: when it is unloaded, in Unix seconds; null for never."""

    name: str
    state: str
    fingerprint: str | None
    pinned: bool
    requests: int
    expires: float | None


class Health(msgspec.Struct, kw_only=True):
    """Reply of GET /health: the first model in detail, each model in brief. Status 200 if ready, else 503. `unix`: seconds."""

    status: str
    unix: float
    version: str
    model: str
    fingerprint: str | None = None
    device: str | None = None
    reason: str | None = None
    queue: dict[str, float] = {}
    stages: dict[str, bool] = {}
    executed: dict[str, int] = {}
    devices: list[DeviceHealth] = []
    models: list[ModelHealth] = []


def health_handlers(models: LoadedModels) -> Iterator[tuple[str, Handler]]:
    """Yield each path of health with its handler. The paths of one handler share its probe of the devices."""
    whole, alive, able = health(models), live(models), ready(models)
    yield from ((path, whole) for path in _HEALTH)
    yield from ((path, alive) for path in _LIVE)
    yield from ((path, able) for path in _READY)
    yield _WELL_KNOWN_LIVE, well_known(alive)
    yield _WELL_KNOWN_READY, well_known(able)


def health(models: LoadedModels) -> Handler:
    """Return the handler of /health: readiness with all details. ?probe=1 first has every device compute golden texts.

    Status 503 if the server is not ready, as for /health/ready.
    """
    probing: dict[str, asyncio.Task[None]] = {}

    async def handle(request: Request) -> Response:
        if request.query_params.get("probe") in ("1", "true"):
            task = probing.get("now")
            if task is None or task.done():  # concurrent requests share one probe
                task = probing["now"] = asyncio.create_task(_probe(models))
            await asyncio.shield(task)
        shown = _health(models)
        return Response(msgspec.json.encode(shown), 200 if shown.status == "ok" else 503, media_type="application/json")

    return handle


def ready(models: LoadedModels) -> Handler:
    """Return the handler of /health/ready: 503 while requests would fail, because a model is loading or no device is trusted."""

    async def handle(_: Request) -> Response:
        why = why_unready(models)
        return Response(
            msgspec.json.encode({"ready": not why, "reason": why or None}), 503 if why else 200, media_type="application/json"
        )

    return handle


def well_known(detailed: Handler) -> Handler:
    """Return the handler of /.well-known/live and ready, where Weaviate expects 204, from one with details."""

    async def handle(request: Request) -> Response:
        response = await detailed(request)
        return Response(status_code=204) if response.status_code == 200 else response

    return handle


def live(models: LoadedModels) -> Handler:
    """Return the handler of /health/live: 503 only if a stage's thread has died, which only a restart can fix."""

    async def handle(_: Request) -> Response:
        alive = is_live(models)
        return Response(msgspec.json.encode({"live": alive}), 200 if alive else 503, media_type="application/json")

    return handle


async def _probe(models: LoadedModels) -> None:
    """Probe the devices of all models of the settings at once; each has a few seconds (devices/fallback.py)."""
    running = [model for model in models.loaded() if model.pinned and model.running]
    # What they find is in the devices' states.
    await asyncio.gather(*(models.in_thread(model.engine.device.probe) for model in running), return_exceptions=True)


def _health(models: LoadedModels) -> Health:
    settings, engine = models.settings, models.first.engine
    shown = Health(
        status="ok",
        unix=time.time(),
        version=__version__,
        model=Path(models.first.name).name,
    )
    shown.models = [_model(model) for model in models.loaded()]
    if engine.state != "running":
        shown.status = "failed" if models.failure else state_of(models.first)
        shown.reason = models.failure
        return shown
    stats = engine.stats()
    shown.model, shown.fingerprint, shown.device = engine.spec.name, engine.spec.fingerprint, engine.device.name
    shown.queue = {
        "texts": stats.open_texts,
        "waiting_texts": stats.depth.texts,
        "waiting_tokens": stats.depth.tokens,
        "fraction": max(stats.open_texts / settings.max_queue_items, stats.depth.tokens / settings.max_queue_tokens),
    }
    shown.stages, shown.executed = stats.stages, stats.counters.executed
    shown.devices = [
        DeviceHealth(
            name=report.name,
            kind=report.kind,
            state=report.state,
            breaker=report.breaker,
            worker_pid=report.worker_pid,
            certified=report.certified,
            executed=stats.counters.executed.get(report.name, 0),
            restarts=report.restarts,
            precision=report.precision,
            reason=report.reason,
            slots=report.slots,
            guarded=report.guarded,
            canary_failures=report.canary_failures,
            examined=report.examined,
            probed=_seconds_since_probe(engine.device, report.name),
        )
        for report in engine.device.reports()
    ]
    loading = next((model for model in models.loaded() if model.pinned and not model.running), None)
    if loading is not None:
        shown.status, shown.reason = "loading", f"model {loading.name} is loading"
    elif why := why_unready(models):
        shown.status, shown.reason = "failed" if "restart the server" in why else "unready", why
    return shown


def _seconds_since_probe(device: Device, name: str) -> float | None:
    probe = device.probes.last(name) if isinstance(device, Fallback) else None
    return None if probe is None else round(time.monotonic() - probe.at, 3)


def _model(model: LoadedModel) -> ModelHealth:
    state = state_of(model)
    name, fingerprint = (model.engine.spec.name, model.engine.spec.fingerprint) if model.running else (Path(model.name).name, None)
    return ModelHealth(
        name=name, state=state, fingerprint=fingerprint, pinned=model.pinned, requests=model.uses, expires=model.expires
    )


def metrics(metrics: Metrics) -> Handler:
    """Return the handler of /metrics, in Prometheus' text format."""

    async def handle(_: Request) -> Response:
        return Response(generate_latest(metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    return handle


def static(content: bytes, media_type: str) -> Handler:
    """Return a handler for constant content."""

    async def handle(_: Request) -> Response:
        return Response(content, media_type=media_type)

    return handle


def docs() -> bytes:
    """Return the page that shows /openapi.json; it loads nothing from other servers."""
    return (files("npu_proxy.server.ops") / "docs.html").read_bytes()
