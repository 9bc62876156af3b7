"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT with other heads, and positions that start after the padding id.

Source: Liu et al. 2019, Conneau et al. 2020; tensor names of Hugging Face transformers.
"""

from __future__ import annotations

from collections.abc import Callable

from npu_proxy.graph import bert
from npu_proxy.graph.activations import gelu
from npu_proxy.graph.bert import classifier_pooling
from npu_proxy.graph.context import GraphContext
from npu_proxy.graph.keys import Key, Keys, Stored, count, size, value_error
from npu_proxy.graph.nodes import Node, op

__all__ = [
    "KEYS",
    "MODEL_TYPES",
    "canonical_name",
    "classifier_pooling",
    "encode",
    "first_position",
    "label_logits",
    "vocabulary_logits",
]

MODEL_TYPES = ("roberta", "xlm-roberta", "camembert")


def first_position(stored: Stored) -> int:
    """The row of the position table for a text's first token, which follows the row of padding."""
    return int(count("pad_token_id", default=1)(stored)) + 1


def positions_after(first: Callable[[Stored], int]) -> Key:
    """Positions that texts can have: the rows of the position table from the first token's on."""

    def read(stored: Stored) -> int:
        rows: int = size("max_position_embeddings")(stored)
        if rows <= first(stored):
            raise value_error("max_position_embeddings", rows, f"tables of more than {first(stored)} rows for this family")
        return rows - first(stored)

    return read


KEYS: Keys = {
    **bert.KEYS,
    "max_position_embeddings": positions_after(first_position),
    "first_position": first_position,
    "unplaced": lambda stored: (first_position(stored) - 1, positions_after(first_position)(stored)),
}


def canonical_name(name: str) -> str:
    """The name without RoBERTa's prefix; the rest is as in BERT."""
    return name.removeprefix("roberta.")


def encode(graph: GraphContext) -> Node:
    """Hidden states of the last layer; see ``bert.encode``."""
    return bert.encode(graph, first_position=graph.config["first_position"])


def label_logits(graph: GraphContext, pooled: Node) -> Node:
    """Logits [n, labels]."""
    return graph.linear("classifier.out_proj", op.tanh(graph.linear("classifier.dense", pooled)))


def vocabulary_logits(graph: GraphContext, hidden: Node) -> Node:
    """Logits [tokens, vocabulary] of the masked language model; MPNet has the same head."""
    head = graph.scope("lm_head")
    x = head.layer_norm("layer_norm", gelu(head.linear("dense", hidden), graph.style), graph.config["layer_norm_eps"])
    bias = head.weight("decoder.bias" if head.has("decoder.bias") else "bias")
    return graph.tied_linear(x, "lm_head.decoder.weight", "embeddings.word_embeddings.weight", bias)
