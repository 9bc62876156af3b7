"""Qwen3 for embedding or reranking: a causal decoder whose last token is read. Source: transformers' ``qwen3``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from npu_proxy.graph.context import GraphContext
from npu_proxy.graph.decoder import DecoderAttention, decoder_keys, feed_forward, grouped_heads, is_causal
from npu_proxy.graph.inputs import attention_mask
from npu_proxy.graph.keys import Keys, Stored, activation, flag, only, size, value_error
from npu_proxy.graph.layers import linear, rms_norm
from npu_proxy.graph.nodes import Config, Node, op
from npu_proxy.graph.rotary import Rotation, layer_types, read_rotary
from npu_proxy.types import Pooling

MODEL_TYPES = ("qwen3",)

_BIDIRECTIONAL = "Qwen3BidirectionalModel"
"""The class of voyage-4-nano, which reads `use_bidirectional_attention` and projects token vectors by `linear.weight`."""


def _is_bidirectional(stored: Stored) -> bool:
    return list(stored.get("architectures") or ()) == [_BIDIRECTIONAL]


def _is_causal(stored: Stored) -> bool:
    if not _is_bidirectional(stored):  # transformers' own class ignores this key
        only("use_bidirectional_attention", False)(stored)
        return is_causal(stored)
    if not flag("use_bidirectional_attention", default=False)(stored):
        raise value_error("use_bidirectional_attention", False, f"only true for {_BIDIRECTIONAL}")
    return False


def _projected_size(stored: Stored) -> int:
    """Numbers per token vector after the projection; 0 if there is none."""
    return int(size("num_labels")(stored)) if _is_bidirectional(stored) else 0


KEYS: Keys = {
    **decoder_keys(head_width=128),
    "hidden_act": activation("hidden_act", default="silu"),
    "rotary": lambda stored: read_rotary(stored, theta=10_000.0),
    "use_sliding_window": only("use_sliding_window", False),
    "projected_size": _projected_size,
    "layer_types": lambda stored: layer_types(stored, lambda _: "full_attention", allowed=("full_attention",)),
    "causal": _is_causal,
    "tie_word_embeddings": flag("tie_word_embeddings", default=False),
}


def canonical_name(name: str) -> str:
    """The name without model prefix."""
    return name.removeprefix("model.")


def encode(graph: GraphContext) -> Node:
    """Hidden states of the last layer; see ``bert.encode``."""
    config, inputs, epsilon = graph.config, graph.inputs, graph.config["rms_norm_eps"]
    heads = grouped_heads(config, config["head_dim"] ** -0.5)
    rotate = Rotation(config["rotary"], width=heads.width, limit=config["max_length"])
    x = graph.embedding("embed_tokens", inputs.ids, "vocab_size")
    for number in range(layers := config["num_hidden_layers"]):
        layer, tokens = graph.scope(f"layers.{number}"), inputs.layer_tokens(last=number == layers - 1)
        mask = attention_mask(inputs, tokens, causal=config["causal"])
        attention = DecoderAttention(heads=heads, mask=mask, rotate=rotate, gain=_gain)
        mixed = attention(layer, rms_norm(_gain(layer, "input_layernorm"), x, epsilon), tokens)
        x = op.add(layer.residual(x, tokens, config["hidden_size"]), mixed)
        normed = rms_norm(_gain(layer, "post_attention_layernorm"), x, epsilon)
        x = op.add(x, feed_forward(layer, normed, config["hidden_act"]))
    x = rms_norm(_gain(graph, "norm"), x, epsilon)
    return graph.linear("linear", x, "projected_size", bias=False) if config["projected_size"] else x


def label_logits(graph: GraphContext, pooled: Node) -> Node:
    """Logits [n, labels]."""
    return linear(pooled, graph.weight("score.weight"))


def classifier_pooling(config: Config) -> Pooling:
    """The pooling that ``label_logits`` expects."""
    return Pooling.LAST_TOKEN


def vocabulary_logits(graph: GraphContext, hidden: Node) -> Node:
    """Logits [tokens, vocabulary] of the next token."""
    return graph.tied_linear(hidden, "lm_head.weight", "embed_tokens.weight", None)


def _gain(graph: GraphContext, name: str) -> npt.NDArray[np.float32]:
    return graph.weight(f"{name}.weight")
