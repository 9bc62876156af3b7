"""Gemma 3 text models for embedding (EmbeddingGemma): bidirectional attention, limited to a window in most layers.

Source: Vera et al. 2025; transformers' ``gemma3_text`` for tensor names.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from npu_proxy.errors import ModelError
from npu_proxy.graph.context import GraphContext
from npu_proxy.graph.decoder import DecoderAttention, decoder_keys, feed_forward, grouped_heads, is_causal
from npu_proxy.graph.inputs import attention_mask
from npu_proxy.graph.keys import Keys, Stored, absent, activation, flag, real, size, value_error
from npu_proxy.graph.layers import linear, rms_norm
from npu_proxy.graph.nodes import Config, Node, constant, op
from npu_proxy.graph.rotary import RotaryConfig, Rotation, layer_types, read_rotary
from npu_proxy.types import Pooling

MODEL_TYPES = ("gemma3_text",)
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"


def _layer_types(stored: Stored) -> Sequence[str]:
    """The attention type of each layer: local or global."""
    every: int = size("sliding_window_pattern", default=6)(stored)
    return layer_types(stored, lambda number: _LOCAL if (number + 1) % every else _GLOBAL)


def _rotations(stored: Stored) -> dict[str, RotaryConfig]:
    return {
        _LOCAL: read_rotary(stored, "rope_local_base_freq", theta=10_000.0, layer_type=_LOCAL),
        _GLOBAL: read_rotary(stored, "rope_theta", theta=1_000_000.0, layer_type=_GLOBAL),
    }


def _bidirectional(stored: Stored) -> bool:
    return bool(flag("use_bidirectional_attention", default=False)(stored))


def _window(stored: Stored) -> int:
    """Tokens that are at most this far away are seen in local layers. `use_bidirectional_attention` halves the window."""
    if "sliding_window" in stored and stored["sliding_window"] is None:
        raise value_error("sliding_window", None, "only numbers")
    window: int = size("sliding_window", default=4096)(stored)
    if _bidirectional(stored):
        return window // 2 + (not is_causal(stored))
    return window - 1 if is_causal(stored) else window


KEYS: Keys = {
    **decoder_keys(head_width=256),
    "hidden_activation": activation("hidden_activation", default="gelu_pytorch_tanh"),
    "query_pre_attn_scalar": real("query_pre_attn_scalar", default=256),
    "layer_types": _layer_types,
    "rotary": _rotations,
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
    "attn_logit_softcapping": absent("attn_logit_softcapping"),
    "causal": lambda stored: is_causal(stored) and not _bidirectional(stored),
    "window": _window,
}


def canonical_name(name: str) -> str:
    """The name without model prefix."""
    return name.removeprefix("model.")


def encode(graph: GraphContext) -> Node:
    """Hidden states of the last layer; see ``bert.encode``."""
    config, inputs, width = graph.config, graph.inputs, graph.config["hidden_size"]
    heads = grouped_heads(config, config["query_pre_attn_scalar"] ** -0.5)
    causal, window = config["causal"], config["window"]
    types, rotary = config["layer_types"], config["rotary"]
    rotations = {kind: Rotation(rotary[kind], width=heads.width, limit=config["max_length"]) for kind in dict.fromkeys(types)}
    words = graph.embedding("embed_tokens", inputs.ids, "vocab_size")
    x = op.multiply(words, constant(np.float32(width**0.5)))
    for number, layer_type in enumerate(types):
        layer, tokens = graph.scope(f"layers.{number}"), inputs.layer_tokens(last=number == len(types) - 1)
        mask = attention_mask(inputs, tokens, causal=causal, window=window if layer_type == _LOCAL else None)
        attention = DecoderAttention(heads=heads, mask=mask, rotate=rotations[layer_type], gain=_gain)
        mixed = attention(layer, _norm(layer, "input_layernorm", x), tokens)
        x = op.add(layer.residual(x, tokens, width), _norm(layer, "post_attention_layernorm", mixed))
        inner = feed_forward(layer, _norm(layer, "pre_feedforward_layernorm", x), config["hidden_activation"])
        x = op.add(x, _norm(layer, "post_feedforward_layernorm", inner))
    return _norm(graph, "norm", x)


def label_logits(graph: GraphContext, pooled: Node) -> Node:
    """Logits [n, labels]."""
    return linear(pooled, graph.weight("score.weight"))


def classifier_pooling(config: Config) -> Pooling:
    """The pooling that ``label_logits`` expects."""
    return Pooling.LAST_TOKEN


def vocabulary_logits(graph: GraphContext, hidden: Node) -> Node:
    """Raise ModelError: there is no masked language model of this architecture."""
    raise ModelError("config.json: gemma3_text has no masked language model")


def _gain(graph: GraphContext, name: str) -> npt.NDArray[np.float32]:
    return graph.weight(f"{name}.weight") + np.float32(1)


def _norm(graph: GraphContext, name: str, x: Node) -> Node:
    return rms_norm(_gain(graph, name), x, graph.config["rms_norm_eps"])
