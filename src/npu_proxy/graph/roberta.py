"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT with other heads, and positions that start after the padding id.

Source: Liu et al. 2019, Conneau et al. 2020; tensor names of Hugging Face transformers.
"""

from __future__ import annotations

from npu_proxy.graph import bert
from npu_proxy.graph.activations import gelu
from npu_proxy.graph.bert import check_config, classifier_pooling
from npu_proxy.graph.context import GraphContext
from npu_proxy.graph.nodes import Config, Node, op

__all__ = [
    "MODEL_TYPES",
    "canonical_name",
    "check_config",
    "classifier_pooling",
    "encode",
    "first_position",
    "label_logits",
    "normalize_config",
    "vocabulary_logits",
]

MODEL_TYPES = ("roberta", "xlm-roberta", "camembert")


def normalize_config(config: Config) -> Config:
    """config.json without the unused rows before a text's first token in ``max_position_embeddings``."""
    return {**config, "max_position_embeddings": config["max_position_embeddings"] - first_position(config)}


def canonical_name(name: str) -> str:
    """The name without RoBERTa's prefix; the rest is as in BERT."""
    return name.removeprefix("roberta.")


def encode(graph: GraphContext) -> Node:
    """Hidden states of the last layer; see ``bert.encode``."""
    return bert.encode(graph, first_position=first_position(graph.config))


def label_logits(graph: GraphContext, pooled: Node) -> Node:
    """Logits [n, labels]."""
    return graph.linear("classifier.out_proj", op.tanh(graph.linear("classifier.dense", pooled)))


def vocabulary_logits(graph: GraphContext, hidden: Node) -> Node:
    """Logits [tokens, vocabulary] of the masked language model; MPNet has the same head."""
    head = graph.scope("lm_head")
    x = head.layer_norm("layer_norm", gelu(head.linear("dense", hidden), graph.style), bert.epsilon(graph.config))
    bias = head.weight("decoder.bias" if head.has("decoder.bias") else "bias")
    return graph.tied_linear(x, "lm_head.decoder.weight", "embeddings.word_embeddings.weight", bias)


def first_position(config: Config) -> int:
    """The row of the position table for a text's first token, which follows the row of padding."""
    pad = config.get("pad_token_id")
    return (1 if pad is None else int(pad)) + 1
