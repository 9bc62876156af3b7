"""DeBERTa v2 and v3: BERT's layers with attention to content and to relative positions apart.

Source: He et al. 2021; transformers' ``deberta_v2`` for tensor names and for the buckets of positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from openvino import opset15 as op

from npu_proxy.errors import ModelError
from npu_proxy.graph.bert import Config, epsilon, finish_layer, scores_pooling, vocabulary
from npu_proxy.graph.layers import (
    ACTIVATIONS,
    Heads,
    attend,
    check_activation,
    dense,
    joint,
    layer_norm,
    linear,
    merge_heads,
    project,
)
from npu_proxy.graph.packed import Node, RowInputs, Rows, Style, Weights, attention_mask, constant, distances, integers

__all__ = ["MODEL_TYPES", "canonical_name", "check", "encode", "scores", "scores_pooling", "standard", "vocabulary"]

MODEL_TYPES = ("deberta-v2",)


def standard(config: Config) -> Config:
    """As it stands."""
    return {"layer_norm_eps": 1e-7, **config}


def canonical_name(name: str) -> str:
    """No model prefix, no TensorFlow spelling."""
    return name.removeprefix("deberta.").replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def check(config: Config) -> None:
    """Refuse what this file would compute wrongly. Raises ModelError."""
    check_activation(config, "hidden_act")
    check_activation(config, "pooler_hidden_act")
    if config.get("conv_kernel_size", 0):
        raise ModelError("config.json: conv_kernel_size is set; DeBERTa with a convolution is not supported")
    if not config.get("relative_attention"):
        raise ModelError("config.json: relative_attention is off; this graph needs relative positions")


def encode(config: Config, weights: Weights, inputs: RowInputs, style: Style) -> Node:
    """As bert.encode."""
    x = _embed(config, weights, inputs)
    table = _table(config, weights)

    @cache
    def places_of(rows: Rows) -> Node:
        return _places(config, inputs, rows, len(table))

    for number in range(layers := config["num_hidden_layers"]):
        layer, rows = f"encoder.layer.{number}.", inputs.rows(last=number == layers - 1)
        attended = _attention(config, weights, layer, x, inputs, rows, _Relative(places_of(rows), table), style)
        x = finish_layer(config, weights, layer, attended, rows.take(x, inputs.every.grid, config["hidden_size"]), style)
    return x


@dataclass(frozen=True)
class _Relative:
    """Relative positions: the row of the table for each pair [bins, heads, rows, positions], and the table [2 span, width]."""

    places: Node
    table: npt.NDArray[np.float32]


def scores(config: Config, weights: Weights, pooled: Node, style: Style) -> Node:
    """Logits [n, labels]."""
    activation = ACTIVATIONS[config.get("pooler_hidden_act", "gelu")]
    return dense(weights, "classifier", activation(dense(weights, "pooler.dense", pooled), style))


def _embed(config: Config, weights: Weights, inputs: RowInputs) -> Node:
    x = op.gather(constant(weights["embeddings.word_embeddings.weight"]), inputs.ids, integers(0))
    if config.get("position_biased_input", True):
        table = weights["embeddings.position_embeddings.weight"]
        x = op.add(x, op.gather(constant(table), inputs.positions, integers(0)))
    if config.get("type_vocab_size", 0):
        types = weights["embeddings.token_type_embeddings.weight"]
        x = op.add(x, constant(types[0]) if inputs.types is None else op.gather(constant(types), inputs.types, integers(0)))
    if config.get("embedding_size", config["hidden_size"]) != config["hidden_size"]:
        x = linear(x, weights["embeddings.embed_proj.weight"])
    return layer_norm(weights, "embeddings.LayerNorm", x, epsilon(config))


def _span(config: Config) -> tuple[int, int]:
    """How many buckets a side has (0: one for each distance), and the farthest distance."""
    farthest = config.get("max_relative_positions", -1)
    return max(0, config.get("position_buckets", -1)), farthest if farthest > 0 else config["max_position_embeddings"]


def _table(config: Config, weights: Weights) -> npt.NDArray[np.float32]:
    """Vectors of relative positions, normalized where the config says so."""
    buckets, farthest = _span(config)
    table = np.asarray(weights["encoder.rel_embeddings.weight"][: 2 * (buckets or farthest)], np.float32)
    if "layer_norm" not in str(config.get("norm_rel_ebd", "none")).lower():
        return table
    centred = table - table.mean(axis=1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + epsilon(config))
    return (normed * weights["encoder.LayerNorm.weight"] + weights["encoder.LayerNorm.bias"]).astype(np.float32)


def _places(config: Config, inputs: RowInputs, rows: Rows, span: int) -> Node:
    buckets, farthest = _span(config)
    reach = int(config["max_length"])
    away = np.arange(-reach, reach + 1)  # of a key from the row; the table counts the other way
    places = np.clip(_bucket(-away, buckets, farthest) + span // 2, 0, span - 1)
    lookup = op.constant(places.astype(np.int32))
    index = op.add(op.clamp(distances(inputs, rows), -reach, reach), op.constant(np.int32(reach)))
    found = op.unsqueeze(op.gather(lookup, index, integers(0)), integers(1))
    return op.tile(found, op.constant(np.array([1, config["num_attention_heads"], 1, 1])))


def _bucket(away: npt.NDArray[np.int64], buckets: int, farthest: int) -> npt.NDArray[np.int64]:
    """Distances as they are up to half the buckets, logarithmic beyond."""
    if not buckets:
        return away
    middle = buckets // 2
    size = np.where(np.abs(away) < middle, middle - 1, np.abs(away)).astype(np.float32)
    span = np.log(np.float32((farthest - 1) / middle))
    far = np.ceil(np.log(size / np.float32(middle)) / span * np.float32(middle - 1)) + middle
    return np.where(size <= middle, away, far * np.sign(away)).astype(np.int64)


def _attention(
    config: Config, weights: Weights, layer: str, x: Node, inputs: RowInputs, rows: Rows, relative: _Relative, style: Style
) -> Node:
    """Attention of tokens ``x`` [tokens, width] for ``rows``, to content, and to positions as the config says."""
    own, count, kinds = f"{layer}attention.self.", config["num_attention_heads"], _kinds(config)
    width = config.get("attention_head_size", config["hidden_size"] // count)
    heads = Heads(count=count, width=width, scale=(width * (1 + len(kinds))) ** -0.5, shared=count)
    parts = joint(weights, [f"{own}{part}_proj" for part in ("query", "key", "value")])
    query, key, value = project(x, rows, inputs, parts, heads)
    mask, scale = attention_mask(inputs, rows), constant(np.float32(heads.scale))
    prefix = own if config.get("share_att_key", False) else f"{own}pos_"
    if "c2p" in kinds:
        by_position = _projected(weights, f"{prefix}key_proj", relative.table, count)
        found = op.gather_elements(op.matmul(query, by_position, False, True), relative.places, 3)
        mask = op.add(mask, op.multiply(found, scale))
    if "p2c" in kinds:
        by_position = _projected(weights, f"{prefix}query_proj", relative.table, count)
        turned = op.transpose(relative.places, integers(0, 1, 3, 2))
        found = op.gather_elements(op.matmul(key, by_position, False, True), turned, 3)
        mask = op.add(mask, op.multiply(op.transpose(found, integers(0, 1, 3, 2)), scale))
    return merge_heads(attend(query, key, value, mask, heads.scale, style), rows.flat, count * width)


def _kinds(config: Config) -> list[str]:
    """Which of content to position and position to content there are."""
    given = config.get("pos_att_type") or []
    listed = given.split("|") if isinstance(given, str) else given
    return [kind for kind in ("c2p", "p2c") if kind in listed]


def _projected(weights: Weights, name: str, table: npt.NDArray[np.float32], heads: int) -> Node:
    """The table through that layer, [1, heads, 2 span, head_width]; computed here, once."""
    made = table @ np.asarray(weights[f"{name}.weight"], np.float32).T + weights[f"{name}.bias"]
    return constant(made.reshape(1, len(table), heads, -1).transpose(0, 2, 1, 3))
