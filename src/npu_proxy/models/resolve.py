"""Resolve settings to a model: its name or path, folder and spec, and the settings with all defaults filled in.

A model is an absolute path, a path that starts with a dot, a name or alias in the store (catalog.py), or else a folder. The spec
comes from the model's files (layout.py) and is adjusted to the precision and device that serve it. Settings that are not set are
filled in from this machine's tuning profile (tuning.py). Nothing here loads OpenVINO.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from npu_proxy.errors import ModelError
from npu_proxy.models.fingerprint import fingerprint
from npu_proxy.models.graph_files import available_devices, from_graph_file
from npu_proxy.models.layout import read_spec
from npu_proxy.models.quantized import int8_spec
from npu_proxy.models.store import ModelStore
from npu_proxy.models.tuning import apply_profile
from npu_proxy.settings import Settings
from npu_proxy.spec import ModelSpec
from npu_proxy.targets import GRAPH_FILES


def resolve(settings: Settings) -> tuple[Settings, ModelSpec]:
    """The settings with all defaults filled in, and the spec of the model that they serve.

    Raises ModelNotFoundError if there is no such model, and ModelError if it cannot be served.
    """
    spec = read_model(settings)
    settings = apply_profile(settings, spec)
    return settings, served_spec(settings, spec)


def read_model(settings: Settings, model: str = "") -> ModelSpec:
    """The fp32 spec of ``model`` (default: the settings' first) from its files. Raises ModelError, ModelNotFoundError."""
    name, folder = ModelStore(settings.store).resolve(model or settings.model[0])
    return read_folder(settings, folder, name)


def read_folder(settings: Settings, folder: Path, name: str | None = None) -> ModelSpec:
    """The fp32 spec of the model in ``folder``, with the settings that change how its files are read. Raises ModelError."""
    return read_spec(folder, name=name, pooling=settings.pooling, max_length=settings.max_length)


def served_spec(settings: Settings, spec: ModelSpec) -> ModelSpec:
    """The spec for the settings `device` and `precision`, with its own fingerprint. Raises ModelError if they cannot serve it."""
    if settings.device in GRAPH_FILES:
        return from_graph_file(settings, spec)
    if spec.refused and settings.device != "debug":
        available = available_devices(settings, spec.folder)
        options = " or ".join(f"`device` {name} with `{setting}`" for name, (setting, _) in GRAPH_FILES.items())
        hint = f"set `device` to {available[0]}, or leave it unset" if available else f"set its graph file with {options}"
        raise ModelError(f"{spec.name} cannot be served by `device` {settings.device}: {hint} ({spec.refused})")
    if settings.precision == "int8":
        spec = int8_spec(settings.store, spec)
    if settings.precision == "fp16":
        spec = replace(spec, precision="fp16", fingerprint=fingerprint(spec, precision="fp16"))
    return replace(spec, fingerprint=f"debug-{spec.fingerprint}"[:16]) if settings.device == "debug" else spec
