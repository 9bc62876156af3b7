"""The inputs of a batch inside the graph, the masks derived from them, and the tokens that a layer is computed for.

Everything except attention works on flat tokens [tokens, width], as one large matrix product that does not depend on the bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from npu_proxy.batch import UNATTENDED, BatchLayout, GraphShape
from npu_proxy.graph.nodes import Node, constant, integers, op, parameter, to_flat, to_grid

MASKED = -30000.0  # finite in fp16; its exp() is exactly zero in fp16 and fp32
"""Added to the attention score of a position that belongs to another text."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerTokens:
    """The tokens that a layer is computed for: all of them, or the one per text that pooling reads.

    grid: the shape [bins, n] as an operand. segments, positions: of these tokens, [bins, n]. index: their positions in their
    bins, [bins, n]; None for all tokens. count: number of tokens, -1 if dynamic. masks: masks made so far, shared by layers.
    """

    grid: Node
    segments: Node
    positions: Node
    index: Node | None
    count: int
    masks: dict[tuple[bool, int | None], Node] = field(default_factory=dict[tuple[bool, int | None], Node])

    def take(self, x: Node, grid: Node, width: int) -> Node:
        """Select these tokens from ``x`` [tokens, width], the tokens of a ``grid``."""
        if self.index is None:
            return x
        return to_flat(op.gather(to_grid(x, grid, width), self.index, integers(1), 1), -1, width)


@dataclass(frozen=True, kw_only=True)
class BatchInputs:
    """The input arrays of a batch as nodes.

    ids, positions, type_ids: [tokens] int32, flat; type_ids is None if tokens have no types. segments: the segments of attention
    keys, [bins, positions] int32; -1 is padding. pool: the pooling input (batch.fill_pooling), None if nothing is pooled.
    all_tokens: all tokens. last_tokens: the tokens that the last layer is computed for, fewer if pooling reads one per text.
    parameters: the inputs of the graph.
    """

    layout: BatchLayout
    ids: Node
    positions: Node
    type_ids: Node | None
    segments: Node
    pool: Node | None
    all_tokens: LayerTokens
    last_tokens: LayerTokens
    parameters: Sequence[Node]

    def layer_tokens(self, *, last: bool) -> LayerTokens:
        """The tokens that a layer is computed for."""
        return self.last_tokens if last else self.all_tokens


def batch_inputs(shape: GraphShape, layout: BatchLayout) -> BatchInputs:
    """Declare the inputs of a batch; their names are the keys of ``Batch.inputs``."""
    arrays = layout.inputs(shape.bins, shape.positions, shape.segments)
    inputs = {name: parameter(name, dimensions, element_type) for name, (dimensions, element_type) in arrays.items()}
    flat = op.constant(np.array([shape.tokens], np.int64))
    segments, positions, pool = inputs["segment_ids"], inputs["position_ids"], inputs.get("pool")
    attending = segments
    if layout.unattended:
        offset = op.constant(np.int32(UNATTENDED))
        attending = op.select(op.greater_equal(segments, offset), op.subtract(segments, offset), segments)
    all_tokens = LayerTokens(
        grid=_grid(segments, shape.bins, shape.positions),
        segments=attending,
        positions=positions,
        index=None,
        count=shape.tokens,
    )
    last_tokens = all_tokens
    if layout.pooling.prunes:
        # GatherElements instead of Gather, because on AVX-512 the CPU plugin of OpenVINO 2026.4 gathers wrong values, or reads
        # out of bounds, in batches of small rows (data [1, 64], indices [1, 8]).
        last_tokens = LayerTokens(
            grid=_grid(pool, shape.bins, shape.segments),
            segments=op.gather_elements(attending, pool, 1),
            positions=op.gather_elements(positions, pool, 1),
            index=pool,
            count=-1,
        )
    return BatchInputs(
        layout=layout,
        ids=op.reshape(inputs["input_ids"], flat, False),
        positions=op.reshape(positions, flat, False),
        type_ids=op.reshape(inputs["type_ids"], flat, False) if layout.type_ids else None,
        segments=segments,
        pool=pool,
        all_tokens=all_tokens,
        last_tokens=last_tokens,
        parameters=list(inputs.values()),
    )


def attention_mask(inputs: BatchInputs, tokens: LayerTokens, *, causal: bool = False, window: int | None = None) -> Node:
    """Additive attention mask [bins, 1, tokens, positions]: a token attends only to its own text.

    causal: and only to itself and earlier tokens. window: and only to tokens at most this many positions away.
    Padding (segment -1) attends to padding, so that no row of the softmax is empty.
    """
    if (causal, window) not in tokens.masks:
        tokens.masks[causal, window] = _mask(inputs, tokens, causal=causal, window=window)
    return tokens.masks[causal, window]


def _mask(inputs: BatchInputs, tokens: LayerTokens, *, causal: bool, window: int | None) -> Node:
    visible = op.equal(op.unsqueeze(tokens.segments, integers(2)), op.unsqueeze(inputs.segments, integers(1)))
    if causal or window is not None:
        distance = _distances(inputs, tokens)
        if causal:
            visible = op.logical_and(visible, op.less_equal(distance, op.constant(np.int32(0))))
        if window is not None:
            visible = op.logical_and(visible, op.less_equal(op.absolute(distance), op.constant(np.int32(window))))
    return op.unsqueeze(op.select(visible, constant(np.float32(0)), constant(np.float32(MASKED))), integers(1))


def _distances(inputs: BatchInputs, tokens: LayerTokens) -> Node:
    """Key position minus token position, [bins, tokens, positions] int32; meaningless between different texts."""
    keys = op.unsqueeze(inputs.all_tokens.positions, integers(1))
    return op.subtract(keys, op.unsqueeze(tokens.positions, integers(2)))


def _grid(node: Node, *dimensions: int) -> Node:
    """The first two dimensions of a node; a constant if they are known."""
    if min(dimensions) > 0:
        return op.constant(np.array(dimensions, np.int64))
    return op.gather(op.shape_of(node), op.constant(np.array([0, 1], np.int64)), integers(0))
