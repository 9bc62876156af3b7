"""MPNet: RoBERTa's positions and heads, and a bias by relative position that all layers share.

Source: Song et al. 2020; the buckets are those of Raffel et al. 2020 (T5); transformers' ``mpnet`` for tensor names.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from openvino import opset15 as op

from npu_proxy.graph import bert
from npu_proxy.graph.bert import Config, check, scores_pooling
from npu_proxy.graph.packed import Node, RowInputs, Rows, Style, Weights, constant, distances, integers
from npu_proxy.graph.roberta import scores, vocabulary

__all__ = ["MODEL_TYPES", "canonical_name", "check", "encode", "scores", "scores_pooling", "standard", "vocabulary"]

MODEL_TYPES = ("mpnet",)

FIRST = 2  # the padding id is 1, whatever config.json says
_FARTHEST = 128


def standard(config: Config) -> Config:
    """The rows of the position table before a text's first are no positions."""
    return {**config, "max_position_embeddings": config["max_position_embeddings"] - FIRST}


def canonical_name(name: str) -> str:
    """BERT's name."""
    name = name.removeprefix("mpnet.")
    for old, new in (("q", "self.query"), ("k", "self.key"), ("v", "self.value"), ("o", "output.dense")):
        name = name.replace(f".attention.attn.{old}.", f".attention.{new}.")
    return name.replace(".attention.LayerNorm.", ".attention.output.LayerNorm.")


def encode(config: Config, weights: Weights, inputs: RowInputs, style: Style) -> Node:
    """As bert.encode."""
    table = weights["encoder.relative_attention_bias.weight"]
    farthest = int(config["max_length"])
    buckets = _buckets(np.arange(-farthest, farthest + 1), len(table))
    by_distance = constant(np.ascontiguousarray(table[buckets]))  # [2 farthest + 1, heads]

    def bias(rows: Rows) -> Node:
        """[bins, heads, rows, positions]."""
        away = op.clamp(distances(inputs, rows), -farthest, farthest)  # of other texts' tokens it means nothing
        places = op.add(away, op.constant(np.int32(farthest)))
        return op.transpose(op.gather(by_distance, places, integers(0)), integers(0, 3, 1, 2))

    return bert.encode(config, weights, inputs, style, first_position=FIRST, bias=bias)


def _buckets(away: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """The bucket of each distance (key less query): half for either side, single up to a quarter, then logarithmic."""
    half = count // 2
    exact = half // 2
    size = np.abs(away)
    scale = np.log(np.maximum(size, 1).astype(np.float32) / exact) / math.log(_FARTHEST / exact)
    far = np.minimum(exact + (scale.astype(np.float32) * (half - exact)).astype(np.int64), half - 1)
    return (away > 0) * half + np.where(size < exact, size, far)
