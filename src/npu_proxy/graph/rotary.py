"""Rotary position embedding (Su et al. 2021), and the ways to extend it to longer texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from npu_proxy.errors import ModelError
from npu_proxy.graph.inputs import LayerTokens
from npu_proxy.graph.keys import Stored, absent, flag, one_of, real, size, value_error
from npu_proxy.graph.nodes import Node, constant, integers, op

_LAYER_TYPES = ("full_attention", "sliding_attention")
ROTARY_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")
"""Values of `rope_type` that transformers and npu-proxy know."""


@dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """How positions are rotated: the base ``theta``, and how it is extended to more positions than the model was trained with.

    trained: number of those positions, for yarn and llama3. attention_factor: multiplies queries and keys, for yarn; None for its
    formula. low_frequency, high_frequency: turns within the trained length, below and above which llama3 changes all or nothing.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    trained: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    truncate: bool = True

    def frequencies(self, width: int) -> npt.NDArray[np.float64]:
        """The angle per position of each pair of numbers of a head, [width / 2]."""
        base = self.theta * (self.factor if self.kind == "ntk" else 1.0)
        frequencies = 1.0 / base ** (np.arange(0, width, 2, dtype=np.float64) / width)
        if self.kind == "linear":
            return frequencies / self.factor
        if self.kind == "ntk":  # of Alibaba's own code
            return frequencies / self.factor ** (2 / width)
        if self.kind == "yarn":
            kept = self._kept(width)
            return frequencies * kept + frequencies / self.factor * (1 - kept)
        if self.kind == "llama3":
            turns = self.trained * frequencies / (2 * math.pi)  # within the trained length
            kept = np.clip((turns - self.low_frequency) / (self.high_frequency - self.low_frequency), 0.0, 1.0)
            return frequencies * kept + frequencies / self.factor * (1 - kept)
        return frequencies

    @property
    def scale(self) -> float:
        """The factor of queries and keys. Source: Peng et al. 2023 (YaRN), section 3.4."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 1.0 if self.factor <= 1 else 0.1 * math.log(self.factor) + 1.0

    def _kept(self, width: int) -> npt.NDArray[np.float64]:
        """How much of each frequency is kept: 1 for those that turn often within the trained length, 0 for those that hardly do."""

        def dimension(turns: float) -> float:
            return width * math.log(self.trained / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        ramp = (np.arange(width // 2, dtype=np.float64) - low) / max(high - low, 0.001)
        kept: npt.NDArray[np.float64] = 1 - np.clip(ramp, 0.0, 1.0)
        return kept


def read_rotary(
    stored: Stored, *theta_names: str, theta: float, layer_type: str = "", kinds: Sequence[str] = ROTARY_KINDS
) -> RotaryConfig:
    """The rotation described by config.json of any version of transformers. Raises ModelError if it is not computed.

    theta_names: names of `rope_theta` in config.json. theta: its default. layer_type: the layers it is for, if layers differ.
    kinds: the values of `rope_type` that the family knows.
    """
    parameters = _parameters(stored, layer_type)
    found = [str(parameters[name]) for name in ("rope_type", "type") if parameters.get(name)] or ["default"]
    if any(kind not in kinds for kind in found) or len(set(found)) > 1:
        raise value_error("rope_scaling", " and ".join(found), f"only rotations of type {', '.join(kinds)}")
    stated: float | None = real(*(theta_names or ("rope_theta",)), default=None)(stored)
    base: float = real("rope_theta", default=theta if stated is None else stated)(parameters)
    if base <= 1:
        raise value_error("rope_theta", base, "numbers above 1")
    kind = found[0]
    if layer_type:  # transformers reads it elsewhere
        one_of("truncate", values=(True,), default=True)(parameters)
    one_of("partial_rotary_factor", values=(1.0,), default=1.0)(parameters)
    absent("mixed_b")(parameters)
    if kind == "default":
        return RotaryConfig(theta=base)
    factor: float = real("factor", default=1.0)(parameters)
    if factor < 1:
        raise value_error("factor", factor, "numbers of at least 1")
    positions: int = size("max_position_embeddings", "n_positions")(stored)
    trained: int = size("original_max_position_embeddings", default=positions)(parameters)
    if kind == "dynamic":  # as trained, up to the length from which on it would depend on the batch
        return RotaryConfig(theta=base)
    if kind == "llama3":
        low: float = real("low_freq_factor")(parameters)
        high: float = real("high_freq_factor")(parameters)
        if high <= low:
            raise value_error("high_freq_factor", high, "numbers above `low_freq_factor`")
        return RotaryConfig(theta=base, kind=kind, factor=factor, trained=trained, low_frequency=low, high_frequency=high)
    if kind != "yarn":
        return RotaryConfig(theta=base, kind=kind, factor=factor)
    absent("mscale")(parameters)
    absent("mscale_all_dim")(parameters)
    return RotaryConfig(
        theta=base,
        kind=kind,
        factor=factor,
        trained=trained,
        attention_factor=real("attention_factor", default=None)(parameters),
        beta_fast=real("beta_fast", default=32.0)(parameters),
        beta_slow=real("beta_slow", default=1.0)(parameters),
        truncate=flag("truncate", default=True)(parameters),
    )


def _parameters(stored: Stored, layer_type: str) -> Any:
    """The object that describes the rotation of the layers of this type."""
    new, old = stored.get("rope_parameters"), stored.get("rope_scaling")
    if new and old and new != old:
        raise ModelError("config.json: `rope_parameters` and `rope_scaling` contradict each other")
    parameters: Any = new or old or {}
    nested = any(name in parameters for name in _LAYER_TYPES)
    if nested and layer_type:
        return parameters.get(layer_type) or {}
    if parameters and (nested or layer_type):  # which layers it is for depends on the release
        raise value_error("rope_parameters", parameters.content, "one rotation per layer type only where layers differ")
    return parameters


def layer_types(stored: Stored, default: Callable[[int], str], allowed: Sequence[str] = _LAYER_TYPES) -> Sequence[str]:
    """The attention type of each layer: stored, or the ``default`` for the layer's number. Raises ModelError for unknown types."""
    layers: int = size("num_hidden_layers")(stored)
    types = stored.get("layer_types") or [default(number) for number in range(layers)]
    if not isinstance(types, list | tuple) or len(types) != layers or not set(types) <= set(allowed):
        raise value_error("layer_types", types, f"one of {', '.join(allowed)} for each of the {layers} layers")
    return list(types)


class Rotation:
    """Rotates queries and keys by their positions; pairs of numbers come from the two halves of a head.

    The tables are gathered by position once per graph, not once per layer.
    """

    def __init__(self, config: RotaryConfig, *, width: int, limit: int) -> None:
        """width: of a head. limit: number of positions in the longest text."""
        # As in the reference implementation, angles are products of float32 numbers.
        angles = np.arange(limit, dtype=np.float32)[:, None] * config.frequencies(width).astype(np.float32)
        angles = np.concatenate([angles, angles], axis=1).astype(np.float64)
        tables = (np.cos(angles) * config.scale, np.sin(angles) * config.scale)
        self._tables = [constant(table.astype(np.float32)) for table in tables]
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
