"""Activations by their names in config.json and in sentence-transformers' modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from npu_proxy.batch import GraphStyle
from npu_proxy.graph.nodes import Node, constant, op

# erf(z) = z P(z^2) / Q(z^2) for |z| <= 4, within 2e-7; beyond that it is 1 in float32; coefficients as in Eigen (MPL 2.0) and XLA.
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


def gelu(x: Node, style: GraphStyle) -> Node:
    """GELU with the exact error function, x Phi(x) (Hendrycks and Gimpel 2016)."""
    if not style.rational_gelu:
        return op.gelu(x, "erf")
    z = op.clamp(op.multiply(x, constant(np.float32(0.5**0.5))), -4.0, 4.0)
    square = op.multiply(z, z)
    erf = op.divide(op.multiply(z, _polynomial(square, _ERF_P)), _polynomial(square, _ERF_Q))
    half = op.multiply(x, constant(np.float32(0.5)))
    return op.add(op.multiply(half, erf), half)


def _polynomial(x: Node, coefficients: Sequence[float]) -> Node:
    """Evaluate a polynomial with Horner's rule. coefficients: highest power first."""
    result = constant(np.float32(coefficients[0]))
    for coefficient in coefficients[1:]:
        result = op.add(op.multiply(result, x), constant(np.float32(coefficient)))
    return result


ACTIVATIONS: Mapping[str, Callable[[Node, GraphStyle], Node]] = {
    "gelu": gelu,
    "gelu_new": lambda x, _: op.gelu(x, "tanh"),
    "gelu_pytorch_tanh": lambda x, _: op.gelu(x, "tanh"),
    "gelu_fast": lambda x, _: op.gelu(x, "tanh"),
    "gelu_accurate": lambda x, _: op.gelu(x, "tanh"),
    "gelu_python_tanh": lambda x, _: op.gelu(x, "tanh"),
    "gelu_python": gelu,
    "quick_gelu": lambda x, _: op.multiply(x, op.sigmoid(op.multiply(x, constant(np.float32(1.702))))),
    "mish": lambda x, _: op.mish(x),
    "relu": lambda x, _: op.relu(x),
    "relu6": lambda x, _: op.clamp(x, 0.0, 6.0),
    "relu2": lambda x, _: op.multiply(op.relu(x), op.relu(x)),
    "sigmoid": lambda x, _: op.sigmoid(x),
    "linear": lambda x, _: x,
    "silu": lambda x, _: op.swish(x),
    "swish": lambda x, _: op.swish(x),
    "tanh": lambda x, _: op.tanh(x),
}

TORCH_ACTIVATIONS: Mapping[str, Callable[[Node], Node]] = {
    "torch.nn.modules.linear.Identity": lambda x: x,
    "torch.nn.modules.activation.Tanh": lambda x: op.tanh(x),
    "torch.nn.modules.activation.ReLU": lambda x: op.relu(x),
    "torch.nn.modules.activation.Sigmoid": lambda x: op.sigmoid(x),
    "torch.nn.modules.activation.GELU": lambda x: op.gelu(x, "erf"),
    "torch.nn.modules.activation.SiLU": lambda x: op.swish(x),
    "torch.nn.modules.activation.Mish": lambda x: op.mish(x),
    "torch.nn.modules.activation.Softplus": lambda x: op.softplus(x),
}
"""Activations of Dense modules by the names that sentence-transformers stores."""
