"""Rotary position embedding (Su et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from npu_proxy.errors import ModelError
from npu_proxy.graph.inputs import LayerTokens
from npu_proxy.graph.nodes import Node, constant, integers, op


class Rotation:
    """Rotates queries and keys by their positions; pairs of numbers come from the two halves of a head.

    The tables are gathered by position once per graph, not once per layer.
    """

    def __init__(self, *, width: int, theta: float, limit: int, factor: float = 1.0, ntk: bool = False) -> None:
        """width: of a head. limit: number of positions in the longest text. factor: of linear or NTK scaling."""
        base = theta * (factor if ntk else 1.0)
        frequencies = 1.0 / base ** (np.arange(0, width, 2, dtype=np.float64) / width)
        frequencies = frequencies / (factor ** (2 / width) if ntk else factor)
        # As in the reference implementation, angles are products of float32 numbers.
        angles = np.arange(limit, dtype=np.float32)[:, None] * frequencies.astype(np.float32)
        angles = np.concatenate([angles, angles], axis=1).astype(np.float64)
        self._tables = [constant(table.astype(np.float32)) for table in (np.cos(angles), np.sin(angles))]
        self._half = width // 2
        self._gathered: dict[LayerTokens, list[Node]] = {}

    def __call__(self, x: Node, tokens: LayerTokens) -> Node:
        """Rotate ``x`` [bins, heads, n, width] of ``tokens``."""
        if tokens not in self._gathered:
            gathered = [op.gather(table, tokens.positions, integers(0)) for table in self._tables]
            self._gathered[tokens] = [op.unsqueeze(table, integers(1)) for table in gathered]  # [bins, 1, n, width]
        cosine, sine = self._gathered[tokens]
        first, second = op.variadic_split(x, integers(-1), op.constant(np.array([self._half, self._half]))).outputs()
        rotated = op.concat([op.negative(second), first], -1)
        return op.add(op.multiply(x, cosine), op.multiply(rotated, sine))


def rotary(config: Mapping[str, Any], *, width: int, theta: float) -> Rotation:
    """The rotation described by config.json of any version of transformers. Raises ModelError if it is not supported."""
    limit = int(config["max_length"])
    scaling: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = scaling.get("rope_type", scaling.get("type", "default")) or "default"
    theta = float(scaling.get("rope_theta", config.get("rope_theta", theta)))
    if rope_type == "default":
        return Rotation(width=width, theta=theta, limit=limit)
    if rope_type not in ("linear", "ntk") or scaling.get("mixed_b") is not None:
        raise ModelError(f"config.json: rotary positions of type `{rope_type}` are not supported; known: default, linear, ntk")
    factor = float(scaling.get("factor", 1.0))
    return Rotation(width=width, theta=theta, limit=limit, factor=factor, ntk=rope_type == "ntk")
