"""Ray Serve: replicas of the whole server, every API included, that grow and shrink with the tokens that wait."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from typing import Any

from starlette.applications import Starlette
from starlette.types import ASGIApp

from npu_proxy.errors import InputError, UnavailableError
from npu_proxy.server.http.app import create_app
from npu_proxy.server.models.loaded import LoadedModels
from npu_proxy.server.ops.readiness import is_live, why_unready
from npu_proxy.settings import Settings

_QUEUED = "queued_tokens"


def deployment(
    settings: Settings | None = None,
    *,
    name: str = "npu-proxy",
    replicas: int | tuple[int, int] = 1,
    cpus: int = 1,
    resources: dict[str, float] | None = None,
    tokens_per_replica: int = 100_000,
    max_ongoing_requests: int = 1000,
) -> Any:
    """A Ray Serve application: ``serve.run(deployment(Settings(model="all-minilm")))``.

    replicas: how many, or the fewest and the most; then one is added for each ``tokens_per_replica`` that wait in all queues. cpus,
    resources: of each replica. A replica is replaced when a thread of it has died, and gets no requests while no device computes.
    Set `cache_url` so that all replicas share vectors, and `api_key` unless only trusted machines reach the cluster.
    """
    if find_spec("ray") is None:
        raise InputError("Ray is not installed: pip install npu-proxy[ray]", param="ray")
    from ray import serve  # type: ignore[import-not-found]  # an optional package

    scaling: dict[str, Any] = {"num_replicas": replicas}
    if isinstance(replicas, tuple):
        policy = {"policy_function": QueuedTokens, "policy_kwargs": {"tokens_per_replica": tokens_per_replica}}
        scaling = {"autoscaling_config": {"min_replicas": replicas[0], "max_replicas": replicas[1], "policy": policy}}
    options: dict[str, Any] = {"num_cpus": cpus, "resources": resources or {}}
    make: Any = serve.deployment(
        name=name, ray_actor_options=options, max_ongoing_requests=max_ongoing_requests, health_check_period_s=5, **scaling
    )
    return make(serve.ingress()(Replica)).bind(settings or Settings())


class Replica:
    """One server without a port of its own. Ray Serve calls the methods whose names it knows."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._models = LoadedModels(settings)

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Load the models and make the application, which stops them at its end."""
        await self._models.start()

        @asynccontextmanager
        async def lifespan(_app: Starlette) -> AsyncGenerator[None]:
            yield
            await self._models.stop()

        return create_app(self._models, self._settings, lifespan)

    async def check_health(self) -> None:
        """Raise if only a restart can help, or if no request would succeed."""
        if not is_live(self._models):
            raise UnavailableError("a stage's thread has died")
        if reason := why_unready(self._models):
            raise UnavailableError(reason)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Tokens that wait in all queues of this replica."""
        return {_QUEUED: float(sum(model.engine.stats().depth.tokens for model in self._models.loaded() if model.running))}


class QueuedTokens:
    """Decides how many replicas there should be: one for each so many tokens that wait, and never none."""

    def __init__(self, tokens_per_replica: int) -> None:
        self._tokens_per_replica = tokens_per_replica

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """How many replicas, and nothing to remember. context: Ray's AutoscalingContext."""
        waiting = sum((context.aggregated_metrics or {}).get(_QUEUED, {}).values())
        wanted = replicas_for(waiting, self._tokens_per_replica, context.current_num_replicas)
        return max(context.capacity_adjusted_min_replicas, min(context.capacity_adjusted_max_replicas, wanted)), {}


def replicas_for(waiting: float, tokens_per_replica: int, current: int) -> int:
    """How many replicas suit the tokens that wait in all queues; one fewer at a time when few wait."""
    wanted = max(1, math.ceil(waiting / tokens_per_replica))
    return wanted if wanted >= current else max(wanted, current - 1)
