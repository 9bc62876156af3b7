"""ModernBERT: pre-norm layers, rotary positions, gated feed-forward, attention within a window in most layers.

Source: Warner et al. 2024; transformers' ``modernbert`` for tensor names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from openvino import opset15 as op

from npu_proxy.graph.bert import Config
from npu_proxy.graph.layers import (
    ACTIVATIONS,
    Heads,
    Rotation,
    check_activation,
    dense,
    joint,
    layer_norm,
    linear,
    rotary,
    self_attention,
)
from npu_proxy.graph.packed import Node, RowInputs, Rows, Style, Weights, attention_mask, constant, integers
from npu_proxy.types import Pooling

MODEL_TYPES = ("modernbert",)
_LOCAL = "sliding_attention"
_THETAS = {"full_attention": 160_000.0, _LOCAL: 10_000.0}
_OLD_THETAS = {"full_attention": "global_rope_theta", _LOCAL: "local_rope_theta"}


def standard(config: Config) -> Config:
    """As it stands."""
    return config


def canonical_name(name: str) -> str:
    """No model prefix."""
    return name.removeprefix("model.")


def check(config: Config) -> None:
    """Refuse what this file would compute wrongly. Raises ModelError."""
    check_activation(config, "hidden_activation")
    check_activation(config, "classifier_activation")


def encode(config: Config, weights: Weights, inputs: RowInputs, style: Style) -> Node:
    """As bert.encode."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    kinds = _kinds(config)
    rotations = {kind: _rotation(config, kind, width // heads) for kind in dict.fromkeys(kinds)}
    x = op.gather(constant(weights["embeddings.tok_embeddings.weight"]), inputs.ids, integers(0))
    x = _norm(config, weights, "embeddings.norm", x)
    for number, kind in enumerate(kinds):
        rows = inputs.rows(last=number == len(kinds) - 1)
        mask = attention_mask(inputs, rows, window=int(config.get("local_attention", 128)) // 2 if kind == _LOCAL else None)
        x = _layer(config, weights, f"layers.{number}.", x, inputs, rows, mask, rotations[kind], style)
    return _norm(config, weights, "final_norm", x)


def scores(config: Config, weights: Weights, pooled: Node, style: Style) -> Node:
    """Logits [n, labels]."""
    return dense(weights, "classifier", _head(config, weights, pooled, style))


def scores_pooling(config: Config) -> Pooling:
    """What ``scores`` wants to be pooled."""
    return Pooling.MEAN if config.get("classifier_pooling", "cls") == "mean" else Pooling.CLS


def vocabulary(config: Config, weights: Weights, hidden: Node, style: Style) -> Node:
    """Logits [tokens, vocabulary]."""
    stored, tied = "decoder.weight", "embeddings.tok_embeddings.weight"
    bias = weights["decoder.bias"] if config.get("decoder_bias", True) else None
    return linear(_head(config, weights, hidden, style), weights[stored if stored in weights else tied], bias)


def _kinds(config: Config) -> Sequence[str]:
    """Of each layer, whether its attention is local or global."""
    if config.get("layer_types"):
        return config["layer_types"]
    every = config.get("global_attn_every_n_layers", 3)
    return [_LOCAL if number % every else "full_attention" for number in range(config["num_hidden_layers"])]


def _rotation(config: Config, kind: str, width: int) -> Rotation:
    parameters: dict[str, Any] = (config.get("rope_parameters") or {}).get(kind) or {}
    theta = parameters.get("rope_theta") or config.get(_OLD_THETAS[kind]) or _THETAS[kind]
    return rotary({"max_length": config["max_length"], "rope_parameters": parameters}, width=width, theta=theta)


def _head(config: Config, weights: Weights, x: Node, style: Style) -> Node:
    inner = dense(weights, "head.dense", x, bias=config.get("classifier_bias", False))
    return _norm(config, weights, "head.norm", ACTIVATIONS[config.get("classifier_activation", "gelu")](inner, style))


def _layer(
    config: Config, weights: Weights, layer: str, x: Node, inputs: RowInputs, rows: Rows, mask: Node, rotate: Rotation, style: Style
) -> Node:
    width, count = config["hidden_size"], config["num_attention_heads"]
    biased = config.get("attention_bias", False)
    normed = x if layer == "layers.0." else _norm(config, weights, f"{layer}attn_norm", x)
    parts = joint(weights, ["query", "key", "value"], f"{layer}attn.Wqkv", bias=biased)
    attended = self_attention(normed, rows, inputs, parts, Heads.of(count, width // count), mask, style, rotate)
    mixed = dense(weights, f"{layer}attn.Wo", attended, bias=biased)
    x = op.add(rows.take(x, inputs.every.grid, width), mixed)
    biased = config.get("mlp_bias", False)
    given, gate = joint(weights, ["given", "gate"], f"{layer}mlp.Wi", bias=biased)(_norm(config, weights, f"{layer}mlp_norm", x))
    inner = op.multiply(ACTIVATIONS[config.get("hidden_activation", "gelu")](given, style), gate)
    return op.add(x, dense(weights, f"{layer}mlp.Wo", inner, bias=biased))


def _norm(config: Config, weights: Weights, name: str, x: Node) -> Node:
    return layer_norm(weights, name, x, config.get("norm_eps", 1e-5), bias=config.get("norm_bias", False))
