"""From a model's spec to an OpenVINO graph for one row shape. The table of families is here; a family is one file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import openvino as ov
from openvino import opset15 as op

from npu_proxy.errors import ModelError
from npu_proxy.graph import bert, heads
from npu_proxy.graph.packed import Form, Node, RowInputs, Style, Weights, row_inputs
from npu_proxy.types import ModelSpec, Pooling


class Family(Protocol):
    """What a family's file has: which model types it builds, its tensor names, its checks and its encoder."""

    MODEL_TYPES: tuple[str, ...]
    canonical_name: Callable[[str], str]
    check: Callable[[Mapping[str, Any]], None]
    encode: Callable[[Mapping[str, Any], Weights, RowInputs, Pooling, Style], Node]


_MODULES: tuple[Family, ...] = (bert,)
FAMILIES: dict[str, Family] = {model_type: module for module in _MODULES for model_type in module.MODEL_TYPES}
"""Families by ``model_type`` of config.json."""

_Model: Any = ov.Model  # the bindings' own annotations contradict each other

OUTPUT = "embeddings"


def family(spec: ModelSpec) -> Family:
    """The family of a model. Raises ModelError when there is none or it cannot compute this config exactly."""
    if spec.family not in FAMILIES:
        raise ModelError(f"config.json: model_type `{spec.family}` is not supported; known: {', '.join(sorted(FAMILIES))}")
    found = FAMILIES[spec.family]
    found.check(spec.config)
    return found


def build(spec: ModelSpec, weights: Weights, form: Form, style: Style) -> ov.Model:
    """The graph that turns a row into [bins, segments, width] float32, neither sliced nor normalized.

    weights: tensors by the family's canonical names; they must outlive the model, which shares their memory.
    """
    inputs = row_inputs(form, pool_by_index=spec.pooling.by_index)
    hidden = family(spec).encode(spec.config, weights, inputs, spec.pooling, style)
    vectors = heads.dense(heads.pool(hidden, inputs, spec.pooling, spec.config["hidden_size"]), spec.dense)
    result = op.result(vectors)
    result.output(0).set_names({OUTPUT})
    model: ov.Model = _Model([result], list(inputs.parameters), spec.family)
    return model
