"""Gemma 3 text models for embedding (EmbeddingGemma): bidirectional attention, limited to a window in most layers.

Source: Vera et al. 2025; transformers' ``gemma3_text`` for tensor names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from npu_proxy.errors import ModelError
from npu_proxy.graph.activations import check_activation
from npu_proxy.graph.context import GraphContext
from npu_proxy.graph.decoder import DecoderAttention, feed_forward, grouped_heads
from npu_proxy.graph.inputs import attention_mask
from npu_proxy.graph.layers import linear, rms_norm
from npu_proxy.graph.nodes import Config, Node, constant, op
from npu_proxy.graph.rotary import Rotation, rotary
from npu_proxy.types import Pooling

MODEL_TYPES = ("gemma3_text",)
_LOCAL = "sliding_attention"


def normalize_config(config: Config) -> Config:
    """config.json with transformers' defaults filled in."""
    activation = config.get("hidden_activation") or "gelu_pytorch_tanh"
    return {"rms_norm_eps": 1e-6, "head_dim": 256, "query_pre_attn_scalar": 256, **config, "hidden_activation": activation}


def canonical_name(name: str) -> str:
    """The name without model prefix."""
    return name.removeprefix("model.")


def check_config(config: Config) -> None:
    """Raise ModelError for a config that this file would compute wrongly."""
    check_activation(config, "hidden_activation")
    if config.get("attn_logit_softcapping"):
        raise ModelError("config.json: attn_logit_softcapping is not supported")


def encode(graph: GraphContext) -> Node:
    """Hidden states of the last layer; see ``bert.encode``."""
    config, inputs, width = graph.config, graph.inputs, graph.config["hidden_size"]
    heads = grouped_heads(config, config["query_pre_attn_scalar"] ** -0.5)
    bidirectional = bool(config.get("use_bidirectional_attention"))
    window = int(config.get("sliding_window") or 4096)
    window = window // 2 if bidirectional else window - 1
    layer_types = _layer_types(config)
    rotations = {layer_type: _rotation(config, layer_type, heads.width) for layer_type in dict.fromkeys(layer_types)}
    x = op.multiply(graph.embedding("embed_tokens", inputs.ids), constant(np.float32(width**0.5)))
    for number, layer_type in enumerate(layer_types):
        layer, tokens = graph.scope(f"layers.{number}"), inputs.layer_tokens(last=number == len(layer_types) - 1)
        mask = attention_mask(inputs, tokens, causal=not bidirectional, window=window if layer_type == _LOCAL else None)
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


def _layer_types(config: Config) -> Sequence[str]:
    """The attention type of each layer: local or global."""
    if config.get("layer_types"):
        return config["layer_types"]
    every = config.get("_sliding_window_pattern", config.get("sliding_window_pattern", 6))
    return [_LOCAL if (number + 1) % every else "full_attention" for number in range(config["num_hidden_layers"])]


def _rotation(config: Config, layer_type: str, width: int) -> Rotation:
    parameters: dict[str, Any] = (config.get("rope_parameters") or {}).get(layer_type) or {}
    if layer_type == _LOCAL:
        theta = config.get("rope_local_base_freq", 10_000.0)
    else:
        theta = config.get("rope_theta", 1_000_000.0)
        parameters = {**(config.get("rope_scaling") or {}), **parameters}
    return rotary({"max_length": config["max_length"], "rope_parameters": parameters}, width=width, theta=theta)
