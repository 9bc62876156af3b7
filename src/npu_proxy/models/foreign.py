"""What is read of models that graph/ does not build, and that devices/exported.py serves from a graph file of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from npu_proxy.errors import ModelError
from npu_proxy.graph import mpnet, roberta
from npu_proxy.graph.build import family
from npu_proxy.models.jsons import Json
from npu_proxy.models.weights import NoWeightsError, weight_files

_NO_LIMIT = 512
"""Tokens of a text where positions have no end and nothing else says (T5): what such models were trained with."""
_LIKE_ROBERTA = (*roberta.MODEL_TYPES, "xlm-roberta-xl", "roberta-prelayernorm", "data2vec-text", "ibert", "longformer", "xmod")
"""Families whose positions count from the id of padding on."""
_CALLED = {
    "hidden_size": ("d_model", "n_embd", "dim"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length"),
}
"""What other families call the keys of config.json that are read."""


def has_graph(folder: Path) -> bool:
    """Whether the repository brings a graph file."""
    return any(any(folder.glob(pattern)) for pattern in ("*.onnx", "*/*.onnx", "*/*.xml"))


def weights_of(transformer: Path, model_type: str, raw: Json, *, graph: bool) -> tuple[Sequence[Path], str]:
    """The files of weights, and why graph/ builds nothing from them, "" where it does. Raises ModelError without a ``graph``."""
    files: Sequence[Path] = ()
    reasons: list[ModelError] = []
    try:
        family(model_type, raw)
    except ModelError as error:
        reasons.append(error)
    try:
        files = weight_files(transformer)
    except NoWeightsError as error:
        reasons.append(error)
    if reasons and not graph:
        raise reasons[0]
    return files, str(reasons[0]) if reasons else ""


def translated(raw: Json) -> Json:
    """The configuration of a family that is not built here, with the names that are read."""
    read = {name: next((raw[other] for other in (name, *others) if other in raw), None) for name, others in _CALLED.items()}
    positions = (read["max_position_embeddings"] or _NO_LIMIT + first_position(raw)) - first_position(raw)
    return {**raw, **read, "max_position_embeddings": positions}


def first_position(config: Json) -> int:
    """The row of the position table that a text's first token has, which exported graphs count from."""
    model_type = config.get("model_type")
    if model_type in mpnet.MODEL_TYPES:
        return mpnet.FIRST
    return roberta.first_position(config) if model_type in _LIKE_ROBERTA else 0
