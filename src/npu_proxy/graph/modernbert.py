"""ModernBERT: pre-norm layers, rotary positions, gated feed-forward, attention limited to a window in most layers.

Source: Warner et al. 2024; transformers' ``modernbert`` for tensor names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from npu_proxy.graph.activations import check_activation
from npu_proxy.graph.context import GraphContext
from npu_proxy.graph.inputs import LayerTokens, attention_mask
from npu_proxy.graph.layers import Heads
from npu_proxy.graph.nodes import Config, Node, op
from npu_proxy.graph.rotary import Rotation, rotary
from npu_proxy.types import Pooling

MODEL_TYPES = ("modernbert",)
_LOCAL = "sliding_attention"
_THETAS = {"full_attention": 160_000.0, _LOCAL: 10_000.0}
_THETA_KEYS = {"full_attention": "global_rope_theta", _LOCAL: "local_rope_theta"}


def normalize_config(config: Config) -> Config:
    """Return config.json unchanged."""
    return config


def canonical_name(name: str) -> str:
    """The name without model prefix."""
    return name.removeprefix("model.")


def check_config(config: Config) -> None:
    """Raise ModelError for a config that this file would compute wrongly."""
    check_activation(config, "hidden_activation")
    check_activation(config, "classifier_activation")


def encode(graph: GraphContext) -> Node:
    """Hidden states of the last layer; see ``bert.encode``."""
    config, inputs = graph.config, graph.inputs
    layer_types = _layer_types(config)
    head_width = config["hidden_size"] // config["num_attention_heads"]
    rotations = {layer_type: _rotation(config, layer_type, head_width) for layer_type in dict.fromkeys(layer_types)}
    x = _norm(graph, "embeddings.norm", graph.embedding("embeddings.tok_embeddings", inputs.ids))
    for number, layer_type in enumerate(layer_types):
        tokens = inputs.layer_tokens(last=number == len(layer_types) - 1)
        window = int(config.get("local_attention", 128)) // 2 if layer_type == _LOCAL else None
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
    return Pooling.MEAN if config.get("classifier_pooling", "cls") == "mean" else Pooling.CLS


def vocabulary_logits(graph: GraphContext, hidden: Node) -> Node:
    """Logits [tokens, vocabulary]."""
    bias = graph.weight("decoder.bias") if graph.config.get("decoder_bias", True) else None
    return graph.tied_linear(_head(graph, hidden), "decoder.weight", "embeddings.tok_embeddings.weight", bias)


def _layer_types(config: Config) -> Sequence[str]:
    """The attention type of each layer: local or global."""
    if config.get("layer_types"):
        return config["layer_types"]
    every = config.get("global_attn_every_n_layers", 3)
    return [_LOCAL if number % every else "full_attention" for number in range(config["num_hidden_layers"])]


def _rotation(config: Config, layer_type: str, width: int) -> Rotation:
    parameters: dict[str, Any] = (config.get("rope_parameters") or {}).get(layer_type) or {}
    theta = parameters.get("rope_theta") or config.get(_THETA_KEYS[layer_type]) or _THETAS[layer_type]
    return rotary({"max_length": config["max_length"], "rope_parameters": parameters}, width=width, theta=theta)


def _head(graph: GraphContext, x: Node) -> Node:
    inner = graph.linear("head.dense", x, bias=graph.config.get("classifier_bias", False))
    return _norm(graph, "head.norm", graph.activation(graph.config.get("classifier_activation", "gelu"), inner))


def _layer(layer: GraphContext, x: Node, normed: Node, tokens: LayerTokens, mask: Node, rotate: Rotation) -> Node:
    config = layer.config
    width, count = config["hidden_size"], config["num_attention_heads"]
    biased = config.get("attention_bias", False)
    fused = layer.stored_fused("attn.Wqkv", 3, bias=biased)
    attended = layer.attend(normed, tokens, fused, Heads.of(count, width // count), mask, rotate)
    mixed = layer.linear("attn.Wo", attended, bias=biased)
    x = op.add(layer.residual(x, tokens, width), mixed)
    biased = config.get("mlp_bias", False)
    activated, gate = layer.stored_fused("mlp.Wi", 2, bias=biased)(_norm(layer, "mlp_norm", x))
    inner = op.multiply(layer.activation(config.get("hidden_activation", "gelu"), activated), gate)
    return op.add(x, layer.linear("mlp.Wo", inner, bias=biased))


def _norm(graph: GraphContext, name: str, x: Node) -> Node:
    config = graph.config
    return graph.layer_norm(name, x, config.get("norm_eps", 1e-5), bias=config.get("norm_bias", False))
