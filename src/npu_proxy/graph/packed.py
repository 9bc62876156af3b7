"""Rows: what every family shares. Inputs of a row, the masks that keep texts apart, and which rows a layer is computed for.

A row is ``bins`` bins of ``positions`` positions. Texts lie behind each other inside a bin; attention never leaves a
bin, and inside it the segment mask keeps texts apart, so a text's vector cannot depend on its neighbours. Everything
but attention works on flat rows [tokens, width], so that it sees one large matrix whatever the bins are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset15 as op

from npu_proxy.types import Kind, ModelSpec, Pooling

Weights = Mapping[str, npt.NDArray[Any]]
Node = Any  # ov.Node and ov.Output are interchangeable as operands; the bindings carry no useful types for them

MASKED = -30000.0  # finite in fp16; exp() of it is an exact zero in fp16 and fp32
"""Added to the attention score of a position that belongs to another text."""
UNSEEN = 1 << 14
"""Added to the segment number of tokens that see their text and that nobody sees (a query's expansion)."""
BLOCK = 8
"""Positions that a text begins at a multiple of, where the maximum over a text is taken (graph.heads.splade)."""


@dataclass(frozen=True, kw_only=True)
class RowShape:
    """The shape of one inference: ``bins`` x ``positions`` tokens and up to ``segments`` texts a bin.

    work: its cost among the shapes of a device (devices/shapes.py); by itself the number of tokens. Not part of equality.
    """

    bins: int
    positions: int
    segments: int
    work: float = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        if not self.work:
            object.__setattr__(self, "work", float(self.tokens))

    @property
    def tokens(self) -> int:
        """How many positions one inference computes."""
        return self.bins * self.positions

    def __str__(self) -> str:
        return f"{self.bins}x{self.positions}"


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """Which arrays go into a row of a model, and what comes out: the one place that says so.

    types: whether tokens have a type. unseen: whether there may be tokens that others do not attend to. per_token: whether
    every token has an answer. width: numbers in an answer.
    """

    pooling: Pooling
    types: bool = False
    unseen: bool = False
    per_token: bool = False
    width: int = 1

    @classmethod
    def of(cls, spec: ModelSpec) -> RowFormat:
        """The format of a model's rows."""
        return cls(
            pooling=spec.pooling,
            types=spec.types,
            unseen=spec.sides is not None and spec.sides.expand,
            per_token=spec.kind.per_token,
            width=spec.width + (spec.kind is Kind.MULTI),
        )

    @property
    def align(self) -> int:
        """Texts begin at multiples of so many positions."""
        return BLOCK if self.pooling is Pooling.SPLADE else 1

    def inputs(self, bins: int, positions: int, segments: int) -> dict[str, tuple[tuple[int, ...], type]]:
        """Dimensions and type of each input, by its name in the graph."""
        arrays: dict[str, tuple[tuple[int, ...], type]] = dict.fromkeys(
            ("input_ids", "position_ids", "segment_ids"), ((bins, positions), np.int32)
        )
        if self.types:
            arrays["type_ids"] = ((bins, positions), np.int32)
        if self.pooling.prunes or self.pooling is Pooling.SPLADE:
            arrays["pool"] = ((bins, segments), np.int32)
        elif self.pooling is not Pooling.NONE:
            arrays["pool"] = ((bins, segments, positions), np.float32)
        return arrays

    def output(self, bins: int, positions: int, segments: int) -> tuple[int, int, int]:
        """Dimensions of the float32 output."""
        return (bins, positions if self.per_token else segments, self.width)


@dataclass(frozen=True, kw_only=True)
class Style:
    """How to write what devices compute at different speeds; the numbers are the same to float32 rounding.

    rational_gelu: erf as a rational function of plain arithmetic, which the CPU plugin fuses into one vectorized loop
    (its own GELU costs a tenth of the whole model). open_attention: two products and a softmax in place of one
    attention operation.
    """

    rational_gelu: bool = False
    open_attention: bool = False


NATIVE = Style()
"""The operations as the opset has them; for accelerators, whose compilers know them."""
CPU = Style(rational_gelu=True, open_attention=True)


@dataclass(frozen=True, kw_only=True)
class Form:
    """Which rows a graph accepts: one shape, every shape of so many tokens, or every shape; -1 is dynamic.

    With ``tokens`` fixed and the bins dynamic, everything but attention still has static shapes.
    """

    bins: int = -1
    positions: int = -1
    segments: int = -1
    tokens: int = -1

    @classmethod
    def of(cls, shape: RowShape) -> Form:
        """One shape, static throughout: what an NPU takes."""
        return cls(bins=shape.bins, positions=shape.positions, segments=shape.segments, tokens=shape.tokens)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """The rows that a layer is computed for: every token, or the one a text that pooling reads.

    grid: the shape [bins, n] as an operand. segments, positions: [bins, n] of those rows. index: where they lie in their
    bins, [bins, n], None for every token. flat: how many rows, -1 where dynamic. masks: those made so far, which layers share.
    """

    grid: Node
    segments: Node
    positions: Node
    index: Node | None
    flat: int
    masks: dict[tuple[bool, int | None], Node] = field(default_factory=dict[tuple[bool, int | None], Node])

    def take(self, x: Node, grid: Node, width: int) -> Node:
        """Those rows of ``x`` [tokens, width], whose shape is ``grid``."""
        if self.index is None:
            return x
        return flat_rows(op.gather(in_grid(x, grid, width), self.index, integers(1), 1), -1, width)


@dataclass(frozen=True, kw_only=True)
class RowInputs:
    """The inputs of a row, integers as int32, and its measures inside the graph.

    ids, positions, types: [tokens], flat; types is None where there are none. segments: [bins, positions] as keys of
    attention have them; -1 is padding. pool: what graph.heads reads, None where nothing is pooled.
    every: all tokens as rows. last: the rows of the last layer, fewer where pooling reads one a text.
    parameters: what the model is made with.
    """

    format: RowFormat
    ids: Node
    positions: Node
    types: Node | None
    segments: Node
    pool: Node | None
    every: Rows
    last: Rows
    parameters: Sequence[Node]

    def rows(self, *, last: bool) -> Rows:
        """What a layer is computed for."""
        return self.last if last else self.every


def row_inputs(form: Form, layout: RowFormat) -> RowInputs:
    """Declare the inputs of a row; their names are the keys of ``Pack.inputs``."""
    arrays = layout.inputs(form.bins, form.positions, form.segments)
    given = {name: _parameter(name, kind, shape) for name, (shape, kind) in arrays.items()}
    flat = op.constant(np.array([form.tokens], np.int64))
    segments, places, pool = given["segment_ids"], given["position_ids"], given.get("pool")
    seeing = segments
    if layout.unseen:
        most = op.constant(np.int32(UNSEEN))
        seeing = op.select(op.greater_equal(segments, most), op.subtract(segments, most), segments)
    every = Rows(
        grid=_measures(segments, form.bins, form.positions), segments=seeing, positions=places, index=None, flat=form.tokens
    )
    last = every
    if layout.pooling.prunes:
        # GatherElements, because OpenVINO 2026.4's CPU plugin gathers wrongly, or reads beyond its memory, in batches of
        # small rows on AVX-512 (data [1, 64], indices [1, 8]).
        last = Rows(
            grid=_measures(pool, form.bins, form.segments),
            segments=op.gather_elements(seeing, pool, 1),
            positions=op.gather_elements(places, pool, 1),
            index=pool,
            flat=-1,
        )
    return RowInputs(
        format=layout,
        ids=op.reshape(given["input_ids"], flat, False),
        positions=op.reshape(places, flat, False),
        types=op.reshape(given["type_ids"], flat, False) if layout.types else None,
        segments=segments,
        pool=pool,
        every=every,
        last=last,
        parameters=list(given.values()),
    )


def attention_mask(inputs: RowInputs, rows: Rows, *, causal: bool = False, window: int | None = None) -> Node:
    """Additive attention mask [bins, 1, rows, positions]: a row sees its own text.

    causal: and nothing behind it. window: and nothing that is more positions away.
    Padding (segment -1) attends to padding, so that no softmax row is empty.
    """
    if (causal, window) not in rows.masks:
        rows.masks[causal, window] = _mask(inputs, rows, causal=causal, window=window)
    return rows.masks[causal, window]


def _mask(inputs: RowInputs, rows: Rows, *, causal: bool, window: int | None) -> Node:
    same = op.equal(op.unsqueeze(rows.segments, integers(2)), op.unsqueeze(inputs.segments, integers(1)))
    if causal or window is not None:
        away = distances(inputs, rows)
        if causal:
            same = op.logical_and(same, op.less_equal(away, op.constant(np.int32(0))))
        if window is not None:
            same = op.logical_and(same, op.less_equal(op.absolute(away), op.constant(np.int32(window))))
    return op.unsqueeze(op.select(same, constant(np.float32(0)), constant(np.float32(MASKED))), integers(1))


def distances(inputs: RowInputs, rows: Rows) -> Node:
    """Position of each key less that of each row, [bins, rows, positions] int32; within a text, else without meaning."""
    keys = op.unsqueeze(inputs.every.positions, integers(1))
    return op.subtract(keys, op.unsqueeze(rows.positions, integers(2)))


def _parameter(name: str, kind: type, shape: Sequence[int]) -> Node:
    node: Node = op.parameter(ov.PartialShape(list(shape)), kind, name=name)
    node.output(0).set_names({name})
    return node


def _measures(node: Node, *shape: int) -> Node:
    """The first two dimensions of a node: a constant where they are known."""
    if min(shape) > 0:
        return op.constant(np.array(shape, np.int64))
    return op.gather(op.shape_of(node), op.constant(np.array([0, 1], np.int64)), integers(0))


def in_grid(x: Node, grid: Node, *last: int) -> Node:
    """[tokens, ...] -> [bins, n, *last] for a grid [bins, n]."""
    pattern = op.concat([grid, op.constant(np.array(last, np.int64))], 0)
    return op.reshape(x, pattern, False)


def flat_rows(x: Node, rows: int, width: int) -> Node:
    """[bins, n, ...] -> [rows, width]; rows is bins * n, or -1."""
    return op.reshape(x, op.constant(np.array([rows, width], np.int64)), False)


def constant(array: npt.ArrayLike) -> Node:
    """A constant that shares the array's memory where it can (weights are memory-mapped and stay so)."""
    return op.constant(np.ascontiguousarray(array), shared_memory=True)


def integers(*values: int) -> Node:
    """A rank-0 (one value) or rank-1 int64 constant for axes and shapes."""
    return op.constant(np.array(values if len(values) > 1 else sum(values), np.int64))
