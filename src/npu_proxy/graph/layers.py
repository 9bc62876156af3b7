"""The layers of model families: linear layers, norms, attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from npu_proxy.batch import GraphStyle
from npu_proxy.graph.inputs import BatchInputs, LayerTokens
from npu_proxy.graph.nodes import Node, constant, integers, op, to_flat, to_grid


def linear(x: Node, weight: npt.NDArray[Any], bias: npt.NDArray[Any] | None = None) -> Node:
    """``x @ weight.T + bias``, with the weight [out, in] as in checkpoints."""
    product = op.matmul(x, constant(weight), False, True)
    return product if bias is None else op.add(product, constant(bias))


def layer_norm(x: Node, weight: npt.NDArray[Any], bias: npt.NDArray[Any] | None, epsilon: float) -> Node:
    """Layer normalization over the last axis (Ba et al. 2016)."""
    normed = op.mvn(x, op.constant(np.array([-1], np.int64)), True, epsilon, "INSIDE_SQRT")
    scaled = op.multiply(normed, constant(weight))
    return scaled if bias is None else op.add(scaled, constant(bias))


def rms_norm(weight: npt.NDArray[np.float32], x: Node, epsilon: float) -> Node:
    """Root mean square normalization over the last axis (Zhang and Sennrich 2019)."""
    square = op.reduce_mean(op.multiply(x, x), integers(-1), True)
    length = op.sqrt(op.add(square, constant(np.float32(epsilon))))
    return op.multiply(op.divide(x, length), constant(weight))


@dataclass(frozen=True, kw_only=True)
class FusedLinear:
    """Stacked linear layers with the same input: weight [sum of sizes, in], bias [sum of sizes] or None."""

    weight: npt.NDArray[Any]
    bias: npt.NDArray[Any] | None
    sizes: Sequence[int]

    def select(self, first: int, last: int) -> FusedLinear:
        """Layers ``first`` up to, but not including, ``last``. The arrays are views."""
        ends = np.cumsum([0, *self.sizes])
        span = slice(ends[first], ends[last])
        bias = None if self.bias is None else self.bias[span]
        return FusedLinear(weight=self.weight[span], bias=bias, sizes=self.sizes[first:last])

    def __call__(self, x: Node) -> Sequence[Node]:
        """The output of each layer, computed in one matrix product."""
        product = linear(x, self.weight, self.bias)
        return op.variadic_split(product, integers(-1), op.constant(np.array(self.sizes))).outputs()


# -- attention -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Attention heads. count: of queries. shared: of keys and values; fewer if queries share them (GQA)."""

    count: int
    width: int
    scale: float
    shared: int

    @classmethod
    def of(cls, count: int, width: int) -> Heads:
        """Multi-head attention as in Vaswani et al. 2017."""
        return cls(count=count, width=width, scale=width**-0.5, shared=count)


def split_heads(x: Node, grid: Node, heads: int, head_width: int) -> Node:
    """[tokens, heads * head_width] -> [bins, heads, n, head_width] for a grid [bins, n]."""
    return op.transpose(to_grid(x, grid, heads, head_width), integers(0, 2, 1, 3))


def merge_heads(x: Node, tokens: int, width: int) -> Node:
    """[bins, heads, n, head_width] -> [tokens, width], the inverse of ``split_heads``."""
    return to_flat(op.transpose(x, integers(0, 2, 1, 3)), tokens, width)


def repeat_heads(x: Node, heads: int, shared: int) -> Node:
    """[bins, shared, n, head_width] -> [bins, heads, n, head_width]: repeat the heads of keys or values for grouped queries."""
    return x if heads == shared else op.gather(x, op.constant(np.repeat(np.arange(shared), heads // shared)), integers(1))


def attend(query: Node, key: Node, value: Node, mask: Node, scale: float, style: GraphStyle) -> Node:
    """Attention over [bins, heads, n, head_width] -> the same shape. mask: additive, broadcast to the scores."""
    factor = constant(np.float32(scale))
    if not style.open_attention:
        return op.scaled_dot_product_attention(query, key, value, mask, factor, causal=False)
    scores = op.add(op.matmul(op.multiply(query, factor), key, False, True), mask)
    return op.matmul(op.softmax(scores, 3), value, False, False)


def project(x: Node, tokens: LayerTokens, inputs: BatchInputs, fused: FusedLinear, heads: Heads) -> tuple[Node, Node, Node]:
    """Queries of ``tokens``, keys and values of all tokens ``x`` [tokens, width] -> [bins, heads, n, head width].

    Computed in one matrix product, or in two if ``tokens`` are not all tokens: one for queries, one for keys and values.
    """
    if tokens.index is None:
        query, key, value = fused(x)
    else:
        (query,) = fused.select(0, 1)(tokens.take(x, inputs.all_tokens.grid, fused.weight.shape[1]))
        key, value = fused.select(1, 3)(x)
    all_tokens = inputs.all_tokens.grid
    return (
        split_heads(query, tokens.grid, heads.count, heads.width),
        split_heads(key, all_tokens, heads.shared, heads.width),
        split_heads(value, all_tokens, heads.shared, heads.width),
    )


Transform = Callable[[Node, LayerTokens], Node]
"""Transforms queries or keys [bins, heads, n, head width] of tokens, such as by a rotation."""


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Attention of a layer. transforms: one for queries and one for keys, or one for both, or none."""

    heads: Heads
    mask: Node
    style: GraphStyle
    transforms: Sequence[Transform] = ()

    def __call__(self, x: Node, tokens: LayerTokens, inputs: BatchInputs, fused: FusedLinear) -> Node:
        """Self-attention of ``x`` [tokens, width], computed for ``tokens`` -> [those tokens, heads * head width]."""
        heads = self.heads
        query, key, value = project(x, tokens, inputs, fused, heads)
        if self.transforms:
            query, key = self.transforms[0](query, tokens), self.transforms[-1](key, inputs.all_tokens)
        key, value = (repeat_heads(each, heads.count, heads.shared) for each in (key, value))
        attended = attend(query, key, value, self.mask, heads.scale, self.style)
        return merge_heads(attended, tokens.count, heads.count * heads.width)
