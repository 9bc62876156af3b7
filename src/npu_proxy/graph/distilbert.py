"""DistilBERT: BERT's layers without token types, under other names. Source: Sanh et al. 2019; transformers' ``distilbert``."""

from __future__ import annotations

from openvino import opset15 as op

from npu_proxy.graph.bert import Config, check, encode, scores_pooling
from npu_proxy.graph.layers import ACTIVATIONS, dense, layer_norm, linear
from npu_proxy.graph.packed import Node, Style, Weights

__all__ = ["MODEL_TYPES", "canonical_name", "check", "encode", "scores", "scores_pooling", "standard", "vocabulary"]

MODEL_TYPES = ("distilbert",)

_NAMES = {
    "transformer.layer.": "encoder.layer.",
    ".attention.q_lin.": ".attention.self.query.",
    ".attention.k_lin.": ".attention.self.key.",
    ".attention.v_lin.": ".attention.self.value.",
    ".attention.out_lin.": ".attention.output.dense.",
    ".sa_layer_norm.": ".attention.output.LayerNorm.",
    ".ffn.lin1.": ".intermediate.dense.",
    ".ffn.lin2.": ".output.dense.",
    ".output_layer_norm.": ".output.LayerNorm.",
}


def standard(config: Config) -> Config:
    """BERT's names for the same numbers."""
    return {
        **config,
        "hidden_size": config["dim"],
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": config["n_heads"],
        "hidden_act": config.get("activation", "gelu"),
        "layer_norm_eps": 1e-12,
    }


def canonical_name(name: str) -> str:
    """BERT's name."""
    name = name.removeprefix("distilbert.")
    for old, new in _NAMES.items():
        name = name.replace(old, new)
    return name


def scores(config: Config, weights: Weights, pooled: Node, style: Style) -> Node:
    """Logits [n, labels]."""
    return dense(weights, "classifier", op.relu(dense(weights, "pre_classifier", pooled)))


def vocabulary(config: Config, weights: Weights, hidden: Node, style: Style) -> Node:
    """Logits [tokens, vocabulary]."""
    x = ACTIVATIONS[config["hidden_act"]](dense(weights, "vocab_transform", hidden), style)
    x = layer_norm(weights, "vocab_layer_norm", x, 1e-12)
    stored, tied = "vocab_projector.weight", "embeddings.word_embeddings.weight"
    return linear(x, weights[stored if stored in weights else tied], weights["vocab_projector.bias"])
