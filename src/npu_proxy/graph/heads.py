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

from npu_proxy.graph.packed import Node, RowInputs, constant, flat_rows, in_grid, integers, linear
from npu_proxy.types import Dense, Pooling


def fill_pool(pooling: Pooling, pool: npt.NDArray[np.generic], segment: int, start: int, count: int) -> None:
    """Write the pooling input of one text that lies at ``start`` to ``start + count`` of a bin.

    pool: the bin's part of the input, [segments] int32 positions or [segments, positions] float32 weights.
    """
    end = start + count
    match pooling:
        case Pooling.CLS:
            pool[segment] = start
        case Pooling.LAST_TOKEN:
            pool[segment] = end - 1
        case Pooling.MEAN:
            pool[segment, start:end] = 1 / count
        case Pooling.MEAN_SQRT_LENGTH:
            pool[segment, start:end] = count**-0.5
        case Pooling.WEIGHTED_MEAN:
            pool[segment, start:end] = np.arange(1, count + 1) / (count * (count + 1) / 2)
        case Pooling.MAX:
            pool[segment, start:end] = 1


def pool(hidden: Node, inputs: RowInputs, pooling: Pooling, width: int) -> Node:
    """Token vectors [tokens, width] (or [bins * segments, width], see ``wanted_rows``) -> [bins, segments, width]."""
    if pooling.by_index:
        return in_grid(hidden, inputs.pooled_grid, width)
    tokens = in_grid(hidden, inputs.grid, width)
    if pooling is Pooling.MAX:
        taken = op.unsqueeze(op.greater(inputs.pool, constant(np.float32(0))), integers(3))
        lowest = constant(np.float32(-60000))  # finite in fp16
        return op.reduce_max(op.select(taken, op.unsqueeze(tokens, integers(1)), lowest), integers(2), False)
    return op.matmul(inputs.pool, tokens, False, False)


def wanted_rows(x: Node, inputs: RowInputs, pooling: Pooling, width: int) -> Node:
    """The rows of ``x`` [tokens, width] that pooling will read: all of them, or one a text, [bins * segments, width]."""
    if not pooling.by_index:
        return x
    rows = op.gather(in_grid(x, inputs.grid, width), inputs.pool, integers(1), 1)
    return flat_rows(rows, -1, width)


def wanted_segments(inputs: RowInputs, pooling: Pooling) -> Node:
    """Segment numbers [bins, n] of those rows.

    GatherElements, because OpenVINO 2026.4's CPU plugin gathers wrongly, or reads beyond its memory, in batches of small
    rows on AVX-512 (data [1, 64], indices [1, 8]).
    """
    return op.gather_elements(inputs.segments, inputs.pool, 1) if pooling.by_index else inputs.segments


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
