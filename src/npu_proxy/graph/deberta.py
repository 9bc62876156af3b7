"""DeBERTa v2 and v3: BERT's layers with attention to content and to relative positions apart.

Source: He et al. 2021; transformers' ``deberta_v2`` for tensor names and for the buckets of positions.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from npu_proxy.graph.packed import Node, RowInputs, Rows, Style, Weights, attention_mask, constant, integers

__all__ = ["MODEL_TYPES", "canonical_name", "check", "encode", "scores", "scores_pooling", "standard", "vocabulary"]

MODEL_TYPES = ("deberta-v2",)


def standard(config: Config) -> Config:
    """As it stands."""
    return {"layer_norm_eps": 1e-7, **config}


def canonical_name(name: str) -> str:
    """No model prefix, no TensorFlow spelling, the masked language model's head by BERT's names."""
    name = name.removeprefix("deberta.").replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    name = name.replace("lm_predictions.lm_head.bias", "cls.predictions.bias")
    return name.replace("lm_predictions.lm_head.", "cls.predictions.transform.")


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
    relative = _Relative(table, _columns(config, inputs, len(table), -1), _columns(config, inputs, len(table), 1))
    for number in range(layers := config["num_hidden_layers"]):
        layer, rows = f"encoder.layer.{number}.", inputs.rows(last=number == layers - 1)
        attended = _attention(config, weights, layer, x, inputs, rows, relative, style)
        x = finish_layer(config, weights, layer, attended, rows.take(x, inputs.every.grid, config["hidden_size"]), style)
    return x


@dataclass(frozen=True)
class _Relative:
    """Relative positions: the table [2 span, width], and which of its rows the columns of ``_skewed`` are, [2 positions].

    forward: columns are keys, seen from rows; backward: columns are rows, seen from keys.
    """

    table: npt.NDArray[np.float32]
    forward: Node
    backward: Node


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


def _columns(config: Config, inputs: RowInputs, span: int, sign: int) -> Node:
    """Rows of the table for the distances 1 - positions to positions (the last is not used), times ``sign``, [2 positions]."""
    buckets, farthest = _span(config)
    reach = int(config["max_length"])
    away = np.arange(-reach, reach + 1)
    lookup = op.constant(np.clip(_bucket(away, buckets, farthest) + span // 2, 0, span - 1).astype(np.int32))
    positions = op.convert(op.gather(inputs.every.grid, integers(1), integers(0)), "i32")
    one = op.constant(np.int32(1))
    distances = op.multiply(op.range(op.subtract(one, positions), op.add(positions, one), one, "i32"), op.constant(np.int32(sign)))
    return op.gather(lookup, op.add(op.clamp(distances, -reach, reach), op.constant(np.int32(reach))), integers(0))


def _skewed(x: Node, by_distance: Node, inputs: RowInputs) -> Node:
    """[bins, heads, n, width] and [1, heads, 2 n, width] to products [bins, heads, n, n]: entry (i, j) is that of distance j - i.

    The products lie row by row, 2 n a row; read 2 n - 1 a row from number n - 1 on, each row begins one distance earlier than
    the one before. Texts lie in one piece, so distances in a bin are those in a text. Gathering the same entries takes a third
    longer on the CPU, and the compiler for platform 3720 refuses it. Source: Dai et al. 2019 (Transformer-XL).
    """
    bins = op.gather(inputs.every.grid, op.constant(np.array([0])), integers(0))
    repeats = op.concat([bins, op.constant(np.array([1, 1, 1]))], 0)  # compilers for platform 3720 do not broadcast bins
    products = op.matmul(x, op.tile(by_distance, repeats), False, True)
    n = op.gather(inputs.every.grid, op.constant(np.array([1])), integers(0))
    one, all_but = op.constant(np.array([1])), op.constant(np.array([0, 0, -1]))
    row = op.subtract(op.add(n, n), one)
    first, ahead = op.subtract(n, one), op.constant(np.array([2]))
    flat = op.reshape(products, all_but, True)
    flat = op.slice(flat, first, op.add(first, op.multiply(n, row)), one, ahead)
    turned = op.reshape(flat, op.concat([op.constant(np.array([0, 0])), n, row], 0), True)
    return op.slice(turned, op.constant(np.array([0])), n, one, op.constant(np.array([3])))


def _chosen(rows: Rows, inputs: RowInputs, heads: int) -> Node | None:
    """Which positions of a bin the rows are, as ones [bins, heads, n, positions]; None for all of them."""
    if rows.index is None:
        return None
    positions = op.convert(op.gather(inputs.every.grid, integers(1), integers(0)), "i32")
    every = op.range(op.constant(np.int32(0)), positions, op.constant(np.int32(1)), "i32")
    same = op.equal(op.unsqueeze(rows.index, integers(2)), every)
    ones = op.unsqueeze(op.select(same, constant(np.float32(1)), constant(np.float32(0))), integers(1))
    return op.tile(ones, op.constant(np.array([1, heads, 1, 1])))  # as compilers for platform 3720 want it


def _shared(chosen: Node) -> Node:
    """Those ones in equal parts where rows are the same position, as those of empty segments are; their sum is that row."""
    return op.divide(chosen, op.maximum(op.reduce_sum(chosen, integers(2), True), constant(np.float32(1))))


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
    chosen = _chosen(rows, inputs, count)
    if "c2p" in kinds:
        by_distance = op.gather(_projected(weights, f"{prefix}key_proj", relative.table, count), relative.forward, integers(2))
        wide = query if chosen is None else op.matmul(_shared(chosen), query, True, False)
        found = _skewed(wide, by_distance, inputs)
        found = found if chosen is None else op.matmul(chosen, found, False, False)
        mask = op.add(mask, op.multiply(found, scale))
    if "p2c" in kinds:
        by_distance = op.gather(_projected(weights, f"{prefix}query_proj", relative.table, count), relative.backward, integers(2))
        found = _skewed(key, by_distance, inputs)
        found = op.transpose(found, integers(0, 1, 3, 2)) if chosen is None else op.matmul(chosen, found, False, True)
        mask = op.add(mask, op.multiply(found, scale))
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
