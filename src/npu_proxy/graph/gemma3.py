"""Gemma 3 text models as embedders (EmbeddingGemma): attention to both sides, within a window in most layers.

Source: Vera et al. 2025; transformers' ``gemma3_text`` for tensor names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from openvino import opset15 as op

from npu_proxy.errors import ModelError
from npu_proxy.graph.bert import Config
from npu_proxy.graph.decoder import Seen, attention, feed_forward, heads_of
from npu_proxy.graph.layers import Rotation, check_activation, linear, rms_norm, rotary
from npu_proxy.graph.packed import Node, RowInputs, Style, Weights, attention_mask, constant, integers
from npu_proxy.types import Pooling

MODEL_TYPES = ("gemma3_text",)
_LOCAL = "sliding_attention"


def standard(config: Config) -> Config:
    """What transformers takes for granted, written out."""
    activation = config.get("hidden_activation") or "gelu_pytorch_tanh"
    return {"rms_norm_eps": 1e-6, "head_dim": 256, "query_pre_attn_scalar": 256, **config, "hidden_activation": activation}


def canonical_name(name: str) -> str:
    """No model prefix."""
    return name.removeprefix("model.")


def check(config: Config) -> None:
    """Refuse what this file would compute wrongly. Raises ModelError."""
    check_activation(config, "hidden_activation")
    if config.get("attn_logit_softcapping"):
        raise ModelError("config.json: attn_logit_softcapping is not supported")


def encode(config: Config, weights: Weights, inputs: RowInputs, style: Style) -> Node:
    """As bert.encode."""
    width, epsilon = config["hidden_size"], config["rms_norm_eps"]
    heads = heads_of(config, config["query_pre_attn_scalar"] ** -0.5)
    both_sides = bool(config.get("use_bidirectional_attention"))
    window = int(config.get("sliding_window") or 4096)
    window = window // 2 if both_sides else window - 1
    kinds = _kinds(config)
    rotations = {kind: _rotation(config, kind, heads.width) for kind in dict.fromkeys(kinds)}

    def gain(name: str) -> Any:
        return weights[f"{name}.weight"] + np.float32(1)

    def norm(name: str, x: Node) -> Node:
        return rms_norm(gain(name), x, epsilon)

    words = op.gather(constant(weights["embed_tokens.weight"]), inputs.ids, integers(0))
    x = op.multiply(words, constant(np.float32(width**0.5)))
    for number, kind in enumerate(kinds):
        layer, rows = f"layers.{number}.", inputs.rows(last=number == len(kinds) - 1)
        mask = attention_mask(inputs, rows, causal=not both_sides, window=window if kind == _LOCAL else None)
        seen = Seen(mask=mask, rotate=rotations[kind], gain=gain, style=style)
        mixed = attention(config, weights, layer, norm(f"{layer}input_layernorm", x), inputs, rows, heads, seen)
        x = op.add(rows.take(x, inputs.every.grid, width), norm(f"{layer}post_attention_layernorm", mixed))
        normed = norm(f"{layer}pre_feedforward_layernorm", x)
        inner = feed_forward(config, weights, layer, normed, config["hidden_activation"], style)
        x = op.add(x, norm(f"{layer}post_feedforward_layernorm", inner))
    return norm("norm", x)


def scores(config: Config, weights: Weights, pooled: Node, style: Style) -> Node:
    """Logits [n, labels]."""
    return linear(pooled, weights["score.weight"])


def scores_pooling(config: Config) -> Pooling:
    """What ``scores`` wants to be pooled."""
    return Pooling.LAST_TOKEN


def vocabulary(config: Config, weights: Weights, hidden: Node, style: Style) -> Node:
    """No masked language model has this form. Raises ModelError."""
    raise ModelError("config.json: gemma3_text has no masked language model")


def _kinds(config: Config) -> Sequence[str]:
    """Of each layer, whether its attention is local or global."""
    if config.get("layer_types"):
        return config["layer_types"]
    every = config.get("_sliding_window_pattern", config.get("sliding_window_pattern", 6))
    return [_LOCAL if (number + 1) % every else "full_attention" for number in range(config["num_hidden_layers"])]


def _rotation(config: Config, kind: str, width: int) -> Rotation:
    parameters: dict[str, Any] = (config.get("rope_parameters") or {}).get(kind) or {}
    if kind == _LOCAL:
        theta = config.get("rope_local_base_freq", 10_000.0)
    else:
        theta = config.get("rope_theta", 1_000_000.0)
        parameters = {**(config.get("rope_scaling") or {}), **parameters}
    return rotary({"max_length": config["max_length"], "rope_parameters": parameters}, width=width, theta=theta)
