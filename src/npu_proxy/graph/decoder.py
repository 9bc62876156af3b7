"""What decoders have in common (qwen3.py, gemma3.py): grouped attention with normalized heads, and gated feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npu_proxy.graph.context import GraphContext
from npu_proxy.graph.inputs import LayerTokens
from npu_proxy.graph.layers import Heads, Transform, rms_norm
from npu_proxy.graph.nodes import Config, Node, op
from npu_proxy.graph.rotary import Rotation

Gain = Callable[[GraphContext, str], npt.NDArray[np.float32]]
"""The gain [width] of the norm of that name."""


@dataclass(frozen=True, kw_only=True)
class DecoderAttention:
    """Attention of a decoder layer: heads, mask, rotation, and the gains of the norms of queries and keys."""

    heads: Heads
    mask: Node
    rotate: Rotation
    gain: Gain

    def __call__(self, layer: GraphContext, x: Node, tokens: LayerTokens) -> Node:
        """Self-attention of normalized ``x`` [tokens, width], computed for ``tokens`` -> [those tokens, width]."""
        scope, biased = layer.scope("self_attn"), layer.config.get("attention_bias", False)
        fused = scope.fused([f"{part}_proj" for part in "qkv"], bias=biased)

        def transform(part: str) -> Transform:
            gain = self.gain(scope, f"{part}_norm")
            return lambda x, tokens: self.rotate(rms_norm(gain, x, layer.config["rms_norm_eps"]), tokens)

        attended = scope.attend(x, tokens, fused, self.heads, self.mask, transform("q"), transform("k"))
        return scope.linear("o_proj", attended, bias=biased)


def grouped_heads(config: Config, scale: float) -> Heads:
    """Grouped heads as config.json describes them."""
    return Heads(count=config["num_attention_heads"], width=config["head_dim"], scale=scale, shared=config["num_key_value_heads"])


def feed_forward(layer: GraphContext, x: Node, activation: str) -> Node:
    """``down(act(gate x) * up x)`` [n, width]."""
    mlp = layer.scope("mlp")
    gate = layer.activation(activation, mlp.linear("gate_proj", x, bias=False))
    inner = op.multiply(gate, mlp.linear("up_proj", x, bias=False))
    return mlp.linear("down_proj", inner, bias=False)
