"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT with positions counted from behind the padding id, and heads of its own.

Source: Liu et al. 2019, Conneau et al. 2020; tensor names of Hugging Face transformers.
"""

from __future__ import annotations

from openvino import opset15 as op

from npu_proxy.graph import bert
from npu_proxy.graph.bert import Config, check, scores_pooling
from npu_proxy.graph.layers import dense, gelu, layer_norm, linear
from npu_proxy.graph.packed import Node, RowInputs, Style, Weights

__all__ = [
    "MODEL_TYPES",
    "canonical_name",
    "check",
    "encode",
    "first_position",
    "scores",
    "scores_pooling",
    "standard",
    "vocabulary",
]

MODEL_TYPES = ("roberta", "xlm-roberta", "camembert")


def standard(config: Config) -> Config:
    """The rows of the position table before a text's first are no positions."""
    return {**config, "max_position_embeddings": config["max_position_embeddings"] - first_position(config)}


def canonical_name(name: str) -> str:
    """BERT's names behind another prefix."""
    return name.removeprefix("roberta.")


def encode(config: Config, weights: Weights, inputs: RowInputs, style: Style) -> Node:
    """As bert.encode."""
    return bert.encode(config, weights, inputs, style, first_position=first_position(config))


def scores(config: Config, weights: Weights, pooled: Node, style: Style) -> Node:
    """Logits [n, labels]."""
    return dense(weights, "classifier.out_proj", op.tanh(dense(weights, "classifier.dense", pooled)))


def vocabulary(config: Config, weights: Weights, hidden: Node, style: Style) -> Node:
    """Logits [tokens, vocabulary]; MPNet has the same head."""
    x = layer_norm(weights, "lm_head.layer_norm", gelu(dense(weights, "lm_head.dense", hidden), style), bert.epsilon(config))
    stored, tied = "lm_head.decoder.weight", "embeddings.word_embeddings.weight"
    bias = weights["lm_head.decoder.bias" if "lm_head.decoder.bias" in weights else "lm_head.bias"]
    return linear(x, weights[stored if stored in weights else tied], bias)


def first_position(config: Config) -> int:
    """The row of the position table that a text's first token has: behind that of padding."""
    pad = config.get("pad_token_id")
    return (1 if pad is None else int(pad)) + 1
