"""What decoders have in common (qwen3.py, gemma3.py): grouped attention with normalized heads, and gated feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npu_proxy.graph.context import GraphContext
from npu_proxy.graph.inputs import LayerTokens
from npu_proxy.graph.keys import Keys, Stored, flag, model_sizes, real, size, value_error
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
        scope, biased, heads = layer.scope("self_attn"), layer.config["attention_bias"], self.heads
        keys = ["num_attention_heads", "num_key_value_heads", "num_key_value_heads"]
        fused = scope.fused([f"{part}_proj" for part in "qkv"], keys, width=heads.width, bias=biased)

        def transform(part: str) -> Transform:
            gain = self.gain(scope, f"{part}_norm")
            return lambda x, tokens: self.rotate(rms_norm(gain, x, layer.config["rms_norm_eps"]), tokens)

        attended = scope.attend(x, tokens, fused, heads, self.mask, transform("q"), transform("k"))
        return scope.linear("o_proj", attended, bias=biased)


def decoder_keys(*, head_width: int) -> Keys:
    """The keys that decoders share. head_width: transformers' default of ``head_dim``."""
    return {
        **model_sizes(),
        "num_attention_heads": size("num_attention_heads"),  # `head_dim` is stated
        "num_key_value_heads": lambda stored: size("num_key_value_heads", default=stored.get("num_attention_heads"))(stored),
        "head_dim": size("head_dim", default=head_width),
        "rms_norm_eps": real("rms_norm_eps", default=1e-6),
        "attention_bias": flag("attention_bias", default=False),
        "is_causal": is_causal,
    }


def is_causal(stored: Stored) -> bool:
    """Whether tokens attend to earlier tokens only, according to the key that all decoders of transformers obey."""
    if "is_causal" in stored and stored["is_causal"] is None:
        raise value_error("is_causal", None, "only true and false; what null does depends on the batch")
    return bool(flag("is_causal", default=True)(stored))


def grouped_heads(config: Config, scale: float) -> Heads:
    """Grouped heads as config.json describes them."""
    return Heads(count=config["num_attention_heads"], width=config["head_dim"], scale=scale, shared=config["num_key_value_heads"])


def feed_forward(layer: GraphContext, x: Node, activation: str) -> Node:
    """``down(act(gate x) * up x)`` [n, width]."""
    mlp = layer.scope("mlp")
    gate = layer.activation(activation, mlp.linear("gate_proj", x, "intermediate_size", bias=False))
    inner = op.multiply(gate, mlp.linear("up_proj", x, "intermediate_size", bias=False))
    return mlp.linear("down_proj", inner, bias=False)
