"""Build an OpenVINO graph from a model's spec. The table of model families is here; each family is one file."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from npu_proxy.batch import GraphShape, GraphStyle
from npu_proxy.errors import ModelError, model_errors
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
from npu_proxy.graph.context import GraphContext
from npu_proxy.graph.inputs import BatchInputs, batch_inputs
from npu_proxy.graph.nodes import Config, Node, Weights, op, to_flat, to_grid
from npu_proxy.spec import ModelSpec
from npu_proxy.types import OutputType, Pooling

if TYPE_CHECKING:
    import openvino as ov


class Family(Protocol):
    """What the file of a model family provides.

    MODEL_TYPES: values of ``model_type`` in config.json that it builds. canonical_name: its name for a checkpoint's tensor.
    normalize_config: config.json with the keys that it reads. check_config: raises ModelError for a config that it would compute
    wrongly. encode: token vectors [tokens, width]; only those of ``inputs.last_tokens`` if pooling reads one token per text.
    classifier_pooling: the pooling whose output ``label_logits`` reads. label_logits: logits [n, labels] of pooled vectors.
    vocabulary_logits: logits [tokens, vocabulary] of the masked language model.
    """

    @property
    def MODEL_TYPES(self) -> tuple[str, ...]: ...  # noqa: N802

    canonical_name: Callable[[str], str]
    normalize_config: Callable[[Config], Config]
    check_config: Callable[[Config], None]
    classifier_pooling: Callable[[Config], Pooling]

    @property
    def encode(self) -> Callable[[GraphContext], Node]: ...

    label_logits: Callable[[GraphContext, Node], Node]
    vocabulary_logits: Callable[[GraphContext, Node], Node]


_MODULES: tuple[Family, ...] = (bert, roberta, mpnet, distilbert, modernbert, nomic, gte, deberta, qwen3, gemma3, static)
FAMILIES: dict[str, Family] = {model_type: module for module in _MODULES for model_type in module.MODEL_TYPES}
"""Model families by ``model_type`` of config.json."""

OUTPUT = "embeddings"
"""The name of the graph's output."""


def family(model_type: str, config: Config) -> Family:
    """The family of a model. Raises ModelError if there is none, or if it cannot compute this config exactly."""
    if model_type not in FAMILIES:
        raise ModelError(
            f"config.json: model_type `{model_type}` is not supported; known: {', '.join(sorted(FAMILIES))}. `npu-proxy"
            " convert` makes a graph file of it, which can be served with `device` ir"
        )
    selected = FAMILIES[model_type]
    with model_errors("config.json"):
        selected.check_config(config)
    return selected


def build(spec: ModelSpec, weights: Weights, shape: GraphShape, style: GraphStyle) -> ov.Model:
    """The graph that turns a batch into [bins, segments, width] float32, neither truncated nor normalized.

    If every token has an output, its shape is [bins, positions, width].
    weights: tensors by the family's canonical names; the model keeps those that it uses.
    Raises ModelError if the configuration and the weights do not make a graph.
    """
    with model_errors(spec.name):
        return _build(spec, weights, shape, style)


def _build(spec: ModelSpec, weights: Weights, shape: GraphShape, style: GraphStyle) -> ov.Model:
    model_family = family(spec.family, spec.config)
    config = {**model_family.normalize_config(spec.config), "max_length": spec.max_length}
    inputs = batch_inputs(shape, spec.batch_layout)
    graph = GraphContext(config=config, weights=weights, inputs=inputs, style=style)
    hidden = model_family.encode(graph)
    width = hidden.get_output_partial_shape(0)[1].get_length()
    match spec.output_type:
        case OutputType.DENSE | OutputType.TOKENS:
            output = heads.apply_dense(heads.pool(hidden, inputs, width), spec.dense)
        case OutputType.SPARSE:
            output = heads.splade(model_family.vocabulary_logits(graph, hidden), inputs, spec.width, spec.max_length)
        case OutputType.SCORES:
            pooled = to_flat(heads.pool(hidden, inputs, width), -1, width)
            output = to_grid(model_family.label_logits(graph, pooled), _pooled_grid(inputs), spec.width)
        case OutputType.MULTI:
            lexical, late = spec.dense
            output = heads.multi_output(hidden, inputs, lexical, late, spec.width)
    result = op.result(output)
    result.output(0).set_names({OUTPUT})
    model_class: Any = import_module("openvino").Model  # the type annotations of the bindings contradict each other
    model: ov.Model = model_class([result], list(inputs.parameters), spec.family)
    return model


def _pooled_grid(inputs: BatchInputs) -> Node:
    """The shape [bins, segments] as an operand."""
    if inputs.layout.pooling.prunes:
        return inputs.last_tokens.grid
    return op.gather(op.shape_of(inputs.pool), op.constant([0, 1]), op.constant(0))
