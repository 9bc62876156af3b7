"""MPNet: RoBERTa's positions and heads, and a relative position bias that all layers share.

Source: Song et al. 2020; Raffel et al. 2020 (T5) for the buckets; transformers' ``mpnet`` for tensor names.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from npu_proxy.graph import bert
from npu_proxy.graph.bert import check_config, classifier_pooling
from npu_proxy.graph.context import GraphContext
from npu_proxy.graph.inputs import LayerTokens, distances
from npu_proxy.graph.nodes import Config, Node, constant, integers, op
from npu_proxy.graph.roberta import label_logits, vocabulary_logits

__all__ = [
    "MODEL_TYPES",
    "canonical_name",
    "check_config",
    "classifier_pooling",
    "encode",
    "label_logits",
    "normalize_config",
    "vocabulary_logits",
]

MODEL_TYPES = ("mpnet",)

FIRST_POSITION = 2  # the padding id is always 1, regardless of config.json
_FARTHEST = 128


def normalize_config(config: Config) -> Config:
    """config.json without the unused rows before a text's first token in ``max_position_embeddings``."""
    return {**config, "max_position_embeddings": config["max_position_embeddings"] - FIRST_POSITION}


def canonical_name(name: str) -> str:
    """BERT's name for a checkpoint's tensor."""
    name = name.removeprefix("mpnet.")
    for old, new in (("q", "self.query"), ("k", "self.key"), ("v", "self.value"), ("o", "output.dense")):
        name = name.replace(f".attention.attn.{old}.", f".attention.{new}.")
    return name.replace(".attention.LayerNorm.", ".attention.output.LayerNorm.")


def encode(graph: GraphContext) -> Node:
    """Hidden states of the last layer; see ``bert.encode``."""
    table = graph.weight("encoder.relative_attention_bias.weight")
    farthest = int(graph.config["max_length"])
    buckets = _buckets(np.arange(-farthest, farthest + 1), len(table))
    by_distance = constant(np.ascontiguousarray(table[buckets]))  # [2 farthest + 1, heads]

    def bias(tokens: LayerTokens) -> Node:
        """The bias of ``tokens``, [bins, heads, tokens, positions]."""
        distance = op.clamp(distances(graph.inputs, tokens), -farthest, farthest)  # meaningless between different texts
        index = op.add(distance, op.constant(np.int32(farthest)))
        return op.transpose(op.gather(by_distance, index, integers(0)), integers(0, 3, 1, 2))

    return bert.encode(graph, first_position=FIRST_POSITION, bias=bias)


def _buckets(distance: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """The bucket of each distance (key minus query): half per sign; exact up to a quarter of them, then logarithmic."""
    half = count // 2
    exact = half // 2
    size = np.abs(distance)
    scale = np.log(np.maximum(size, 1).astype(np.float32) / exact) / math.log(_FARTHEST / exact)
    far = np.minimum(exact + (scale.astype(np.float32) * (half - exact)).astype(np.int64), half - 1)
    return (distance > 0) * half + np.where(size < exact, size, far)
