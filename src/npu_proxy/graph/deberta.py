"""DeBERTa v2 and v3: BERT's layers with separate attention to content and to relative positions.

Source: He et al. 2021; transformers' ``deberta_v2`` for tensor names and position buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npu_proxy.graph.bert import classifier_pooling, finish_layer, vocabulary_logits
from npu_proxy.graph.context import GraphContext
from npu_proxy.graph.inputs import BatchInputs, LayerTokens, attention_mask
from npu_proxy.graph.keys import REQUIRED, Keys, Stored, activation, count, flag, model_sizes, one_of, only, real, size, value_error
from npu_proxy.graph.layers import Heads, attend, merge_heads, project
from npu_proxy.graph.nodes import Config, Node, constant, integers, op

__all__ = [
    "KEYS",
    "MODEL_TYPES",
    "canonical_name",
    "classifier_pooling",
    "encode",
    "label_logits",
    "vocabulary_logits",
]

MODEL_TYPES = ("deberta-v2",)


def _attention_kinds(stored: Stored) -> Sequence[str]:
    """The kinds of attention in use: content to position (c2p), position to content (p2c)."""
    value = stored.get("pos_att_type") or []
    listed = value.lower().split("|") if isinstance(value, str) else value
    if not isinstance(listed, list) or not set(listed) <= {"c2p", "p2c"}:
        raise value_error("pos_att_type", value, "only c2p and p2c")
    return [kind for kind in ("c2p", "p2c") if kind in listed]


def _farthest(stored: Stored) -> int:
    """The maximum distance of relative positions."""
    value = stored.get("max_relative_positions", -1)
    return int(size("max_position_embeddings" if value in (-1, 0) else "max_relative_positions")(stored))


def _buckets(stored: Stored) -> int:
    """The number of buckets of distances per side; 0: one for each distance."""
    return 0 if stored.get("position_buckets", -1) == -1 else int(count("position_buckets")(stored))


KEYS: Keys = {
    **model_sizes(),
    "type_vocab_size": count("type_vocab_size", default=0),
    "hidden_act": activation("hidden_act"),
    "pooler_hidden_act": activation("pooler_hidden_act"),
    "layer_norm_eps": real("layer_norm_eps", default=1e-7),
    "embedding_size": size("embedding_size", default=None),
    "attention_head_size": size("attention_head_size", default=None),
    "relative_attention": one_of("relative_attention", values=(True,), default=REQUIRED),
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
    "buckets": _buckets,
    "farthest": _farthest,
    "attention_kinds": _attention_kinds,
    "position_biased_input": flag("position_biased_input", default=True),
    "share_att_key": flag("share_att_key", default=False),
    "norm_rel_ebd": one_of("norm_rel_ebd", values=("none", "layer_norm"), default="none"),
    "conv_kernel_size": only("conv_kernel_size", 0),
    "legacy": only("legacy", True),
}


def canonical_name(name: str) -> str:
    """The name without model prefix; BERT's names for the masked language model's head."""
    name = name.removeprefix("deberta.")
    name = name.replace("lm_predictions.lm_head.bias", "cls.predictions.bias")
    return name.replace("lm_predictions.lm_head.", "cls.predictions.transform.")


def encode(graph: GraphContext) -> Node:
    """Hidden states of the last layer; see ``bert.encode``."""
    config, inputs = graph.config, graph.inputs
    x = _embed(graph)
    table = _table(graph)
    forward, backward = (_columns(config, inputs, len(table), sign) for sign in (-1, 1))
    relative = _RelativePositions(table, forward, backward)
    for number in range(layers := config["num_hidden_layers"]):
        layer, tokens = graph.scope(f"encoder.layer.{number}"), inputs.layer_tokens(last=number == layers - 1)
        attended = _attention(layer, x, tokens, relative)
        x = finish_layer(layer, attended, layer.residual(x, tokens, config["hidden_size"]))
    return x


def label_logits(graph: GraphContext, pooled: Node) -> Node:
    """Logits [n, labels]."""
    return graph.linear("classifier", graph.activation(graph.config["pooler_hidden_act"], graph.linear("pooler.dense", pooled)))


@dataclass(frozen=True)
class _RelativePositions:
    """The table of relative positions [2 span, width], and its rows for the columns of ``_skewed``, [2 positions].

    forward: columns are keys, seen from queries; backward: columns are queries, seen from keys.
    """

    table: npt.NDArray[np.float32]
    forward: Node
    backward: Node


def _embed(graph: GraphContext) -> Node:
    config, inputs, embeddings = graph.config, graph.inputs, graph.scope("embeddings")
    x = embeddings.embedding("word_embeddings", inputs.ids, "vocab_size")
    if config["position_biased_input"]:
        x = op.add(x, embeddings.embedding("position_embeddings", inputs.positions, "max_position_embeddings"))
    if config["type_vocab_size"]:
        types = embeddings.table("token_type_embeddings", "type_vocab_size")
        x = op.add(x, constant(types[0]) if inputs.type_ids is None else op.gather(constant(types), inputs.type_ids, integers(0)))
    if (config["embedding_size"] or config["hidden_size"]) != config["hidden_size"]:
        x = embeddings.linear("embed_proj", x, "hidden_size", bias=False)
    return embeddings.layer_norm("LayerNorm", x, config["layer_norm_eps"])


def _table(graph: GraphContext) -> npt.NDArray[np.float32]:
    """Vectors of relative positions, normalized if the config requires it."""
    config, encoder = graph.config, graph.scope("encoder")
    table = np.asarray(
        encoder.table("rel_embeddings", "buckets" if config["buckets"] else "farthest", config["buckets"] or config["farthest"]),
        np.float32,
    )
    if config["norm_rel_ebd"] == "none":
        return table
    centred = table - table.mean(axis=1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + config["layer_norm_eps"])
    return (normed * encoder.weight("LayerNorm.weight") + encoder.weight("LayerNorm.bias")).astype(np.float32)


def _columns(config: Config, inputs: BatchInputs, span: int, sign: int) -> Node:
    """Rows of the table for the distances 1 - positions to positions (the last is unused), times ``sign``, [2 positions]."""
    buckets, farthest = config["buckets"], config["farthest"]
    reach = int(config["max_length"])
    distance = np.arange(-reach, reach + 1)
    lookup = op.constant(np.clip(_bucket(distance, buckets, farthest) + span // 2, 0, span - 1).astype(np.int32))
    positions = op.convert(op.gather(inputs.all_tokens.grid, integers(1), integers(0)), "i32")
    one = op.constant(np.int32(1))
    distances = op.multiply(op.range(op.subtract(one, positions), op.add(positions, one), one, "i32"), op.constant(np.int32(sign)))
    return op.gather(lookup, op.add(op.clamp(distances, -reach, reach), op.constant(np.int32(reach))), integers(0))


def _skewed(x: Node, by_distance: Node, inputs: BatchInputs) -> Node:
    """[bins, heads, n, width] and [1, heads, 2 n, width] -> products [bins, heads, n, n]; entry (i, j) is for distance j - i.

    The products are stored row by row, 2 n per row. Read as rows of 2 n - 1 from element n - 1 on, each row begins one distance
    earlier than the previous one. Texts are contiguous, so distances in a bin are distances in a text. Gathering the same entries
    takes a third longer on the CPU, and the compiler for platform 3720 does not support it.
    Source: Dai et al. 2019 (Transformer-XL).
    """
    bins = op.gather(inputs.all_tokens.grid, op.constant(np.array([0])), integers(0))
    repeats = op.concat([bins, op.constant(np.array([1, 1, 1]))], 0)  # compilers for platform 3720 do not broadcast over bins
    products = op.matmul(x, op.tile(by_distance, repeats), False, True)
    n = op.gather(inputs.all_tokens.grid, op.constant(np.array([1])), integers(0))
    one, flat_shape = op.constant(np.array([1])), op.constant(np.array([0, 0, -1]))
    row = op.subtract(op.add(n, n), one)
    first, axis = op.subtract(n, one), op.constant(np.array([2]))
    flat = op.reshape(products, flat_shape, True)
    flat = op.slice(flat, first, op.add(first, op.multiply(n, row)), one, axis)
    skewed = op.reshape(flat, op.concat([op.constant(np.array([0, 0])), n, row], 0), True)
    return op.slice(skewed, op.constant(np.array([0])), n, one, op.constant(np.array([3])))


def _one_hot(tokens: LayerTokens, inputs: BatchInputs, heads: int) -> Node | None:
    """One-hot positions of ``tokens`` in their bins, [bins, heads, n, positions]; None for all tokens."""
    if tokens.index is None:
        return None
    positions = op.convert(op.gather(inputs.all_tokens.grid, integers(1), integers(0)), "i32")
    numbers = op.range(op.constant(np.int32(0)), positions, op.constant(np.int32(1)), "i32")
    equal = op.equal(op.unsqueeze(tokens.index, integers(2)), numbers)
    ones = op.unsqueeze(op.select(equal, constant(np.float32(1)), constant(np.float32(0))), integers(1))
    return op.tile(ones, op.constant(np.array([1, heads, 1, 1])))  # compilers for platform 3720 do not broadcast over heads


def _shared(one_hot: Node) -> Node:
    """Divide the ones among the tokens at the same position (such as those of empty segments), so that they sum to one token."""
    return op.divide(one_hot, op.maximum(op.reduce_sum(one_hot, integers(2), True), constant(np.float32(1))))


def _bucket(distance: npt.NDArray[np.int64], buckets: int, farthest: int) -> npt.NDArray[np.int64]:
    """The bucket of each distance: exact up to half the buckets, logarithmic beyond."""
    if not buckets:
        return distance
    middle = buckets // 2
    size = np.where(np.abs(distance) < middle, middle - 1, np.abs(distance)).astype(np.float32)
    span = np.log(np.float32((farthest - 1) / middle))
    far = np.ceil(np.log(size / np.float32(middle)) / span * np.float32(middle - 1)) + middle
    return np.where(size <= middle, distance, far * np.sign(distance)).astype(np.int64)


def _attention(layer: GraphContext, x: Node, tokens: LayerTokens, relative: _RelativePositions) -> Node:
    """Attention of ``x`` [tokens, width] to content and, as configured, to positions; computed for ``tokens``."""
    config, inputs, scope = layer.config, layer.inputs, layer.scope("attention.self")
    count, kinds = config["num_attention_heads"], config["attention_kinds"]
    width = config["attention_head_size"] or config["hidden_size"] // count
    heads = Heads(count=count, width=width, scale=(width * (1 + len(kinds))) ** -0.5, shared=count)
    query, key, value = project(
        x, tokens, inputs, scope.fused(["query_proj", "key_proj", "value_proj"], ["num_attention_heads"] * 3, width=width), heads
    )
    mask, scale = attention_mask(inputs, tokens), constant(np.float32(heads.scale))
    prefix = "" if config["share_att_key"] else "pos_"
    one_hot = _one_hot(tokens, inputs, count)
    if "c2p" in kinds:
        by_distance = op.gather(_projected(scope, f"{prefix}key_proj", relative.table, count), relative.forward, integers(2))
        wide = query if one_hot is None else op.matmul(_shared(one_hot), query, True, False)
        products = _skewed(wide, by_distance, inputs)
        products = products if one_hot is None else op.matmul(one_hot, products, False, False)
        mask = op.add(mask, op.multiply(products, scale))
    if "p2c" in kinds:
        by_distance = op.gather(_projected(scope, f"{prefix}query_proj", relative.table, count), relative.backward, integers(2))
        products = _skewed(key, by_distance, inputs)
        transposed = one_hot is None
        products = op.transpose(products, integers(0, 1, 3, 2)) if transposed else op.matmul(one_hot, products, False, True)
        mask = op.add(mask, op.multiply(products, scale))
    return merge_heads(attend(query, key, value, mask, heads.scale, layer.style), tokens.count, count * width)


def _projected(layer: GraphContext, name: str, table: npt.NDArray[np.float32], heads: int) -> Node:
    """The table projected by the linear layer of that name, [1, heads, 2 span, head_width]; computed once, here."""
    projected = table @ np.asarray(layer.weight(f"{name}.weight"), np.float32).T + layer.weight(f"{name}.bias")
    return constant(projected.reshape(1, len(table), heads, -1).transpose(0, 2, 1, 3))
