"""MPNet: RoBERTa's positions and heads, and a relative position bias that all layers share.

Source: Song et al. 2020; Raffel et al. 2020 (T5) for the buckets; transformers' ``mpnet`` for tensor names.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from npu_proxy.graph import bert
from npu_proxy.graph.bert import classifier_pooling
from npu_proxy.graph.context import GraphContext
from npu_proxy.graph.inputs import BatchInputs, LayerTokens
from npu_proxy.graph.keys import Keys, only
from npu_proxy.graph.nodes import Node, constant, integers, op
from npu_proxy.graph.roberta import label_logits, positions_after, vocabulary_logits

__all__ = [
    "KEYS",
    "MODEL_TYPES",
    "canonical_name",
    "classifier_pooling",
    "encode",
    "label_logits",
    "vocabulary_logits",
]

MODEL_TYPES = ("mpnet",)

FIRST_POSITION = 2  # the padding id is always 1, regardless of config.json
_FARTHEST, _BUCKETS = 128, 32  # the reference uses 32 whatever config.json says

KEYS: Keys = {
    **bert.KEYS,
    "max_position_embeddings": positions_after(lambda _: FIRST_POSITION),
    "first_position": lambda _: FIRST_POSITION,
    "unplaced": lambda stored: (FIRST_POSITION - 1, positions_after(lambda _: FIRST_POSITION)(stored)),
    "type_vocab_size": lambda _: 0,
    "relative_attention_num_buckets": only("relative_attention_num_buckets", _BUCKETS),
}


def canonical_name(name: str) -> str:
    """BERT's name for a checkpoint's tensor."""
    name = name.removeprefix("mpnet.")
    for old, new in (("q", "self.query"), ("k", "self.key"), ("v", "self.value"), ("o", "output.dense")):
        name = name.replace(f".attention.attn.{old}.", f".attention.{new}.")
    return name.replace(".attention.LayerNorm.", ".attention.output.LayerNorm.")


def encode(graph: GraphContext) -> Node:
    """Hidden states of the last layer; see ``bert.encode``."""
    table = graph.table("encoder.relative_attention_bias", "relative_attention_num_buckets")
    farthest = int(graph.config["max_length"])
    buckets = _buckets(np.arange(-farthest, farthest + 1), len(table))
    by_distance = constant(np.ascontiguousarray(table[buckets]))  # [2 farthest + 1, heads]

    def bias(tokens: LayerTokens) -> Node:
        """The bias of ``tokens``, [bins, heads, tokens, positions]."""
        distance = op.clamp(_distances(graph.inputs, tokens), -farthest, farthest)  # meaningless between different texts
        index = op.add(distance, op.constant(np.int32(farthest)))
        return op.transpose(op.gather(by_distance, index, integers(0)), integers(0, 3, 1, 2))

    return bert.encode(graph, first_position=FIRST_POSITION, bias=bias)


def _distances(inputs: BatchInputs, tokens: LayerTokens) -> Node:
    """Key position minus token position in a bin, [bins or 1, tokens, positions] int32; padding counts, unlike in positions."""
    count = op.convert(op.gather(inputs.all_tokens.grid, integers(1), integers(0)), "i32")
    numbers = op.range(op.constant(np.int32(0)), count, op.constant(np.int32(1)), "i32")
    rows = op.unsqueeze(numbers, integers(0)) if tokens.index is None else tokens.index
    return op.subtract(op.unsqueeze(numbers, integers(0, 1)), op.unsqueeze(rows, integers(2)))


def _buckets(distance: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """The bucket of each distance (key minus query): half per sign; exact up to a quarter of them, then logarithmic."""
    half = count // 2
    exact = half // 2
    size = np.abs(distance)
    scale = np.log(np.maximum(size, 1).astype(np.float32) / exact) / math.log(_FARTHEST / exact)
    far = np.minimum(exact + (scale.astype(np.float32) * (half - exact)).astype(np.int64), half - 1)
    return (distance > 0) * half + np.where(size < exact, size, far)
