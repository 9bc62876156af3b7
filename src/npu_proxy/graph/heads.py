"""What stands on top of an encoder: pooling of the tokens of each text, then Dense modules.

Pooling is one gather (cls, last token) or one matrix product (the mean family), so a row returns [bins, segments,
width] and not every token. L2 normalization is not here: the host does it in float32 (engine/finish.py).

Source of the definitions: sentence-transformers ``models/Pooling.py`` and ``models/Dense.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from openvino import opset15 as op

from npu_proxy.graph.layers import linear
from npu_proxy.graph.packed import BLOCK, Node, RowInputs, constant, in_grid, integers
from npu_proxy.types import Dense, Pooling


def fill_pool(pooling: Pooling, pool: npt.NDArray[np.generic], segment: int, start: int, count: int, skip: int = 0) -> None:
    """Write the pooling input of one text that lies at ``start`` to ``start + count`` of a bin.

    pool: the bin's part of the input, [segments] int32 positions or [segments, positions] float32 weights.
    skip: leading tokens that are not pooled (a prompt's); CLS and the last token are read wherever they are.
    """
    end = start + count
    match pooling:
        case Pooling.CLS | Pooling.SPLADE:
            pool[segment] = start
        case Pooling.LAST_TOKEN:
            pool[segment] = end - 1
        case Pooling.MEAN:
            pool[segment, start + skip : end] = 1 / (count - skip)
        case Pooling.MEAN_SQRT_LENGTH:
            pool[segment, start + skip : end] = (count - skip) ** -0.5
        case Pooling.WEIGHTED_MEAN:
            weights = np.arange(1, count + 1)[skip:]
            pool[segment, start + skip : end] = weights / weights.sum()
        case Pooling.MAX:
            pool[segment, start + skip : end] = 1
        case Pooling.NONE:
            pass


def pool(hidden: Node, inputs: RowInputs, width: int) -> Node:
    """Token vectors [tokens, width] (or [bins * segments, width] of ``inputs.last``) -> [bins, segments, width]."""
    pooling = inputs.format.pooling
    if pooling.prunes:
        return in_grid(hidden, inputs.last.grid, width)
    tokens = in_grid(hidden, inputs.every.grid, width)
    if pooling is Pooling.NONE:
        return tokens
    if pooling is Pooling.MAX:
        taken = op.unsqueeze(op.greater(inputs.pool, constant(np.float32(0))), integers(3))
        lowest = constant(np.float32(-60000))  # finite in fp16
        return op.reduce_max(op.select(taken, op.unsqueeze(tokens, integers(1)), lowest), integers(2), False)
    return op.matmul(inputs.pool, tokens, False, False)


def splade(logits: Node, inputs: RowInputs, vocabulary: int, longest: int) -> Node:
    """Logits [tokens, vocabulary] -> max over a text of log(1 + relu(logit)), [bins, segments, vocabulary].

    Texts begin at multiples of BLOCK, so the maximum is taken over blocks first, which is the only step over all logits.
    Then blocks take the maximum with the block 1, 2, 4, ... behind them in the same text, until the first block of a text has
    that of all. The logarithm is monotonic, so it comes last. longest: tokens of a text at most.
    Source: Formal et al. 2021 (SPLADE v2).
    """
    padding = op.select(
        op.less(inputs.segments, op.constant(np.int32(0))), constant(np.float32(-60000)), constant(np.float32(0))
    )  # finite in fp16
    masked = op.add(logits, op.reshape(padding, op.constant(np.array([-1, 1])), False))
    blocks = op.reduce_max(op.reshape(masked, op.constant(np.array([-1, BLOCK, vocabulary])), False), integers(1), False)
    # Where the text of each block begins, in blocks: equal for blocks of one text only.
    inside = op.reshape(inputs.positions, op.constant(np.array([-1, BLOCK])), False)
    inside = op.divide(op.gather(inside, integers(0), integers(1)), op.constant(np.int32(BLOCK)))
    count = op.squeeze(op.shape_of(inside, "i32"), integers(0))
    numbers = op.range(op.constant(np.int32(0)), count, op.constant(np.int32(1)), "i32")
    begins = op.subtract(numbers, inside)
    last = op.subtract(count, op.constant(np.int32(1)))
    step = 1
    while step * BLOCK < longest:
        behind = op.minimum(op.add(numbers, op.constant(np.int32(step))), last)
        same = op.equal(op.gather(begins, behind, integers(0)), begins)
        blocks = op.maximum(blocks, op.gather(blocks, op.select(same, behind, numbers), integers(0)))
        step *= 2
    bins = op.gather(inputs.every.grid, integers(0), integers(0))
    positions = op.gather(inputs.every.grid, integers(1), integers(0))
    starts = op.range(op.constant(np.int32(0)), op.convert(bins, "i32"), op.constant(np.int32(1)), "i32")
    starts = op.multiply(op.unsqueeze(starts, integers(1)), op.convert(positions, "i32"))
    first = op.divide(op.add(inputs.pool, starts), op.constant(np.int32(BLOCK)))
    return op.log(op.add(op.relu(op.gather(blocks, first, integers(0))), constant(np.float32(1))))


ACTIVATIONS: dict[str, Callable[[Node], Node]] = {
    "torch.nn.modules.linear.Identity": lambda x: x,
    "torch.nn.modules.activation.Tanh": op.tanh,
    "torch.nn.modules.activation.ReLU": op.relu,
    "torch.nn.modules.activation.Sigmoid": op.sigmoid,
    "torch.nn.modules.activation.GELU": lambda x: op.gelu(x, "erf"),
    "torch.nn.modules.activation.SiLU": op.swish,
}
"""Dense activations by the name that sentence-transformers stores."""


def dense(x: Node, modules: Sequence[Dense]) -> Node:
    """Apply the Dense modules of ``modules.json`` in their order."""
    for module in modules:
        x = ACTIVATIONS[module.activation](linear(x, module.weight, module.bias))
    return x


def multi(hidden: Node, inputs: RowInputs, lexical: Dense, late: Dense, width: int) -> Node:
    """bge-m3's answers of every token in one, [bins, positions, 1 + width]: its lexical weight, then a vector.

    The vector of a text's first token is the dense one, because late interaction leaves that token out; those of the others
    are projected. Source: Chen et al. 2024 (M3-Embedding) and FlagEmbedding.
    """
    weight = op.relu(linear(hidden, lexical.weight, lexical.bias))
    first = op.equal(op.unsqueeze(inputs.positions, integers(1)), op.constant(np.int32(0)))
    vector = op.select(first, hidden, linear(hidden, late.weight, late.bias))
    return in_grid(op.concat([weight, vector], 1), inputs.every.grid, 1 + width)
