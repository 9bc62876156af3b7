"""Commands that manage models: pull, list, rm and show."""

from __future__ import annotations

import sys

import msgspec

from npu_proxy.commands.shared import DEFAULTS, SharedSettings, with_model
from npu_proxy.models import card
from npu_proxy.models.pull import pull as pull_model
from npu_proxy.models.resolve import resolve
from npu_proxy.models.store import ModelStore
from npu_proxy.prepare.artifacts import remove_artifacts
from npu_proxy.settings import Settings
from npu_proxy.spec import ModelSpec
from npu_proxy.targets import GRAPH_FILES
from npu_proxy.types import OutputType, Pooling


def pull(model: str = "", /, *, revision: str | None = None, settings: SharedSettings = DEFAULTS) -> None:
    """Download a model into the local store, or check and repair one that is already there.

    Parameters
    ----------
    model
        Hugging Face name, catalog alias, or a folder to import. Default: the setting `model`.
    revision
        Branch, tag or commit to download from the hub.
    """
    stored = pull_model(
        ModelStore(settings.store),
        model or settings.model[0],
        mirrors=settings.mirrors,
        report=lambda line: print(line, file=sys.stderr),
        progress=sys.stderr.isatty(),
        revision=revision,
        most_bytes=int(settings.max_pull_gb * 1e9),
    )
    print(f"{stored.name}  {stored.size / 1e6:.1f} MB  {stored.folder}")


def list_models(*, settings: SharedSettings = DEFAULTS) -> None:
    """Show the models in the local store."""
    models = ModelStore(settings.store).list()
    if not models:
        print(f"no models in {settings.store}; download the default one with `npu-proxy pull`", file=sys.stderr)
        return
    rows = [("MODEL", "SIZE", "FROM", "FOLDER")]
    rows += [(model.name, f"{model.size / 1e6:.1f} MB", model.source, str(model.folder)) for model in models]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for *cells, folder in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), folder, sep="  ")


def rm(model: str, *, settings: SharedSettings = DEFAULTS) -> None:
    """Remove a model from the local store, with its int8 copies, compiled blobs and profiles.

    Parameters
    ----------
    model
        Name or alias, as `npu-proxy list` shows it.
    """
    store = ModelStore(settings.store)
    stored = store.find(model)
    if stored is not None:
        remove_artifacts(settings, stored.folder)
    removed = store.remove(model)
    print(f"removed {removed.name}, {removed.size / 1e6:.1f} MB")


def show(model: str = "", /, *, json: bool = False, settings: SharedSettings = DEFAULTS) -> None:
    """Show a model's architecture, width, limit, pooling, prompts, precision, source, licence, limits and fingerprint.

    Parameters
    ----------
    model
        A name from `npu-proxy list`, an alias, or a folder. Default: the setting `model`.
    json
        Print the description as one JSON object.
    """
    about = describe(with_model(settings, model))
    if json:
        print(msgspec.json.encode(about).decode())
        return
    for key, value in about.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        if isinstance(value, dict):
            shown = "; ".join(f"{name}: {text!r}" for name, text in value.items())
        if shown not in ("", None):
            print(f"{key:14} {shown}")


def _dimensions(spec: ModelSpec) -> str:
    """The dimensions to which its vectors may be cut."""
    if OutputType.DENSE not in spec.output_types:
        return ""
    if isinstance(spec.matryoshka, range):
        return f"{spec.matryoshka[0]} to {spec.matryoshka[-1]}"
    return ", ".join(map(str, spec.matryoshka)) or "not trained for it; `dimensions` costs quality"


def describe(settings: Settings) -> dict[str, object]:
    """The properties that ``show`` prints, by name."""
    settings, spec = resolve(settings)
    stored = ModelStore(settings.store).find(spec.name)
    layers = spec.config.get("num_hidden_layers", 0)
    return {
        "model": spec.name,
        "architecture": f"{spec.family}, {layers} layers",
        "gives": [str(output_type) for output_type in spec.output_types],
        "width": spec.width,
        "tokens": spec.max_length,
        "vocabulary": spec.vocabulary,
        "pooling": str(spec.pooling) if spec.pooling is not Pooling.NONE else "none (one vector per token)",
        "normalizes": spec.normalizes,
        "similarity": "maxsim"
        if spec.output_type is OutputType.TOKENS
        else spec.similarity
        if spec.output_type is not OutputType.SCORES
        else "",
        "labels": list(spec.labels),
        "scores": spec.activation if spec.output_type is OutputType.SCORES else "",
        "prompts": dict(spec.prompts),
        "prompt sources": dict(spec.prompt_sources),
        "default prompt": spec.default_prompt,
        "matryoshka": _dimensions(spec),
        "instruction": spec.instruction,
        "accepted": list(spec.accepted),
        "precision": spec.precision,
        "served from": f"a graph file, padded (device {settings.device})" if settings.device in GRAPH_FILES else "",
        "source": stored.source if stored else "a folder",
        "licence": card.licence(spec),
        "limits": card.limits(spec),
        "card": card.address(spec),
        "weights": f"{sum(file.stat().st_size for file in spec.weight_files) / 1e6:.1f} MB",
        "fingerprint": spec.fingerprint,
    }
