"""Layers that families are made of: products, norms, activations, attention, rotation. Small wrappers over opset calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from openvino import opset15 as op

from npu_proxy.errors import ModelError
from npu_proxy.graph.packed import Node, RowInputs, Rows, Style, Weights, constant, flat_rows, in_grid, integers


def linear(x: Node, weight: npt.NDArray[Any], bias: npt.NDArray[Any] | None = None) -> Node:
    """``x @ weight.T + bias`` with the weight as checkpoints store it, [out, in]."""
    product = op.matmul(x, constant(weight), False, True)
    return product if bias is None else op.add(product, constant(bias))


def dense(weights: Weights, name: str, x: Node, *, bias: bool = True) -> Node:
    """The linear layer of that name."""
    return linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"] if bias else None)


def layer_norm(weights: Weights, name: str, x: Node, epsilon: float, *, bias: bool = True) -> Node:
    """Layer normalization over the last axis (Ba et al. 2016)."""
    normed = op.mvn(x, op.constant(np.array([-1], np.int64)), True, epsilon, "INSIDE_SQRT")
    scaled = op.multiply(normed, constant(weights[f"{name}.weight"]))
    return op.add(scaled, constant(weights[f"{name}.bias"])) if bias else scaled


def rms_norm(weight: npt.NDArray[np.float32], x: Node, epsilon: float) -> Node:
    """Root mean square normalization over the last axis (Zhang and Sennrich 2019)."""
    square = op.reduce_mean(op.multiply(x, x), integers(-1), True)
    length = op.sqrt(op.add(square, constant(np.float32(epsilon))))
    return op.multiply(op.divide(x, length), constant(weight))


def split_heads(x: Node, grid: Node, heads: int, head_width: int) -> Node:
    """[tokens, heads * head_width] -> [bins, heads, n, head_width] for a grid [bins, n]."""
    return op.transpose(in_grid(x, grid, heads, head_width), integers(0, 2, 1, 3))


def merge_heads(x: Node, rows: int, width: int) -> Node:
    """[bins, heads, n, head_width] -> [rows, width]."""
    return flat_rows(op.transpose(x, integers(0, 2, 1, 3)), rows, width)


def share_heads(x: Node, heads: int, shared: int) -> Node:
    """[bins, shared, n, head_width] -> [bins, heads, n, head_width]: each head of keys or values serves several of queries."""
    return x if heads == shared else op.gather(x, op.constant(np.repeat(np.arange(shared), heads // shared)), integers(1))


def attend(query: Node, key: Node, value: Node, mask: Node, scale: float, style: Style) -> Node:
    """Attention over [bins, heads, n, head_width] -> the same shape. mask: additive, it broadcasts to the scores."""
    factor = constant(np.float32(scale))
    if not style.open_attention:
        return op.scaled_dot_product_attention(query, key, value, mask, factor, causal=False)
    scores = op.add(op.matmul(op.multiply(query, factor), key, False, True), mask)
    return op.matmul(op.softmax(scores, 3), value, False, False)


@dataclass(frozen=True, kw_only=True)
class Joint:
    """Linear layers of one input, one below the other: weight [sum of sizes, in], bias [sum of sizes] or None."""

    weight: npt.NDArray[Any]
    bias: npt.NDArray[Any] | None
    sizes: Sequence[int]

    def part(self, first: int, last: int) -> Joint:
        """Layers ``first`` to before ``last``; the numbers are shared."""
        ends = np.cumsum([0, *self.sizes])
        span = slice(ends[first], ends[last])
        return Joint(weight=self.weight[span], bias=None if self.bias is None else self.bias[span], sizes=self.sizes[first:last])

    def __call__(self, x: Node) -> Sequence[Node]:
        """Their answers, by one product."""
        product = linear(x, self.weight, self.bias)
        return op.variadic_split(product, integers(-1), op.constant(np.array(self.sizes))).outputs()


def joint(weights: Weights, names: Sequence[str], stored: str = "", *, bias: bool = True) -> Joint:
    """The layers of those names as one; ``stored`` is the name under which checkpoints may hold them so, which costs no copy."""
    if stored and f"{stored}.weight" in weights:
        weight = weights[f"{stored}.weight"]
        sizes = [len(weight) // len(names)] * len(names)
        return Joint(weight=weight, bias=weights[f"{stored}.bias"] if bias else None, sizes=sizes)
    parts = [weights[f"{name}.weight"] for name in names]
    biases = np.concatenate([weights[f"{name}.bias"] for name in names]) if bias else None
    return Joint(weight=np.concatenate(parts), bias=biases, sizes=[len(part) for part in parts])


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Heads of attention: how many, how many of keys and values (fewer, where each serves several), their width and scale."""

    count: int
    width: int
    scale: float
    shared: int

    @classmethod
    def of(cls, count: int, width: int) -> Heads:
        """As Vaswani et al. 2017 have them."""
        return cls(count=count, width=width, scale=width**-0.5, shared=count)


def project(x: Node, rows: Rows, inputs: RowInputs, parts: Joint, heads: Heads) -> tuple[Node, Node, Node]:
    """Query of ``rows``, key and value of all tokens ``x`` [tokens, width] -> [bins, heads, n, head width].

    One product, or where the rows are few one for them and one for all tokens.
    """
    if rows.index is None:
        query, key, value = parts(x)
    else:
        (query,) = parts.part(0, 1)(rows.take(x, inputs.every.grid, parts.weight.shape[1]))
        key, value = parts.part(1, 3)(x)
    every = inputs.every.grid
    return (
        split_heads(query, rows.grid, heads.count, heads.width),
        split_heads(key, every, heads.shared, heads.width),
        split_heads(value, every, heads.shared, heads.width),
    )


Turn = Callable[[Node, Rows], Node]
"""What is done to queries or keys [bins, heads, n, head width] of those rows."""


def self_attention(
    x: Node, rows: Rows, inputs: RowInputs, parts: Joint, heads: Heads, mask: Node, style: Style, *turns: Turn
) -> Node:
    """Attention of tokens ``x`` [tokens, width] for ``rows`` -> [rows, heads * head width].

    turns: what is done to queries, then to keys; one for both, none where nothing is done.
    """
    query, key, value = project(x, rows, inputs, parts, heads)
    if turns:
        query, key = turns[0](query, rows), turns[-1](key, inputs.every)
    key, value = (share_heads(each, heads.count, heads.shared) for each in (key, value))
    return merge_heads(attend(query, key, value, mask, heads.scale, style), rows.flat, heads.count * heads.width)


# -- rotation ----------------------------------------------------------------------------------------------------------


class Rotation:
    """Rotary position embedding (Su et al. 2021), the two halves of a head rotated against each other.

    The tables are gathered by position once a graph, not once a layer.
    """

    def __init__(self, *, width: int, theta: float, limit: int, factor: float = 1.0, ntk: bool = False) -> None:
        """width: of a head. limit: positions of the longest text. factor: of linear scaling, or of NTK's."""
        base = theta * (factor if ntk else 1.0)
        frequencies = 1.0 / base ** (np.arange(0, width, 2, dtype=np.float64) / width)
        frequencies = frequencies / (factor ** (2 / width) if ntk else factor)
        # As the reference has it: angles are products of float32.
        angles = np.arange(limit, dtype=np.float32)[:, None] * frequencies.astype(np.float32)
        angles = np.concatenate([angles, angles], axis=1).astype(np.float64)
        self._tables = [constant(table.astype(np.float32)) for table in (np.cos(angles), np.sin(angles))]
        self._half = width // 2
        self._made: dict[Rows, list[Node]] = {}

    def __call__(self, x: Node, rows: Rows) -> Node:
        """Rotate [bins, heads, n, width] of those rows."""
        if rows not in self._made:
            gathered = [op.gather(table, rows.positions, integers(0)) for table in self._tables]
            self._made[rows] = [op.unsqueeze(one, integers(1)) for one in gathered]  # [bins, 1, n, width]
        cosine, sine = self._made[rows]
        first, second = op.variadic_split(x, integers(-1), op.constant(np.array([self._half, self._half]))).outputs()
        turned = op.concat([op.negative(second), first], -1)
        return op.add(op.multiply(x, cosine), op.multiply(turned, sine))


def rotary(config: Mapping[str, Any], *, width: int, theta: float) -> Rotation:
    """The rotation that config.json describes, in the words of any version of transformers. Raises ModelError."""
    limit = int(config["max_length"])
    scaling: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default")) or "default"
    theta = float(scaling.get("rope_theta", config.get("rope_theta", theta)))
    if kind == "default":
        return Rotation(width=width, theta=theta, limit=limit)
    if kind not in ("linear", "ntk") or scaling.get("mixed_b") is not None:
        raise ModelError(f"config.json: rotary positions of type `{kind}` are not supported; known: default, linear, ntk")
    factor = float(scaling.get("factor", 1.0))
    return Rotation(width=width, theta=theta, limit=limit, factor=factor, ntk=kind == "ntk")


# -- activations -------------------------------------------------------------------------------------------------------

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


ACTIVATIONS: dict[str, Callable[[Node, Style], Node]] = {
    "gelu": gelu,
    "gelu_new": lambda x, _: op.gelu(x, "tanh"),
    "gelu_pytorch_tanh": lambda x, _: op.gelu(x, "tanh"),
    "relu": lambda x, _: op.relu(x),
    "silu": lambda x, _: op.swish(x),
    "swish": lambda x, _: op.swish(x),
    "tanh": lambda x, _: op.tanh(x),
}
"""Activations by the names that config.json has for them."""


def check_activation(config: Mapping[str, Any], key: str, default: str = "gelu") -> None:
    """Raise ModelError for an activation that is not known."""
    activation = config.get(key, default)
    if activation not in ACTIVATIONS:
        raise ModelError(f"config.json: {key} `{activation}` is not supported; known: {', '.join(ACTIVATIONS)}")
