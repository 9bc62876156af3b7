"""For those who run the server: health, metrics, the API's description."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from npu_proxy.errors import DeviceError
from npu_proxy.server.metrics import Metrics
from npu_proxy.server.registry import Loaded, Registry
from npu_proxy.version import __version__

Handler = Callable[[Request], Awaitable[Response]]


class DeviceHealth(msgspec.Struct, kw_only=True):
    """A device of the chain. certified: least cosine of golden texts to fp32 on the CPU. executed: texts."""

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


class ModelHealth(msgspec.Struct, kw_only=True):
    """A model in memory. requests: that use it now. expires: Unix seconds when it is unloaded, null for never."""

    name: str
    state: str
    fingerprint: str | None
    pinned: bool
    requests: int
    expires: float | None


class Health(msgspec.Struct, kw_only=True):
    """Answer of GET /health: 200 when ready, else 503; of the first model, and a line a model. Seconds, texts and tokens."""

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


def health(models: Registry) -> Handler:
    """Ready or not, why not, what waits, and which device has answered how many texts; ?probe=1 runs a row on each."""
    probing: dict[str, asyncio.Task[None]] = {}

    async def handle(request: Request) -> Response:
        if request.query_params.get("probe") in ("1", "true") and models.first.running:
            task = probing.get("now")
            if task is None or task.done():  # whoever asks meanwhile waits for the same one
                task = probing["now"] = asyncio.create_task(asyncio.to_thread(_probe, models))
            await asyncio.shield(task)
        shown = _health(models)
        return Response(msgspec.json.encode(shown), 200 if shown.status == "ok" else 503, media_type="application/json")

    return handle


def live(models: Registry) -> Handler:
    """200 as long as restarting the process would not help: 503 only when a stage's thread has died."""

    async def handle(_: Request) -> Response:
        dead = any(one.running and not all(one.engine.stats().stages.values()) for one in models.loaded())
        return Response(msgspec.json.encode({"live": not dead}), 503 if dead else 200, media_type="application/json")

    return handle


def _probe(models: Registry) -> None:
    with suppress(DeviceError):  # the devices' states say it
        models.first.engine.device.probe()


def _health(models: Registry) -> Health:
    settings, engine = models.settings, models.first.engine
    shown = Health(
        status="ok",
        unix=time.time(),
        version=__version__,
        model=Path(models.first.name).name,
    )
    shown.models = [_model(one) for one in models.loaded()]
    if engine.state != "running":
        shown.status = "failed" if models.failure else {"new": "loading"}.get(engine.state, engine.state)
        shown.reason = models.failure
        return shown
    stats = engine.stats()
    shown.model, shown.fingerprint, shown.device = engine.spec.name, engine.spec.fingerprint, engine.device.name
    shown.queue = {
        "texts": stats.open_texts,
        "waiting_texts": stats.depth.items,
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
        )
        for report in engine.device.reports()
    ]
    waited_for = next((one for one in models.loaded() if one.pinned and not one.running), None)
    if waited_for is not None:
        shown.status, shown.reason = "loading", f"model {waited_for.name} is loading"
    if not engine.device.ready:
        shown.status = "unready"
        shown.reason = "; ".join(f"{device.name} is {device.state}: {device.reason}" for device in shown.devices)
    if not all(stats.stages.values()):
        shown.status, shown.reason = "failed", "a stage's thread has died; restart the server"
    return shown


def _model(one: Loaded) -> ModelHealth:
    state = {"new": "loading"}.get(one.engine.state, one.engine.state)
    name, fingerprint = (one.engine.spec.name, one.engine.spec.fingerprint) if one.running else (Path(one.name).name, None)
    return ModelHealth(name=name, state=state, fingerprint=fingerprint, pinned=one.pinned, requests=one.uses, expires=one.expires)


def metrics(metrics: Metrics) -> Handler:
    """Prometheus text."""

    async def handle(_: Request) -> Response:
        return Response(generate_latest(metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    return handle


def static(content: bytes, media_type: str) -> Handler:
    """A handler for bytes that do not change."""

    async def handle(_: Request) -> Response:
        return Response(content, media_type=media_type)

    return handle


def docs() -> bytes:
    """The page that shows /openapi.json; it loads nothing from elsewhere."""
    return (files("npu_proxy.server") / "docs.html").read_bytes()
