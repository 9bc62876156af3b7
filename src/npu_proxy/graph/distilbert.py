"""DistilBERT: BERT's layers with other names and without token types. Source: Sanh et al. 2019; transformers' ``distilbert``."""

from __future__ import annotations

from npu_proxy.graph.bert import classifier_pooling, encode
from npu_proxy.graph.context import GraphContext
from npu_proxy.graph.keys import Keys, activation, flag, heads_of, only, size
from npu_proxy.graph.nodes import Node, op

__all__ = [
    "KEYS",
    "MODEL_TYPES",
    "canonical_name",
    "classifier_pooling",
    "encode",
    "label_logits",
    "vocabulary_logits",
]

MODEL_TYPES = ("distilbert",)

KEYS: Keys = {
    "vocab_size": size("vocab_size"),
    "hidden_size": size("dim", "hidden_size"),
    "num_hidden_layers": size("n_layers", "num_hidden_layers"),
    "num_attention_heads": heads_of("dim", "n_heads", "num_attention_heads"),
    "intermediate_size": size("hidden_dim"),
    "max_position_embeddings": size("max_position_embeddings"),
    "type_vocab_size": lambda _: 0,
    "hidden_act": activation("activation"),
    "layer_norm_eps": lambda _: 1e-12,
    "is_causal": only("is_causal", False),
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
    "sinusoidal_pos_embds": flag("sinusoidal_pos_embds", default=False),  # the checkpoint stores the table anyway
}

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
