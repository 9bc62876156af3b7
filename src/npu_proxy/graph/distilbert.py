"""DistilBERT: BERT's layers with other names and without token types. Source: Sanh et al. 2019; transformers' ``distilbert``."""

from __future__ import annotations

from npu_proxy.graph.bert import check_config, classifier_pooling, encode
from npu_proxy.graph.context import GraphContext
from npu_proxy.graph.nodes import Config, Node, op

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


def normalize_config(config: Config) -> Config:
    """config.json with BERT's keys."""
    return {
        **config,
        "hidden_size": config["dim"],
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": config["n_heads"],
        "hidden_act": config.get("activation", "gelu"),
        "layer_norm_eps": 1e-12,
    }


def canonical_name(name: str) -> str:
    """BERT's name for a checkpoint's tensor."""
    name = name.removeprefix("distilbert.")
    for old, new in _NAMES.items():
        name = name.replace(old, new)
    return name


def label_logits(graph: GraphContext, pooled: Node) -> Node:
    """Logits [n, labels]."""
    return graph.linear("classifier", op.relu(graph.linear("pre_classifier", pooled)))


def vocabulary_logits(graph: GraphContext, hidden: Node) -> Node:
    """Logits [tokens, vocabulary]."""
    x = graph.activation(graph.config["hidden_act"], graph.linear("vocab_transform", hidden))
    x = graph.layer_norm("vocab_layer_norm", x, 1e-12)
    bias = graph.weight("vocab_projector.bias")
    return graph.tied_linear(x, "vocab_projector.weight", "embeddings.word_embeddings.weight", bias)
