"""Resolve settings to a model: its name or path, folder and spec, and the settings with all defaults filled in.

A model is an absolute path, a path that starts with a dot, a name or alias in the store (catalog.py), or else a folder. The spec
comes from the model's files (layout.py) and is adjusted to the precision and device that serve it. Settings that are not set are
filled in from this machine's tuning profile (tuning.py). Nothing here loads OpenVINO.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from npu_proxy.errors import ModelError, SettingsError
from npu_proxy.models.fingerprint import fingerprint
from npu_proxy.models.graph_files import available_devices, from_graph_file
from npu_proxy.models.instructions import DOCUMENTED, instruction_template
from npu_proxy.models.layout import read_spec
from npu_proxy.models.quantized import int8_spec
from npu_proxy.models.store import ModelStore
from npu_proxy.models.tuning import apply_profile
from npu_proxy.settings import Settings, general_value
from npu_proxy.spec import PROMPT_NAMES, ModelSpec
from npu_proxy.targets import GRAPH_FILES
from npu_proxy.types import OutputType


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
    spec = read_spec(
        folder,
        name=name,
        pooling=settings.pooling,
        max_length=settings.max_length,
        accept_unread=settings.accept_unread,
    )
    return with_documentation(spec, settings)


def with_documentation(spec: ModelSpec, settings: Settings) -> ModelSpec:
    """The spec with the instructions of the settings, then of its files, then of its documentation; and its Matryoshka dimensions.

    Raises SettingsError if an instruction is set for a late-interaction model, which has markers of its own.
    """
    documented = DOCUMENTED.get(spec.name.lower())
    dimensions = spec.matryoshka or (documented.dimensions if documented else ())
    spec = replace(spec, matryoshka=dimensions)
    if spec.output_type is OutputType.SCORES:
        return spec
    prompts, sources = dict(spec.prompts), dict[str, str]()
    for role in ("query", "document"):
        instructed = documented is not None and (documented.query or documented.document) and spec.late_interaction is None
        if documented and instructed and not any(name in prompts for name in PROMPT_NAMES[role]):
            prompts[role], sources[role] = getattr(documented, role), documented.source
        setting = f"{role}_instruction"
        if chosen := general_value(getattr(settings, setting)):
            if spec.late_interaction is not None:
                why = "late-interaction models mark queries and documents in their own way"
                raise SettingsError(f"`{setting}` cannot be set for {spec.name}: {why}", param=setting)
            prompts[role], sources[role] = chosen, f"the setting `{setting}`"
    if prompts == spec.prompts:
        return spec
    spec = replace(spec, prompts=prompts, prompt_sources=sources)
    return replace(spec, instruction=spec.instruction or instruction_template(spec), fingerprint=fingerprint(spec))


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
