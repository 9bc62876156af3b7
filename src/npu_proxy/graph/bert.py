"""The BERT family: post-norm encoder, learned absolute positions, one token type for single texts.

Source: Devlin et al. 2018, and the ``bert`` model of Hugging Face transformers for tensor names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from openvino import opset15 as op

from npu_proxy.errors import ModelError
from npu_proxy.graph.heads import wanted_rows
from npu_proxy.graph.packed import (
    Node,
    RowInputs,
    Style,
    Weights,
    attend,
    constant,
    gelu,
    integers,
    layer_norm,
    linear,
    merge_heads,
    segment_mask,
    split_heads,
)
from npu_proxy.types import Pooling

MODEL_TYPES: tuple[str, ...] = ("bert",)
"""Values of ``model_type`` in config.json that this file builds."""

ACTIVATIONS: dict[str, Callable[[Node, Style], Node]] = {
    "gelu": gelu,
    "gelu_new": lambda x, _: op.gelu(x, "tanh"),
    "gelu_pytorch_tanh": lambda x, _: op.gelu(x, "tanh"),
    "relu": lambda x, _: op.relu(x),
}
"""Activations by ``hidden_act`` of config.json."""


def encode(config: Mapping[str, Any], weights: Weights, inputs: RowInputs, pooling: Pooling, style: Style) -> Node:
    """Hidden states of the last layer, [bins, positions, width], or [bins, segments, width] when ``pooling.by_index``.

    config: the model's config.json. weights: tensors by checkpoint name, canonical (see ``canonical_name``).
    """
    check(config)
    layers = config["num_hidden_layers"]
    x = _embed(config, weights, inputs)
    mask = segment_mask(inputs.segments, inputs.segments)
    for number in range(layers - 1):
        x = _layer(config, weights, number, x, x, mask, style)
    last_mask = mask
    if pooling.by_index:  # exact, and cheaper: the last layer only for the rows that are read
        last_mask = segment_mask(wanted_rows(inputs.segments, inputs, pooling), inputs.segments)
    return _layer(config, weights, layers - 1, wanted_rows(x, inputs, pooling), x, last_mask, style)


def check(config: Mapping[str, Any]) -> None:
    """Refuse what this file would compute wrongly."""
    position = config.get("position_embedding_type") or "absolute"
    if position != "absolute":
        raise ModelError(f"config.json: position_embedding_type `{position}` is not supported for BERT, only `absolute`")
    activation = config.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise ModelError(f"config.json: hidden_act `{activation}` is not supported; known: {', '.join(ACTIVATIONS)}")
    if config.get("is_decoder"):
        raise ModelError("config.json: is_decoder is true; this graph is a bidirectional encoder")


def canonical_name(name: str) -> str:
    """The tensor name this file uses for a checkpoint's name: no model prefix, no TensorFlow spelling."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _embed(config: Mapping[str, Any], weights: Weights, inputs: RowInputs) -> Node:
    zero = integers(0)
    words = op.gather(constant(weights["embeddings.word_embeddings.weight"]), inputs.ids, zero)
    # Every token of a single text has type 0, so its vector is added to the position table once, here.
    table = weights["embeddings.position_embeddings.weight"] + weights["embeddings.token_type_embeddings.weight"][0]
    x = op.add(words, op.gather(constant(table), inputs.positions, zero))
    return _norm(config, weights, "embeddings.LayerNorm", x)


def _layer(config: Mapping[str, Any], weights: Weights, number: int, rows: Node, x: Node, mask: Node, style: Style) -> Node:
    """One encoder layer for the query rows ``rows`` [bins, n, width] over the tokens ``x`` [bins, positions, width]."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head_width = width // heads
    layer = f"encoder.layer.{number}."

    def dense(x: Node, name: str) -> Node:
        return linear(x, weights[f"{layer}{name}.weight"], weights[f"{layer}{name}.bias"])

    names = [f"{layer}attention.self.{part}" for part in ("query", "key", "value")]
    if rows is x:
        joint = linear(
            x,
            np.concatenate([weights[f"{name}.weight"] for name in names]),
            np.concatenate([weights[f"{name}.bias"] for name in names]),
        )  # one product instead of three
        parts = op.variadic_split(joint, integers(2), op.constant(np.full(3, width))).outputs()
        query, key, value = (split_heads(part, heads, head_width) for part in parts)
    else:
        query, key, value = (
            split_heads(linear(source, weights[f"{name}.weight"], weights[f"{name}.bias"]), heads, head_width)
            for source, name in zip((rows, x, x), names, strict=True)
        )
    attended = merge_heads(attend(query, key, value, mask, head_width, style), width)
    x = _norm(config, weights, f"{layer}attention.output.LayerNorm", op.add(dense(attended, "attention.output.dense"), rows))
    activation = config.get("hidden_act", "gelu")
    inner = dense(x, "intermediate.dense")
    inner = ACTIVATIONS[activation](inner, style)
    return _norm(config, weights, f"{layer}output.LayerNorm", op.add(dense(inner, "output.dense"), x))


def _norm(config: Mapping[str, Any], weights: Weights, name: str, x: Node) -> Node:
    return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], config.get("layer_norm_eps", 1e-12))
