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
from npu_proxy.graph.keys import Keys
from npu_proxy.graph.nodes import Config, Node, Weights, op, to_flat, to_grid
from npu_proxy.graph.unread_tensors import ReadWeights
from npu_proxy.spec import DenseModule, ModelSpec
from npu_proxy.types import OutputType, Pooling

if TYPE_CHECKING:
    import openvino as ov


class Family(Protocol):
    """What the file of a model family provides.

    MODEL_TYPES: values of ``model_type`` in config.json that it builds. KEYS: what it reads of config.json. canonical_name: its
    name for a checkpoint's tensor. encode: token vectors [tokens, width]; only those of ``inputs.last_tokens`` if pooling reads
    one token per text. classifier_pooling: the pooling whose output ``label_logits`` reads. label_logits: logits [n, labels] of
    pooled vectors. vocabulary_logits: logits [tokens, vocabulary] of the masked language model.
    """

    @property
    def MODEL_TYPES(self) -> tuple[str, ...]: ...  # noqa: N802

    @property
    def KEYS(self) -> Keys: ...  # noqa: N802

    canonical_name: Callable[[str], str]
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


def family(model_type: str) -> Family:
    """The family of a model. Raises ModelError if there is none."""
    if model_type not in FAMILIES:
        raise ModelError(
            f"config.json: model_type `{model_type}` is not supported; known: {', '.join(sorted(FAMILIES))}. `npu-proxy"
            " convert` makes a graph file of it, which can be served with `device` ir"
        )
    return FAMILIES[model_type]


def tensor_name(model_type: str) -> Callable[[str], str]:
    """A function from a checkpoint's name of a tensor to the family's; TensorFlow's spelling is old in all families."""
    canonical = family(model_type).canonical_name
    return lambda name: canonical(name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"))


def build(spec: ModelSpec, weights: Weights, shape: GraphShape, style: GraphStyle) -> ov.Model:
    """The graph that turns a batch into [bins, segments, width] float32, neither truncated nor normalized.

    If every token has an output, its shape is [bins, positions, width].
    weights: tensors by the family's canonical names; the model keeps those that it uses.
    Raises ModelError if the configuration and the weights do not make a graph.
    """
    with model_errors(spec.name):
        return _build(spec, weights, shape, style)


def _build(spec: ModelSpec, weights: Weights, shape: GraphShape, style: GraphStyle) -> ov.Model:
    model_family = family(spec.family)
    config = {**spec.config, "max_length": spec.max_length}
    inputs = batch_inputs(shape, spec.batch_layout)
    read = ReadWeights(weights)
    graph = GraphContext(config=config, weights=read, inputs=inputs, style=style)
    hidden = heads.apply_modules(model_family.encode(graph), spec.token_modules)
    width = hidden.get_output_partial_shape(0)[1].get_length()
    match spec.output_type:
        case OutputType.DENSE | OutputType.TOKENS:
            output = heads.apply_modules(heads.pool(hidden, inputs, width), spec.modules)
        case OutputType.SPARSE:
            output = heads.splade(model_family.vocabulary_logits(graph, hidden), inputs, spec.width, spec.max_length, spec.splade)
        case OutputType.SCORES:
            pooled = to_flat(heads.pool(hidden, inputs, width), -1, width)
            logits = heads.apply_modules(pooled, spec.modules) if spec.modules else model_family.label_logits(graph, pooled)
            if (labels := logits.get_output_partial_shape(0)[1].get_length()) != spec.width:
                raise ModelError(f"{spec.name}: config.json names {spec.width} labels, but the classifier gives {labels}")
            output = to_grid(logits, _pooled_grid(inputs), spec.width)
        case OutputType.MULTI:
            lexical, late = (module for module in spec.modules if isinstance(module, DenseModule))
            output = heads.multi_output(hidden, inputs, lexical, late, spec.width)
    read.refuse_unread([*spec.accept_unread, *spec.module_tensors])
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
