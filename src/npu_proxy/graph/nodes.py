"""Nodes of an OpenVINO graph, and small functions that make them.

OpenVINO is imported when the first node is made, so that the names and checks of a model family can be used without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

Config = Mapping[str, Any]
"""What config.json says, by the names of a family's ``KEYS``."""
Weights = Mapping[str, npt.NDArray[Any]]
"""Tensors by name."""
Node = Any  # ov.Node and ov.Output are interchangeable as operands; the bindings have no useful types for them


class _Opset:
    """OpenVINO's operation set 15, imported on first use."""

    def __getattr__(self, name: str) -> Any:
        operation = getattr(import_module("openvino.opset15"), name)
        setattr(self, name, operation)
        return operation


op: Any = _Opset()


def parameter(name: str, dimensions: tuple[int, ...], element_type: type) -> Node:
    """An input of the graph; -1 is a dynamic dimension."""
    ov = import_module("openvino")
    node: Node = op.parameter(ov.PartialShape(list(dimensions)), element_type, name=name)
    node.output(0).set_names({name})
    return node


def constant(array: npt.ArrayLike) -> Node:
    """A constant that shares the array's memory if it is contiguous."""
    return op.constant(np.ascontiguousarray(array), shared_memory=True)


def integers(*values: int) -> Node:
    """An int64 constant for axes and shapes: rank 0 for one value, rank 1 for several."""
    return op.constant(np.array(values if len(values) > 1 else sum(values), np.int64))


def to_grid(x: Node, grid: Node, *last: int) -> Node:
    """Reshape [tokens, ...] to [bins, n, *last] for a grid [bins, n]."""
    pattern = op.concat([grid, op.constant(np.array(last, np.int64))], 0)
    return op.reshape(x, pattern, False)


def to_flat(x: Node, tokens: int, width: int) -> Node:
    """Reshape [bins, n, ...] to [tokens, width]; tokens is bins * n, or -1."""
    return op.reshape(x, op.constant(np.array([tokens, width], np.int64)), False)
