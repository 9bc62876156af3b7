"""The BERT family: post-norm encoder, learned absolute positions, token types.

Source: Devlin et al. 2018, and the ``bert`` model of Hugging Face transformers for tensor names. Families that differ
little (roberta.py, distilbert.py, mpnet.py) bring their names and configs into these and use ``encode``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from openvino import opset15 as op

from npu_proxy.errors import ModelError
from npu_proxy.graph.layers import (
    ACTIVATIONS,
    Heads,
    check_activation,
    dense,
    joint,
    layer_norm,
    linear,
    self_attention,
)
from npu_proxy.graph.packed import Node, RowInputs, Rows, Style, Weights, attention_mask, constant, integers
from npu_proxy.types import Pooling

Config = Mapping[str, Any]
MODEL_TYPES: tuple[str, ...] = ("bert",)
"""Values of ``model_type`` in config.json that this file builds."""


def standard(config: Config) -> Config:
    """config.json with the names that this file reads."""
    return config


def canonical_name(name: str) -> str:
    """The tensor name this file uses for a checkpoint's name: no model prefix, no TensorFlow spelling."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def check(config: Config) -> None:
    """Refuse what this file would compute wrongly. Raises ModelError."""
    position = config.get("position_embedding_type") or "absolute"
    if position != "absolute":
        raise ModelError(f"config.json: position_embedding_type `{position}` is not supported for BERT, only `absolute`")
    check_activation(config, "hidden_act")
    if config.get("is_decoder"):
        raise ModelError("config.json: is_decoder is true; this graph is a bidirectional encoder")


def encode(
    config: Config,
    weights: Weights,
    inputs: RowInputs,
    style: Style,
    *,
    first_position: int = 0,
    bias: Callable[[Rows], Node] | None = None,
) -> Node:
    """Hidden states of the last layer, [tokens, width], or of ``inputs.last`` where pooling reads one token a text.

    config: see ``standard``. weights: tensors by canonical names. first_position: row of the position table where a text
    begins. bias: what is added to the attention scores of rows, [bins, heads, rows, positions].
    """

    @cache
    def mask_of(rows: Rows) -> Node:
        mask = attention_mask(inputs, rows)
        return mask if bias is None else op.add(mask, bias(rows))

    x = _embed(config, weights, inputs, first_position)
    for number in range(layers := config["num_hidden_layers"]):
        rows = inputs.rows(last=number == layers - 1)
        x = _layer(config, weights, f"encoder.layer.{number}.", x, inputs, rows, mask_of(rows), style)
    return x


def scores(config: Config, weights: Weights, pooled: Node, style: Style) -> Node:
    """Logits [n, labels] of pooled hidden states [n, width]."""
    return dense(weights, "classifier", op.tanh(dense(weights, "pooler.dense", pooled)))


def scores_pooling(config: Config) -> Pooling:
    """What ``scores`` wants to be pooled."""
    return Pooling.CLS


def vocabulary(config: Config, weights: Weights, hidden: Node, style: Style) -> Node:
    """Logits [tokens, vocabulary] of the masked language model; its last layer is the word embeddings unless it is stored."""
    head = "cls.predictions.transform"
    x = ACTIVATIONS[config.get("hidden_act", "gelu")](dense(weights, f"{head}.dense", hidden), style)
    x = layer_norm(weights, f"{head}.LayerNorm", x, epsilon(config))
    tied = "embeddings.word_embeddings.weight"
    stored = "cls.predictions.decoder.weight"
    bias = weights["cls.predictions.decoder.bias" if "cls.predictions.decoder.bias" in weights else "cls.predictions.bias"]
    return linear(x, weights[stored if stored in weights else tied], bias)


def epsilon(config: Config) -> float:
    """Of layer normalization."""
    return config.get("layer_norm_eps", 1e-12)


def _embed(config: Config, weights: Weights, inputs: RowInputs, first_position: int) -> Node:
    words = op.gather(constant(weights["embeddings.word_embeddings.weight"]), inputs.ids, integers(0))
    table = weights["embeddings.position_embeddings.weight"][first_position:]
    typed = "embeddings.token_type_embeddings.weight"
    types = weights.get(typed)
    if types is not None and inputs.types is None:
        table = table + types[0]  # every token of a single text has type 0: its vector is added here once
    x = op.add(words, op.gather(constant(table), inputs.positions, integers(0)))
    if types is not None and inputs.types is not None:
        x = op.add(x, op.gather(constant(types), inputs.types, integers(0)))
    return layer_norm(weights, "embeddings.LayerNorm", x, epsilon(config))


def _layer(config: Config, weights: Weights, layer: str, x: Node, inputs: RowInputs, rows: Rows, mask: Node, style: Style) -> Node:
    """One encoder layer over the tokens ``x`` [tokens, width] for ``rows``; ``layer`` is its name prefix."""
    width, count = config["hidden_size"], config["num_attention_heads"]
    parts = joint(weights, [f"{layer}attention.self.{part}" for part in ("query", "key", "value")])
    attended = self_attention(x, rows, inputs, parts, Heads.of(count, width // count), mask, style)
    return finish_layer(config, weights, layer, attended, rows.take(x, inputs.every.grid, width), style)


def finish_layer(config: Config, weights: Weights, layer: str, attended: Node, before: Node, style: Style) -> Node:
    """What follows attention: output, feed-forward, and the norms behind both. before: what went into the layer, [rows, width]."""
    mixed = dense(weights, f"{layer}attention.output.dense", attended)
    x = layer_norm(weights, f"{layer}attention.output.LayerNorm", op.add(mixed, before), epsilon(config))
    inner = ACTIVATIONS[config.get("hidden_act", "gelu")](dense(weights, f"{layer}intermediate.dense", x), style)
    outer = op.add(dense(weights, f"{layer}output.dense", inner), x)
    return layer_norm(weights, f"{layer}output.LayerNorm", outer, epsilon(config))
