"""For those who run the server: health, metrics, the API's description."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import TYPE_CHECKING

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from npu_proxy.version import __version__

if TYPE_CHECKING:
    from npu_proxy.server.app import State

Handler = Callable[[Request], Awaitable[Response]]


class Health(msgspec.Struct, kw_only=True):
    """Answer of GET /health: 200 when ready, else 503. Seconds, texts and tokens."""

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


def health(state: State) -> Handler:
    """Ready or not, why not, what waits, and which device has answered how many texts."""

    async def handle(_: Request) -> Response:
        shown = _health(state)
        return Response(msgspec.json.encode(shown), 200 if shown.status == "ok" else 503, media_type="application/json")

    return handle


def _health(state: State) -> Health:
    engine = state.engine.engine
    shown = Health(status="ok", unix=time.time(), version=__version__, model=state.settings.model)
    if engine.state != "running":
        shown.status = "failed" if state.failure else {"new": "loading"}.get(engine.state, engine.state)
        shown.reason = state.failure
        return shown
    stats, settings = engine.stats(), state.settings
    shown.model, shown.fingerprint, shown.device = engine.spec.name, engine.spec.fingerprint, engine.device.name
    shown.queue = {
        "texts": stats.open_texts,
        "waiting_texts": stats.depth.items,
        "waiting_tokens": stats.depth.tokens,
        "fraction": max(stats.open_texts / settings.max_queue_items, stats.depth.tokens / settings.max_queue_tokens),
    }
    shown.stages, shown.executed = stats.stages, stats.counters.executed
    if not all(stats.stages.values()):
        shown.status, shown.reason = "failed", "a stage's thread has died; restart the server"
    return shown


def metrics(state: State) -> Handler:
    """Prometheus text."""

    async def handle(_: Request) -> Response:
        return Response(generate_latest(state.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    return handle


def static(content: bytes, media_type: str) -> Handler:
    """A handler for bytes that do not change."""

    async def handle(_: Request) -> Response:
        return Response(content, media_type=media_type)

    return handle


async def docs(_: Request) -> Response:
    """The page that shows /openapi.json; it loads nothing from elsewhere."""
    return HTMLResponse((files("npu_proxy.server") / "docs.html").read_text(encoding="utf-8"))
