"""The BERT family: post-norm encoder, learned absolute positions, one token type for single texts.

Source: Devlin et al. 2018, and the ``bert`` model of Hugging Face transformers for tensor names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from openvino import opset15 as op

from npu_proxy.errors import ModelError
from npu_proxy.graph.heads import wanted_rows, wanted_segments
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
    """Hidden states of the last layer, [tokens, width], or [bins * segments, width] when ``pooling.by_index``.

    config: the model's config.json. weights: tensors by checkpoint name, canonical (see ``canonical_name``).
    """
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    x = _embed(config, weights, inputs)
    every = _Queries(x, inputs.grid, segment_mask(inputs.segments, inputs.segments))
    for number in range(layers - 1):
        x = _layer(config, weights, f"encoder.layer.{number}.", x, inputs, every, style)
        every = replace(every, rows=x)
    last = every
    if pooling.by_index:  # exact, and cheaper: the last layer only for the rows that are read
        mask = segment_mask(wanted_segments(inputs, pooling), inputs.segments)
        last = _Queries(wanted_rows(x, inputs, pooling, width), inputs.pooled_grid, mask)
    return _layer(config, weights, f"encoder.layer.{layers - 1}.", x, inputs, last, style)


@dataclass(frozen=True)
class _Queries:
    """The rows a layer is computed for: [n, width], their grid [bins, n / bins], and their mask over all tokens."""

    rows: Node
    grid: Node
    mask: Node


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
    words = op.gather(constant(weights["embeddings.word_embeddings.weight"]), inputs.ids, integers(0))
    # Every token of a single text has type 0, so its vector is added to the position table once, here.
    table = weights["embeddings.position_embeddings.weight"] + weights["embeddings.token_type_embeddings.weight"][0]
    x = op.add(words, op.gather(constant(table), inputs.positions, integers(0)))
    return _norm(config, weights, "embeddings.LayerNorm", x)


def _layer(
    config: Mapping[str, Any], weights: Weights, layer: str, x: Node, inputs: RowInputs, queries: _Queries, style: Style
) -> Node:
    """One encoder layer over the tokens ``x`` [tokens, width] for the rows of ``queries``; ``layer`` is its name prefix."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head_width = width // heads

    def dense(x: Node, name: str) -> Node:
        return linear(x, weights[f"{layer}{name}.weight"], weights[f"{layer}{name}.bias"])

    if queries.rows is x:
        # One product instead of three.
        parts = [f"{layer}attention.self.{part}" for part in ("query", "key", "value")]
        kernel = np.concatenate([weights[f"{part}.weight"] for part in parts])
        joint = linear(x, kernel, np.concatenate([weights[f"{part}.bias"] for part in parts]))
        query, key, value = op.variadic_split(joint, integers(1), op.constant(np.full(3, width))).outputs()
    else:
        query = dense(queries.rows, "attention.self.query")
        key, value = dense(x, "attention.self.key"), dense(x, "attention.self.value")
    attended = attend(
        split_heads(query, queries.grid, heads, head_width),
        split_heads(key, inputs.grid, heads, head_width),
        split_heads(value, inputs.grid, heads, head_width),
        queries.mask,
        head_width,
        style,
    )
    rows = inputs.tokens if queries.rows is x else -1
    mixed = dense(merge_heads(attended, rows, width), "attention.output.dense")
    x = _norm(config, weights, f"{layer}attention.output.LayerNorm", op.add(mixed, queries.rows))
    inner = ACTIVATIONS[config.get("hidden_act", "gelu")](dense(x, "intermediate.dense"), style)
    return _norm(config, weights, f"{layer}output.LayerNorm", op.add(dense(inner, "output.dense"), x))


def _norm(config: Mapping[str, Any], weights: Weights, name: str, x: Node) -> Node:
    return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], config.get("layer_norm_eps", 1e-12))
