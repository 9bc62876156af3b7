"""Graph files (OpenVINO IR, ONNX) in a model's repository: where they are, and the specs of models served from one.

devices/exported.py runs them. They are the only way to serve families that graph/ does not build.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from npu_proxy.errors import ModelError
from npu_proxy.graph import roberta
from npu_proxy.graph.build import family
from npu_proxy.models.fingerprint import file_sha256
from npu_proxy.models.json_files import Json, inside
from npu_proxy.models.weights import NoWeightsError, weight_files
from npu_proxy.settings import Settings
from npu_proxy.spec import ModelSpec
from npu_proxy.targets import GRAPH_FILES
from npu_proxy.types import OutputType

OUTPUT_RANKS: Mapping[OutputType, int] = {
    OutputType.DENSE: 3,
    OutputType.SPARSE: 3,
    OutputType.TOKENS: 3,
    OutputType.SCORES: 2,
}
"""Rank of the graph's output: 3 for a vector per token, 2 for one per text. A graph file cannot serve other output types."""
_DEFAULT_LENGTH = 512
"""Tokens per text if positions are unbounded and no file states a limit (T5): the length such models were trained with."""
_LIKE_ROBERTA = ("xlm-roberta-xl", "roberta-prelayernorm", "data2vec-text", "ibert", "longformer", "xmod")
"""Families whose positions start after the padding id."""
_OTHER_KEYS = {
    "hidden_size": ("d_model", "n_embd", "dim"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length"),
    "num_hidden_layers": ("n_layers", "num_layers", "n_layer"),
}
"""Other families' names for keys of config.json."""


def graph_file(settings: Settings, device: str) -> str:
    """The path of a device's graph file within a model's folder."""
    return str(getattr(settings, GRAPH_FILES[device][0]))


def available_devices(settings: Settings, folder: Path) -> list[str]:
    """The devices whose graph file exists in a model's folder."""
    return [device for device in GRAPH_FILES if (folder / graph_file(settings, device)).is_file()]


def from_graph_file(settings: Settings, spec: ModelSpec) -> ModelSpec:
    """The spec of the same model, served from the graph file for the setting `device`. Raises ModelError if it cannot be."""
    device, file = settings.device, graph_file(settings, settings.device)
    setting, example = GRAPH_FILES[device]
    path = inside(spec.folder, file, by=setting)
    if not path.is_file():
        others = available_devices(settings, spec.folder)
        hint = (
            f"set `device` to {others[0]}, for which it has a file"
            if others
            else f"set `{setting}` to a file that it has, such as `{example}`"
        )
        raise ModelError(f"{spec.name} has no file `{file}`; {hint}")
    if spec.output_type not in OUTPUT_RANKS:
        raise ModelError(
            f"{spec.name} has {spec.output_type} output, but device `{device}` supports only {', '.join(OUTPUT_RANKS)}"
        )
    parts = sorted({*path.parent.glob(f"{path.name}[._]data*"), *path.parent.glob(f"{path.stem}.bin")})
    digest = hashlib.sha256(f"{device} {spec.fingerprint} {file_sha256(path)}".encode())
    for part in parts:
        digest.update(file_sha256(part).encode())
    return replace(spec, fingerprint=digest.hexdigest()[:16], weight_files=[path, *parts])


# -- reading models of other families ------------------------------------------------------------------------------------


def has_graph_file(folder: Path) -> bool:
    """Whether a model's folder contains any graph file."""
    return any(any(folder.glob(pattern)) for pattern in ("*.onnx", "*/*.onnx", "*.xml", "*/*.xml"))


def find_weights(transformer: Path, model_type: str, *, graph: bool) -> tuple[Sequence[Path], str]:
    """The weight files, and the reason why graph/ cannot build a graph from them ("" if it can).

    graph: whether there is a graph file from which such a model can be served. Raises ModelError if neither is possible.
    """
    files: Sequence[Path] = ()
    reasons: list[ModelError] = []
    try:
        family(model_type)
    except ModelError as error:
        reasons.append(error)
    try:
        files = weight_files(transformer)
    except NoWeightsError as error:
        reasons.append(error)
    if reasons and not graph:
        raise reasons[0]
    return files, str(reasons[0]) if reasons else ""


def normalize_config(config: Json) -> Json:
    """The configuration of a family that graph/ does not build, with the usual keys."""
    values = {key: next((config[name] for name in (key, *names) if name in config), None) for key, names in _OTHER_KEYS.items()}
    first = roberta.first_position(config) if config.get("model_type") in _LIKE_ROBERTA else 0
    positions = (values["max_position_embeddings"] or _DEFAULT_LENGTH + first) - first
    return {**config, **values, "max_position_embeddings": positions, "first_position": first}
