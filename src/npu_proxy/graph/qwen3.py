"""Qwen3 as an embedder or reranker: a decoder that is causal, read at its last token. Source: transformers' ``qwen3``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from openvino import opset15 as op

from npu_proxy.errors import ModelError
from npu_proxy.graph.bert import Config
from npu_proxy.graph.decoder import Seen, attention, feed_forward, heads_of
from npu_proxy.graph.layers import check_activation, linear, rms_norm, rotary
from npu_proxy.graph.packed import Node, RowInputs, Style, Weights, attention_mask, constant, integers
from npu_proxy.types import Pooling

MODEL_TYPES = ("qwen3",)


def standard(config: Config) -> Config:
    """What transformers takes for granted, written out."""
    heads = config["num_attention_heads"]
    return {"rms_norm_eps": 1e-6, "head_dim": 128, "num_key_value_heads": heads, "hidden_act": "silu", **config}


def canonical_name(name: str) -> str:
    """No model prefix."""
    return name.removeprefix("model.")


def check(config: Config) -> None:
    """Refuse what this file would compute wrongly. Raises ModelError."""
    check_activation(config, "hidden_act", "silu")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise ModelError("config.json: a sliding window is not supported for qwen3")


def encode(config: Config, weights: Weights, inputs: RowInputs, style: Style) -> Node:
    """As bert.encode."""
    epsilon, heads = config["rms_norm_eps"], heads_of(config, config["head_dim"] ** -0.5)
    rotate = rotary(config, width=heads.width, theta=1_000_000.0)

    def gain(name: str) -> npt.NDArray[np.float32]:
        return weights[f"{name}.weight"]

    x = op.gather(constant(weights["embed_tokens.weight"]), inputs.ids, integers(0))
    for number in range(layers := config["num_hidden_layers"]):
        layer, rows = f"layers.{number}.", inputs.rows(last=number == layers - 1)
        seen = Seen(mask=attention_mask(inputs, rows, causal=True), rotate=rotate, gain=gain, style=style)
        normed = rms_norm(gain(f"{layer}input_layernorm"), x, epsilon)
        mixed = attention(config, weights, layer, normed, inputs, rows, heads, seen)
        x = op.add(rows.take(x, inputs.every.grid, config["hidden_size"]), mixed)
        normed = rms_norm(gain(f"{layer}post_attention_layernorm"), x, epsilon)
        x = op.add(x, feed_forward(config, weights, layer, normed, config["hidden_act"], style))
    return rms_norm(gain("norm"), x, epsilon)


def scores(config: Config, weights: Weights, pooled: Node, style: Style) -> Node:
    """Logits [n, labels]."""
    return linear(pooled, weights["score.weight"])


def scores_pooling(config: Config) -> Pooling:
    """What ``scores`` wants to be pooled."""
    return Pooling.LAST_TOKEN


def vocabulary(config: Config, weights: Weights, hidden: Node, style: Style) -> Node:
    """Logits [tokens, vocabulary] of the next token."""
    stored, tied = "lm_head.weight", "embed_tokens.weight"
    return linear(hidden, weights[stored if stored in weights else tied])
