"""Rows: what every family shares. Inputs of a row, the mask that keeps texts apart, and small wrappers over opset calls.

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

Weights = Mapping[str, npt.NDArray[Any]]
Node = Any  # ov.Node and ov.Output are interchangeable as operands; the bindings carry no useful types for them

MASKED = -30000.0  # finite in fp16; exp() of it is an exact zero in fp16 and fp32
"""Added to the attention score of a position that belongs to another text."""


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


@dataclass(frozen=True, kw_only=True)
class RowInputs:
    """The inputs of a row, integers as int32, and its measures inside the graph.

    ids, positions: [tokens], flat. segments: [bins, positions]; -1 is padding.
    pool: what graph.heads reads: [bins, segments, positions] float32 token weights, or [bins, segments] int32 positions.
    grid, pooled_grid: the shapes [bins, positions] and [bins, segments], as operands.
    tokens: positions in the row, -1 where dynamic. parameters: what the model is made with.
    """

    ids: Node
    positions: Node
    segments: Node
    pool: Node
    grid: Node
    pooled_grid: Node
    tokens: int
    parameters: Sequence[Node]


def row_inputs(form: Form, *, pool_by_index: bool) -> RowInputs:
    """Declare the inputs of a row; their names are the keys of ``Pack.inputs``."""
    grid = [form.bins, form.positions]
    pool_shape = [form.bins, form.segments, *([] if pool_by_index else [form.positions])]
    ids = _parameter("input_ids", np.int32, grid)
    positions = _parameter("position_ids", np.int32, grid)
    segments = _parameter("segment_ids", np.int32, grid)
    pool = _parameter("pool", np.int32 if pool_by_index else np.float32, pool_shape)
    flat = op.constant(np.array([form.tokens], np.int64))
    return RowInputs(
        ids=op.reshape(ids, flat, False),
        positions=op.reshape(positions, flat, False),
        segments=segments,
        pool=pool,
        grid=_measures(segments, grid),
        pooled_grid=_measures(pool, pool_shape[:2]),
        tokens=form.tokens,
        parameters=[ids, positions, segments, pool],
    )


def _parameter(name: str, kind: type, shape: Sequence[int]) -> Node:
    node: Node = op.parameter(ov.PartialShape(list(shape)), kind, name=name)
    node.output(0).set_names({name})
    return node


def _measures(node: Node, shape: Sequence[int]) -> Node:
    """The first two dimensions of a node: a constant where they are known."""
    if min(shape) > 0:
        return op.constant(np.array(shape, np.int64))
    return op.gather(op.shape_of(node), op.constant(np.array([0, 1], np.int64)), integers(0))


def segment_mask(queries: Node, keys: Node) -> Node:
    """Additive attention mask [bins, 1, q, k] from segment numbers [bins, q] and [bins, k].

    Padding (-1) attends to padding, so that no softmax row is empty.
    """
    same = op.equal(op.unsqueeze(queries, integers(2)), op.unsqueeze(keys, integers(1)))
    mask = op.select(same, constant(np.float32(0)), constant(np.float32(MASKED)))
    return op.unsqueeze(mask, integers(1))


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


def linear(x: Node, weight: npt.NDArray[Any], bias: npt.NDArray[Any] | None) -> Node:
    """``x @ weight.T + bias`` with the weight as checkpoints store it, [out, in]."""
    product = op.matmul(x, constant(weight), False, True)
    return product if bias is None else op.add(product, constant(bias))


def layer_norm(x: Node, weight: npt.NDArray[Any], bias: npt.NDArray[Any], epsilon: float) -> Node:
    """Layer normalization over the last axis."""
    normed = op.mvn(x, op.constant(np.array([-1], np.int64)), True, epsilon, "INSIDE_SQRT")
    return op.add(op.multiply(normed, constant(weight)), constant(bias))


def split_heads(x: Node, grid: Node, heads: int, head_width: int) -> Node:
    """[tokens, heads * head_width] -> [bins, heads, n, head_width] for a grid [bins, n]."""
    return op.transpose(in_grid(x, grid, heads, head_width), integers(0, 2, 1, 3))


def merge_heads(x: Node, rows: int, width: int) -> Node:
    """[bins, heads, n, head_width] -> [rows, width]."""
    return flat_rows(op.transpose(x, integers(0, 2, 1, 3)), rows, width)


def attend(query: Node, key: Node, value: Node, mask: Node, head_width: int, style: Style) -> Node:
    """Attention over [bins, heads, n, head_width] -> the same shape."""
    scale = constant(np.float32(head_width**-0.5))
    if not style.open_attention:
        return op.scaled_dot_product_attention(query, key, value, mask, scale, causal=False)
    scores = op.add(op.matmul(op.multiply(query, scale), key, False, True), mask)
    return op.matmul(op.softmax(scores, 3), value, False, False)


# erf(z) = z P(z^2) / Q(z^2) on |z| <= 4 to 2e-7, beyond it 1 to float32; coefficients as in Eigen (MPL 2.0) and XLA.
_ERF_P = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_Q = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


def gelu(x: Node, style: Style) -> Node:
    """GELU with the exact error function (Hendrycks and Gimpel 2016), x Phi(x)."""
    if not style.rational_gelu:
        return op.gelu(x, "erf")
    z = op.clamp(op.multiply(x, constant(np.float32(0.5**0.5))), -4.0, 4.0)
    square = op.multiply(z, z)
    erf = op.divide(op.multiply(z, _polynomial(square, _ERF_P)), _polynomial(square, _ERF_Q))
    half = op.multiply(x, constant(np.float32(0.5)))
    return op.add(op.multiply(half, erf), half)


def _polynomial(x: Node, coefficients: Sequence[float]) -> Node:
    """Horner's rule, highest power first."""
    result = constant(np.float32(coefficients[0]))
    for coefficient in coefficients[1:]:
        result = op.add(op.multiply(result, x), constant(np.float32(coefficient)))
    return result
