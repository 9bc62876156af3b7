"""Whether the server is alive, which only a restart can change, and whether it is ready, so that requests would succeed."""

from __future__ import annotations

from pathlib import Path

from npu_proxy.devices.fallback import trouble
from npu_proxy.server.models.loaded import LoadedModel, LoadedModels


def state_of(model: LoadedModel) -> str:
    """`loading`, or the state of its engine."""
    return {"new": "loading"}.get(model.engine.state, model.engine.state)


def why_unready(models: LoadedModels) -> str:
    """Why requests to a model of the settings would fail now, or "" if they would not."""
    for model in models.loaded():
        if not model.pinned:
            continue
        name = Path(model.name).name
        if not model.running:
            return models.failure or f"model {name} is {state_of(model)}"
        if reason := trouble(model.engine.device):
            return reason if model is models.first else f"model {name}: {reason}"
        if not all(model.engine.stats().stages.values()):
            return "a stage's thread has died; restart the server"
    return ""


def is_live(models: LoadedModels) -> bool:
    """Whether every stage's thread of every model in memory runs."""
    return all(not model.running or all(model.engine.stats().stages.values()) for model in models.loaded())
