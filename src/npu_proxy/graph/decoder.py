"""What decoders that embed have in common (qwen3.py, gemma3.py): grouped attention with normed heads, and a gated feed-forward."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from openvino import opset15 as op

from npu_proxy.graph.bert import Config
from npu_proxy.graph.layers import (
    ACTIVATIONS,
    Rotation,
    attend,
    dense,
    kernels,
    merge_heads,
    project,
    rms_norm,
    share_heads,
    split_heads,
)
from npu_proxy.graph.packed import Node, RowInputs, Rows, Style, Weights

Gain = Callable[[str], np.ndarray]
"""The gain [width] of the norm of that name."""


def attention(
    config: Config,
    weights: Weights,
    layer: str,
    x: Node,
    inputs: RowInputs,
    rows: Rows,
    mask: Node,
    rotate: Rotation,
    scale: float,
    gain: Gain,
    style: Style,
) -> Node:
    """Self-attention of normed tokens ``x`` [tokens, width] for ``rows`` -> [rows, width]."""
    heads, shared, head_width = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    epsilon, own = config["rms_norm_eps"], f"{layer}self_attn."
    biased = config.get("attention_bias", False)
    query, key, value = project(x, rows, inputs, kernels(weights, [f"{own}{part}_proj" for part in "qkv"], bias=biased))
    query = rms_norm(gain(f"{own}q_norm"), split_heads(query, rows.grid, heads, head_width), epsilon)
    key = rms_norm(gain(f"{own}k_norm"), split_heads(key, inputs.every.grid, shared, head_width), epsilon)
    value = split_heads(value, inputs.every.grid, shared, head_width)
    attended = attend(
        rotate(query, rows),
        share_heads(rotate(key, inputs.every), heads, shared),
        share_heads(value, heads, shared),
        mask,
        scale,
        style,
    )
    return dense(weights, f"{own}o_proj", merge_heads(attended, rows.flat, heads * head_width), bias=biased)


def feed_forward(config: Config, weights: Weights, layer: str, x: Node, activation: str, style: Style) -> Node:
    """``down(act(gate x) * up x)`` [n, width]."""
    gate = ACTIVATIONS[activation](dense(weights, f"{layer}mlp.gate_proj", x, bias=False), style)
    inner = op.multiply(gate, dense(weights, f"{layer}mlp.up_proj", x, bias=False))
    return dense(weights, f"{layer}mlp.down_proj", inner, bias=False)
