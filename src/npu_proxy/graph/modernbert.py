"""ModernBERT: pre-norm layers, rotary positions, gated feed-forward, attention limited to a window in most layers.

Source: Warner et al. 2024; transformers' ``modernbert`` for tensor names.
"""

from __future__ import annotations

from collections.abc import Sequence

from npu_proxy.graph.context import GraphContext
from npu_proxy.graph.inputs import LayerTokens, attention_mask
from npu_proxy.graph.keys import Keys, Stored, activation, flag, model_sizes, one_of, only, real, size, value_error
from npu_proxy.graph.layers import Heads
from npu_proxy.graph.nodes import Config, Node, op
from npu_proxy.graph.rotary import RotaryConfig, Rotation, layer_types, read_rotary
from npu_proxy.types import Pooling

MODEL_TYPES = ("modernbert",)
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
_THETAS = {"full_attention": 160_000.0, _LOCAL: 10_000.0}
_THETA_KEYS = {_GLOBAL: "global_rope_theta", _LOCAL: "local_rope_theta"}


def _layer_types(stored: Stored) -> Sequence[str]:
    """The attention type of each layer: local or global."""
    every: int = size("global_attn_every_n_layers", default=3)(stored)
    return layer_types(stored, lambda number: _LOCAL if number % every else _GLOBAL)


def _rotations(stored: Stored) -> dict[str, RotaryConfig]:
    if "local_rope_theta" in stored and stored["local_rope_theta"] is None:
        raise value_error("local_rope_theta", None, "only numbers; what null means has changed between releases")
    return {kind: read_rotary(stored, _THETA_KEYS[kind], theta=theta, layer_type=kind) for kind, theta in _THETAS.items()}


KEYS: Keys = {
    **model_sizes(),
    "hidden_activation": activation("hidden_activation"),
    "norm_eps": real("norm_eps", default=1e-5),
    "norm_bias": flag("norm_bias", default=False),
    "attention_bias": flag("attention_bias", default=False),
    "mlp_bias": flag("mlp_bias", default=False),
    "local_attention": size("local_attention", default=128),
    "layer_types": _layer_types,
    "rotary": _rotations,
    "classifier_pooling": one_of("classifier_pooling", values=("cls", "mean"), default="cls"),
    "classifier_activation": activation("classifier_activation"),
    "classifier_bias": flag("classifier_bias", default=False),
    "is_causal": only("is_causal", False),
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
    "decoder_bias": flag("decoder_bias", default=True),
}


def canonical_name(name: str) -> str:
    """The name without model prefix."""
    return name.removeprefix("model.")


def encode(graph: GraphContext) -> Node:
    """Hidden states of the last layer; see ``bert.encode``."""
    config, inputs = graph.config, graph.inputs
    types, rotary = config["layer_types"], config["rotary"]
    head_width = config["hidden_size"] // config["num_attention_heads"]
    rotations = {kind: Rotation(rotary[kind], width=head_width, limit=config["max_length"]) for kind in dict.fromkeys(types)}
    x = _norm(graph, "embeddings.norm", graph.embedding("embeddings.tok_embeddings", inputs.ids, "vocab_size"))
    for number, layer_type in enumerate(types):
        tokens = inputs.layer_tokens(last=number == len(types) - 1)
        window = config["local_attention"] // 2 if layer_type == _LOCAL else None
        mask = attention_mask(inputs, tokens, window=window)
        layer = graph.scope(f"layers.{number}")
        normed = _norm(layer, "attn_norm", x) if number else x
        x = _layer(layer, x, normed, tokens, mask, rotations[layer_type])
    return _norm(graph, "final_norm", x)


def label_logits(graph: GraphContext, pooled: Node) -> Node:
    """Logits [n, labels]."""
    return graph.linear("classifier", _head(graph, pooled))


def classifier_pooling(config: Config) -> Pooling:
    """The pooling that ``label_logits`` expects."""
    return Pooling.MEAN if config["classifier_pooling"] == "mean" else Pooling.CLS


def vocabulary_logits(graph: GraphContext, hidden: Node) -> Node:
    """Logits [tokens, vocabulary]."""
    bias = graph.weight("decoder.bias") if graph.config["decoder_bias"] else None
    return graph.tied_linear(_head(graph, hidden), "decoder.weight", "embeddings.tok_embeddings.weight", bias)


def _head(graph: GraphContext, x: Node) -> Node:
    inner = graph.linear("head.dense", x, bias=graph.config["classifier_bias"])
    return _norm(graph, "head.norm", graph.activation(graph.config["classifier_activation"], inner))


def _layer(layer: GraphContext, x: Node, normed: Node, tokens: LayerTokens, mask: Node, rotate: Rotation) -> Node:
    config = layer.config
    width, count = config["hidden_size"], config["num_attention_heads"]
    biased = config["attention_bias"]
    fused = layer.stored_fused("attn.Wqkv", 3, "hidden_size", bias=biased)
    attended = layer.attend(normed, tokens, fused, Heads.of(count, width // count), mask, rotate)
    mixed = layer.linear("attn.Wo", attended, bias=biased)
    x = op.add(layer.residual(x, tokens, width), mixed)
    biased = config["mlp_bias"]
    activated, gate = layer.stored_fused("mlp.Wi", 2, "intermediate_size", bias=biased)(_norm(layer, "mlp_norm", x))
    inner = op.multiply(layer.activation(config["hidden_activation"], activated), gate)
    return op.add(x, layer.linear("mlp.Wo", inner, bias=biased))


def _norm(graph: GraphContext, name: str, x: Node) -> Node:
    config = graph.config
    return graph.layer_norm(name, x, config["norm_eps"], bias=config["norm_bias"])
