"""The graph after the encoder: pooling of each text's tokens and Dense modules, or the heads of sparse and multi-output models.

Pooling is one gather (CLS, last token) or one matrix product (means), so a batch returns [bins, segments, width] instead of every
token. L2 normalization is done on the host in float32 (engine/finish.py).

Source of the definitions: sentence-transformers ``models/Pooling.py`` and ``models/Dense.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from npu_proxy.batch import BLOCK
from npu_proxy.graph.activations import TORCH_ACTIVATIONS
from npu_proxy.graph.inputs import BatchInputs
from npu_proxy.graph.layers import layer_norm, linear
from npu_proxy.graph.nodes import Node, constant, integers, op, to_grid
from npu_proxy.spec import DenseModule, LayerNormModule, Module, NormalizeModule, SpladeConfig, TruncateModule
from npu_proxy.types import Pooling

DEFAULT_SPLADE = SpladeConfig()


def pool(hidden: Node, inputs: BatchInputs, width: int) -> Node:
    """Token vectors [tokens, width] (or [bins * segments, width] of ``inputs.last_tokens``) -> [bins, segments, width]."""
    pooling = inputs.layout.pooling
    if pooling.prunes:
        return to_grid(hidden, inputs.last_tokens.grid, width)
    tokens = to_grid(hidden, inputs.all_tokens.grid, width)
    if pooling is Pooling.NONE:
        return tokens
    if pooling is Pooling.MAX:
        pooled = op.unsqueeze(op.greater(inputs.pool, constant(np.float32(0))), integers(3))
        lowest = constant(np.float32(-60000))  # finite in fp16
        return op.reduce_max(op.select(pooled, op.unsqueeze(tokens, integers(1)), lowest), integers(2), False)
    return op.matmul(inputs.pool, tokens, False, False)


def splade(logits: Node, inputs: BatchInputs, vocabulary: int, longest: int, config: SpladeConfig = DEFAULT_SPLADE) -> Node:
    """Logits [tokens, vocabulary] -> maximum (or sum) over each text of log(1 + relu(logit)), [bins, segments, vocabulary].

    Texts begin at multiples of BLOCK, so the maximum is taken within blocks first, which is the only step over all logits.
    Then each block takes the maximum with the block 1, 2, 4, ... further on in the same text, until the first block of a text
    contains the maximum of all its blocks. The logarithm is monotonic, so it is computed last. Sums of blocks are one matrix
    product. longest: tokens of the longest text. Source: Formal et al. 2021 (SPLADE v2).
    """
    # -60000 is finite in fp16.
    padding = op.select(op.less(inputs.segments, op.constant(np.int32(0))), constant(np.float32(-60000)), constant(np.float32(0)))
    masked = op.add(logits, op.reshape(padding, op.constant(np.array([-1, 1])), False))
    if config.sums:
        masked = _log(op.relu(masked), config)
    reduce = op.reduce_sum if config.sums else op.reduce_max
    blocks = reduce(op.reshape(masked, op.constant(np.array([-1, BLOCK, vocabulary])), False), integers(1), False)
    # The number of the block in which each block's text begins; it is equal only for blocks of the same text.
    offset = op.reshape(inputs.positions, op.constant(np.array([-1, BLOCK])), False)
    offset = op.divide(op.gather(offset, integers(0), integers(1)), op.constant(np.int32(BLOCK)))
    count = op.squeeze(op.shape_of(offset, "i32"), integers(0))
    numbers = op.range(op.constant(np.int32(0)), count, op.constant(np.int32(1)), "i32")
    begins = op.subtract(numbers, offset)
    bins = op.gather(inputs.all_tokens.grid, integers(0), integers(0))
    positions = op.gather(inputs.all_tokens.grid, integers(1), integers(0))
    starts = op.range(op.constant(np.int32(0)), op.convert(bins, "i32"), op.constant(np.int32(1)), "i32")
    starts = op.multiply(op.unsqueeze(starts, integers(1)), op.convert(positions, "i32"))
    first = op.divide(op.add(inputs.pool, starts), op.constant(np.int32(BLOCK)))
    if config.sums:
        own = op.equal(op.unsqueeze(first, integers(2)), op.unsqueeze(begins, integers(0, 1)))  # [bins, segments, blocks]
        return op.matmul(op.select(own, constant(np.float32(1)), constant(np.float32(0))), blocks, False, False)
    last = op.subtract(count, op.constant(np.int32(1)))
    step = 1
    while step * BLOCK < longest:
        ahead = op.minimum(op.add(numbers, op.constant(np.int32(step))), last)
        same_text = op.equal(op.gather(begins, ahead, integers(0)), begins)
        blocks = op.maximum(blocks, op.gather(blocks, op.select(same_text, ahead, numbers), integers(0)))
        step *= 2
    return _log(op.relu(op.gather(blocks, first, integers(0))), config)


def _log(x: Node, config: SpladeConfig) -> Node:
    """log(1 + x), once or twice."""
    one = constant(np.float32(1))
    logged = op.log(op.add(x, one))
    return op.log(op.add(logged, one)) if config.log_twice else logged


def apply_modules(x: Node, modules: Sequence[Module]) -> Node:
    """Apply modules of ``modules.json`` to ``x`` [..., width], in their order."""
    for module in modules:
        match module:
            case DenseModule():
                x = _dense(x, module)
            case LayerNormModule():
                x = layer_norm(x, module.weight, module.bias, module.epsilon)
            case NormalizeModule():
                length = op.reduce_l2(x, integers(-1), True)
                x = op.divide(x, op.maximum(length, constant(np.float32(1e-12))))
            case TruncateModule():
                axis, step = op.constant(np.array([-1])), op.constant(np.array([1]))
                x = op.slice(x, op.constant(np.array([0])), op.constant(np.array([module.width])), step, axis)
    return x


def _dense(x: Node, module: DenseModule) -> Node:
    output = TORCH_ACTIVATIONS[module.activation](linear(x, module.weight, module.bias))
    if not module.residual:
        return output
    projection = None if module.shape[0] == module.shape[1] else module.tensors["residual.weight"]
    return op.add(output, x if projection is None else linear(x, projection))


def multi_output(hidden: Node, inputs: BatchInputs, lexical: DenseModule, late: DenseModule, width: int) -> Node:
    """All outputs of bge-m3 in one tensor, [bins, positions, 1 + width]: the lexical weight of each token, then its vector.

    The vector of a text's first token is the dense vector, because late interaction does not use that token; the vectors of the
    other tokens are projected. Source: Chen et al. 2024 (M3-Embedding) and FlagEmbedding.
    """
    weight = op.relu(linear(hidden, lexical.weight, lexical.bias))
    first = op.equal(op.unsqueeze(inputs.positions, integers(1)), op.constant(np.int32(0)))
    vector = op.select(first, hidden, linear(hidden, late.weight, late.bias))
    return to_grid(op.concat([weight, vector], 1), inputs.all_tokens.grid, 1 + width)
