"""From a model's spec to an OpenVINO graph for one row shape. The table of families is here; a family is one file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import openvino as ov
from openvino import opset15 as op

from npu_proxy.errors import ModelError
from npu_proxy.graph import (
    bert,
    deberta,
    distilbert,
    gemma3,
    gte,
    heads,
    modernbert,
    mpnet,
    nomic,
    qwen3,
    roberta,
    static,
)
from npu_proxy.graph.packed import Form, Node, RowFormat, RowInputs, Style, Weights, flat_rows, in_grid, row_inputs
from npu_proxy.types import Kind, ModelSpec, Pooling

Config = Mapping[str, Any]


class Family(Protocol):
    """What a family's file has.

    MODEL_TYPES: values of ``model_type`` it builds. canonical_name: its name for a checkpoint's tensor. standard: config.json
    with the names it reads. check: raises ModelError for what it would compute wrongly. encode: token vectors [tokens, width],
    or of ``inputs.last`` alone where pooling reads one token a text. scores: logits [n, labels] of what ``scores_pooling``
    pools. vocabulary: logits [tokens, vocabulary] of the masked language model.
    """

    @property
    def MODEL_TYPES(self) -> tuple[str, ...]: ...  # noqa: N802

    canonical_name: Callable[[str], str]
    standard: Callable[[Config], Config]
    check: Callable[[Config], None]
    scores_pooling: Callable[[Config], Pooling]

    @property
    def encode(self) -> Callable[[Config, Weights, RowInputs, Style], Node]: ...

    scores: Callable[[Config, Weights, Node, Style], Node]
    vocabulary: Callable[[Config, Weights, Node, Style], Node]


_MODULES: tuple[Family, ...] = (bert, roberta, mpnet, distilbert, modernbert, nomic, gte, deberta, qwen3, gemma3, static)
FAMILIES: dict[str, Family] = {model_type: module for module in _MODULES for model_type in module.MODEL_TYPES}
"""Families by ``model_type`` of config.json."""

_Model: Any = ov.Model  # the bindings' own annotations contradict each other

OUTPUT = "embeddings"


def family(model_type: str, config: Config) -> Family:
    """The family of a model. Raises ModelError when there is none or it cannot compute this config exactly."""
    if model_type not in FAMILIES:
        raise ModelError(
            f"config.json: model_type `{model_type}` is not supported; known: {', '.join(sorted(FAMILIES))}. `npu-proxy"
            " convert` makes a graph file that `device` ir serves"
        )
    found = FAMILIES[model_type]
    found.check(config)
    return found


def build(spec: ModelSpec, weights: Weights, form: Form, style: Style) -> ov.Model:
    """The graph that turns a row into [bins, segments, width] float32, neither sliced nor normalized.

    Where every token has an answer it is [bins, positions, width].
    weights: tensors by the family's canonical names; they must outlive the model, which shares their memory.
    """
    found = family(spec.family, spec.config)
    config = {**found.standard(spec.config), "max_length": spec.max_length}
    inputs = row_inputs(form, RowFormat.of(spec))
    hidden = found.encode(config, weights, inputs, style)
    width = hidden.get_output_partial_shape(0)[1].get_length()
    match spec.kind:
        case Kind.DENSE | Kind.TOKENS:
            made = heads.dense(heads.pool(hidden, inputs, width), spec.dense)
        case Kind.SPARSE:
            made = heads.splade(found.vocabulary(config, weights, hidden, style), inputs, spec.width, spec.max_length)
        case Kind.SCORES:
            pooled = flat_rows(heads.pool(hidden, inputs, width), -1, width)
            made = in_grid(found.scores(config, weights, pooled, style), _pooled_grid(inputs), spec.width)
        case Kind.MULTI:
            lexical, late = spec.dense
            made = heads.multi(hidden, inputs, lexical, late, spec.width)
    result = op.result(made)
    result.output(0).set_names({OUTPUT})
    model: ov.Model = _Model([result], list(inputs.parameters), spec.family)
    return model


def _pooled_grid(inputs: RowInputs) -> Node:
    """The shape [bins, segments] as an operand."""
    if inputs.format.pooling.prunes:
        return inputs.last.grid
    return op.gather(op.shape_of(inputs.pool), op.constant([0, 1]), op.constant(0))
