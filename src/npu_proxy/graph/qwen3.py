"""Qwen3 for embedding or reranking: a causal decoder whose last token is read. Source: transformers' ``qwen3``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from npu_proxy.errors import ModelError
from npu_proxy.graph.activations import check_activation
from npu_proxy.graph.context import GraphContext
from npu_proxy.graph.decoder import DecoderAttention, feed_forward, grouped_heads
from npu_proxy.graph.inputs import attention_mask
from npu_proxy.graph.layers import linear, rms_norm
from npu_proxy.graph.nodes import Config, Node, op
from npu_proxy.graph.rotary import rotary
from npu_proxy.types import Pooling

MODEL_TYPES = ("qwen3",)


def normalize_config(config: Config) -> Config:
    """config.json with transformers' defaults filled in."""
    heads = config["num_attention_heads"]
    return {"rms_norm_eps": 1e-6, "head_dim": 128, "num_key_value_heads": heads, "hidden_act": "silu", **config}


def canonical_name(name: str) -> str:
    """The name without model prefix."""
    return name.removeprefix("model.")


def check_config(config: Config) -> None:
    """Raise ModelError for a config that this file would compute wrongly."""
    check_activation(config, "hidden_act", "silu")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise ModelError("config.json: a sliding window is not supported for qwen3")


def encode(graph: GraphContext) -> Node:
    """Hidden states of the last layer; see ``bert.encode``."""
    config, inputs, epsilon = graph.config, graph.inputs, graph.config["rms_norm_eps"]
    heads = grouped_heads(config, config["head_dim"] ** -0.5)
    rotate = rotary(config, width=heads.width, theta=1_000_000.0)
    x = graph.embedding("embed_tokens", inputs.ids)
    for number in range(layers := config["num_hidden_layers"]):
        layer, tokens = graph.scope(f"layers.{number}"), inputs.layer_tokens(last=number == layers - 1)
        mask = attention_mask(inputs, tokens, causal=True)
        attention = DecoderAttention(heads=heads, mask=mask, rotate=rotate, gain=_gain)
        mixed = attention(layer, rms_norm(_gain(layer, "input_layernorm"), x, epsilon), tokens)
        x = op.add(layer.residual(x, tokens, config["hidden_size"]), mixed)
        normed = rms_norm(_gain(layer, "post_attention_layernorm"), x, epsilon)
        x = op.add(x, feed_forward(layer, normed, config["hidden_act"]))
    return rms_norm(_gain(graph, "norm"), x, epsilon)


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
