"""What decoders that embed have in common (qwen3.py, gemma3.py): grouped attention with normed heads, and a gated feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from openvino import opset15 as op

from npu_proxy.graph.bert import Config
from npu_proxy.graph.layers import ACTIVATIONS, Heads, Rotation, Turn, dense, joint, rms_norm, self_attention
from npu_proxy.graph.packed import Node, RowInputs, Rows, Style, Weights

Gain = Callable[[str], npt.NDArray[np.float32]]
"""The gain [width] of the norm of that name."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a layer's attention sees, and how: mask, rotation, gains of norms, style."""

    mask: Node
    rotate: Rotation
    gain: Gain
    style: Style


def attention(
    config: Config, weights: Weights, layer: str, x: Node, inputs: RowInputs, rows: Rows, heads: Heads, seen: Seen
) -> Node:
    """Self-attention of normed tokens ``x`` [tokens, width] for ``rows`` -> [rows, width]."""
    own, biased = f"{layer}self_attn.", config.get("attention_bias", False)
    parts = joint(weights, [f"{own}{part}_proj" for part in "qkv"], bias=biased)

    def turn(part: str) -> Turn:
        gain = seen.gain(f"{own}{part}_norm")
        return lambda x, rows: seen.rotate(rms_norm(gain, x, config["rms_norm_eps"]), rows)

    attended = self_attention(x, rows, inputs, parts, heads, seen.mask, seen.style, turn("q"), turn("k"))
    return dense(weights, f"{own}o_proj", attended, bias=biased)


def heads_of(config: Config, scale: float) -> Heads:
    """Grouped heads, as config.json has them."""
    return Heads(count=config["num_attention_heads"], width=config["head_dim"], scale=scale, shared=config["num_key_value_heads"])


def feed_forward(config: Config, weights: Weights, layer: str, x: Node, activation: str, style: Style) -> Node:
    """``down(act(gate x) * up x)`` [n, width]."""
    gate = ACTIVATIONS[activation](dense(weights, f"{layer}mlp.gate_proj", x, bias=False), style)
    inner = op.multiply(gate, dense(weights, f"{layer}mlp.up_proj", x, bias=False))
    return dense(weights, f"{layer}mlp.down_proj", inner, bias=False)
