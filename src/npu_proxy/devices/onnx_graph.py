"""The graphs of graph/ as ONNX, so that a second runtime, which shares no code with the first, computes the same model.

An operation is one row of ``_RENAMED`` or one function; an operation that is not listed is an error that names it.
Source: the operation sets of OpenVINO (opset 13 to 16) and ONNX (opset 20).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from npu_proxy.errors import DeviceError

OPSET = 20
_LARGEST_BYTES = 1_900_000_000
"""A protobuf message holds at most 2 GiB, and the weights are part of it."""

_RENAMED: Mapping[str, str] = {
    "Abs": "Abs",
    "Add": "Add",
    "Divide": "Div",
    "Equal": "Equal",
    "Greater": "Greater",
    "GreaterEqual": "GreaterOrEqual",
    "Less": "Less",
    "LessEqual": "LessOrEqual",
    "Log": "Log",
    "LogicalAnd": "And",
    "Maximum": "Max",
    "Minimum": "Min",
    "Multiply": "Mul",
    "Negative": "Neg",
    "Relu": "Relu",
    "Select": "Where",
    "Sqrt": "Sqrt",
    "Subtract": "Sub",
    "Tanh": "Tanh",
}
"""Operations that both have with the same inputs and without attributes that matter."""


@dataclass
class _Builder:
    """Collects the nodes and weights of an ONNX graph. helper: the module of that name in the package onnx."""

    helper: Any
    numpy_helper: Any
    nodes: list[Any] = field(default_factory=list[Any])
    weights: list[Any] = field(default_factory=list[Any])
    size: int = 0
    count: int = 0

    def name(self) -> str:
        self.count += 1
        return f"value_{self.count}"

    def emit(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node with one output. Returns the output's name."""
        (output,) = self.emit_many(kind, inputs, 1, **attributes)
        return output

    def emit_many(self, kind: str, inputs: Sequence[str], outputs: int, **attributes: Any) -> list[str]:
        names = [self.name() for _ in range(outputs)]
        self.nodes.append(self.helper.make_node(kind, list(inputs), names, **attributes))
        return names

    def constant(self, value: npt.NDArray[Any]) -> str:
        """Add a weight. Returns its name. Raises DeviceError if there is no room for it."""
        self.size += value.nbytes
        if self.size > _LARGEST_BYTES:
            raise DeviceError("the model is too large for device `onnx` in a chain, which takes weights up to 1.9 GB")
        name = self.name()
        self.weights.append(self.numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))


def to_onnx(model: Any) -> bytes:
    """Convert an OpenVINO model to a serialized ONNX model with the same inputs, in their order, and one output `output`.

    Raises DeviceError for an operation or attribute that is not known here, and ImportError without the package onnx.
    """
    import onnx
    from onnx import helper, numpy_helper

    builder = _Builder(helper, numpy_helper)
    names: dict[tuple[str, int], str] = {}
    results: list[str] = []
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        inputs = [names[_key(node.input_value(index))] for index in range(node.get_input_size())]
        if kind == "Result":
            results.append(builder.emit("Identity", inputs))
        elif kind == "Parameter":
            names[node.get_friendly_name(), 0] = next(iter(node.output(0).get_names()))
        elif kind in _RENAMED:
            names[node.get_friendly_name(), 0] = builder.emit(_RENAMED[kind], inputs)
        elif kind in _CONVERTED:
            made = _CONVERTED[kind](builder, node, inputs)
            for index, name in enumerate([made] if isinstance(made, str) else made):
                names[node.get_friendly_name(), index] = name
        else:
            raise DeviceError(f"device `onnx` cannot compute this model: its graph has the operation {kind}")
    ports = [
        helper.make_tensor_value_info(
            next(iter(port.get_names())),
            helper.np_dtype_to_tensor_dtype(np.dtype(port.get_element_type().to_dtype())),
            [None if dimension.is_dynamic else dimension.get_length() for dimension in port.get_partial_shape()],
        )
        for port in model.inputs
    ]
    builder.nodes.append(helper.make_node("Identity", [results[0]], ["output"]))
    output = helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, None)
    used = {name for node in builder.nodes for name in node.input}
    weights = [weight for weight in builder.weights if weight.name in used]  # others are attributes in ONNX
    graph = helper.make_graph(builder.nodes, "npu-proxy", ports, [output], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    return made.SerializeToString()


def _key(port: Any) -> tuple[str, int]:
    return port.get_node().get_friendly_name(), port.get_index()


def _value(node: Any, index: int) -> npt.NDArray[Any]:
    """The value of a constant input. Raises DeviceError if it is computed."""
    source = node.input_value(index).get_node()
    if source.get_type_name() != "Constant":
        raise DeviceError(f"device `onnx` cannot compute this model: input {index} of {node.get_type_name()} is not constant")
    return source.get_data()


def _integers(node: Any, index: int) -> list[int]:
    return [int(number) for number in np.ravel(_value(node, index))]


def _rank(node: Any, index: int) -> int:
    return node.input_value(index).get_partial_shape().rank.get_length()


def _element_type(builder: _Builder, port: Any) -> int:
    kind = port.get_element_type()
    dtype = np.float32 if kind.get_type_name() == "bf16" else kind.to_dtype()
    return builder.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _as_int64(builder: _Builder, name: str) -> str:
    return builder.emit("Cast", [name], to=builder.helper.np_dtype_to_tensor_dtype(np.dtype(np.int64)))


def _transposed(builder: _Builder, name: str, rank: int) -> str:
    """Swap the last two dimensions."""
    order = list(range(rank))
    order[-2:] = order[:-3:-1]
    return builder.emit("Transpose", [name], perm=order)


# -- operations ----------------------------------------------------------------------------------------------------------


def _constant(builder: _Builder, node: Any, _: Sequence[str]) -> str:
    bfloat = node.get_element_type().get_type_name() == "bf16"
    return builder.constant(node.get_data(dtype=np.float32) if bfloat else node.get_data())


def _cast(builder: _Builder, node: Any, inputs: Sequence[str]) -> str:
    return builder.emit("Cast", inputs, to=_element_type(builder, node.output(0)))


def _clamp(builder: _Builder, node: Any, inputs: Sequence[str]) -> str:
    about, dtype = node.get_attributes(), node.get_element_type().to_dtype()
    bounds = [builder.constant(np.array(about[name], dtype)) for name in ("min", "max")]
    return builder.emit("Clip", [*inputs, *bounds])


def _concat(builder: _Builder, node: Any, inputs: Sequence[str]) -> str:
    return builder.emit("Concat", inputs, axis=node.get_attributes()["axis"])


def _gather(builder: _Builder, node: Any, inputs: Sequence[str]) -> str:
    axis, shared = _integers(node, 2)[0], node.get_attributes().get("batch_dims", 0)
    if not shared:
        return builder.emit("Gather", inputs[:2], axis=axis)
    if axis != shared:
        raise DeviceError(f"device `onnx` cannot compute this model: Gather has batch_dims {shared} and axis {axis}")
    indices = builder.emit("Unsqueeze", [_as_int64(builder, inputs[1]), builder.integers(-1)])
    return builder.emit("GatherND", [inputs[0], indices], batch_dims=shared)


def _gather_elements(builder: _Builder, node: Any, inputs: Sequence[str]) -> str:
    return builder.emit("GatherElements", inputs, axis=node.get_attributes()["axis"])


def _gelu(builder: _Builder, node: Any, inputs: Sequence[str]) -> str:
    tanh = str(node.get_attributes().get("approximation_mode", "ERF")).upper() == "TANH"
    return builder.emit("Gelu", inputs, approximate="tanh" if tanh else "none")


def _mvn(builder: _Builder, node: Any, inputs: Sequence[str]) -> str:
    """(x - mean) / sqrt(variance + eps), over the last dimension; a fused LayerNormalization without gain."""
    about, rank = node.get_attributes(), _rank(node, 0)
    width = node.input_value(0).get_partial_shape()[rank - 1]
    last = [axis % rank for axis in _integers(node, 1)] == [rank - 1]
    inside = str(about["eps_mode"]).upper() == "INSIDE_SQRT"
    if not (last and inside and about["normalize_variance"] and width.is_static):
        raise DeviceError("device `onnx` cannot compute this model: its graph has an unusual MVN")
    gain = builder.constant(np.ones(width.get_length(), np.float32))
    return builder.emit("LayerNormalization", [inputs[0], gain], axis=-1, epsilon=about["eps"])


def _matmul(builder: _Builder, node: Any, inputs: Sequence[str]) -> str:
    about, sides = node.get_attributes(), list(inputs)
    for index, name in enumerate(("transpose_a", "transpose_b")):
        if about[name]:
            sides[index] = _transposed(builder, sides[index], _rank(node, index))
    return builder.emit("MatMul", sides)


def _range(builder: _Builder, node: Any, inputs: Sequence[str]) -> str:
    kind = _element_type(builder, node.output(0))
    return builder.emit("Range", [builder.emit("Cast", [name], to=kind) for name in inputs])


def _reduce(kind: str) -> Callable[[_Builder, Any, Sequence[str]], str]:
    def reduce(builder: _Builder, node: Any, inputs: Sequence[str]) -> str:
        axes = builder.integers(*_integers(node, 1))
        return builder.emit(kind, [inputs[0], axes], keepdims=int(node.get_attributes()["keep_dims"]))

    return reduce


def _reshape(builder: _Builder, node: Any, inputs: Sequence[str]) -> str:
    copies = node.get_attributes()["special_zero"]
    return builder.emit("Reshape", [inputs[0], _as_int64(builder, inputs[1])], allowzero=int(not copies))


def _attention(builder: _Builder, node: Any, inputs: Sequence[str]) -> str:
    """softmax(q k^T * scale + mask) v."""
    if node.get_attributes().get("causal", False):
        raise DeviceError("device `onnx` cannot compute this model: its attention has no explicit mask")
    queries, keys, values, *rest = inputs
    width = node.input_value(0).get_partial_shape()[_rank(node, 0) - 1]
    scale = rest[1] if len(rest) > 1 else builder.constant(np.array(width.get_length() ** -0.5, np.float32))
    logits = builder.emit("MatMul", [queries, _transposed(builder, keys, _rank(node, 1))])
    logits = builder.emit("Mul", [logits, scale])
    if rest:
        logits = builder.emit("Add", [logits, rest[0]])
    return builder.emit("MatMul", [builder.emit("Softmax", [logits], axis=-1), values])


def _shape_of(builder: _Builder, node: Any, inputs: Sequence[str]) -> str:
    return builder.emit("Cast", [builder.emit("Shape", inputs)], to=_element_type(builder, node.output(0)))


def _slice(builder: _Builder, node: Any, inputs: Sequence[str]) -> str:
    data, start, stop, step, *axes = inputs
    axis = axes or [builder.integers(*range(_rank(node, 0)))]
    return builder.emit("Slice", [data, *(_as_int64(builder, name) for name in (start, stop, *axis, step))])


def _softmax(builder: _Builder, node: Any, inputs: Sequence[str]) -> str:
    return builder.emit("Softmax", inputs, axis=node.get_attributes()["axis"])


def _with_axes(kind: str) -> Callable[[_Builder, Any, Sequence[str]], str]:
    def change(builder: _Builder, node: Any, inputs: Sequence[str]) -> str:
        return builder.emit(kind, [inputs[0], builder.integers(*_integers(node, 1))])

    return change


def _tile(builder: _Builder, _: Any, inputs: Sequence[str]) -> str:
    return builder.emit("Tile", [inputs[0], _as_int64(builder, inputs[1])])


def _swish(builder: _Builder, _: Any, inputs: Sequence[str]) -> str:
    scaled = builder.emit("Mul", inputs) if len(inputs) > 1 else inputs[0]
    return builder.emit("Mul", [inputs[0], builder.emit("Sigmoid", [scaled])])


def _transpose(builder: _Builder, node: Any, inputs: Sequence[str]) -> str:
    return builder.emit("Transpose", inputs[:1], perm=_integers(node, 1))


def _split(builder: _Builder, node: Any, inputs: Sequence[str]) -> list[str]:
    lengths = [port.get_partial_shape()[_integers(node, 1)[0] % _rank(node, 0)] for port in node.outputs()]
    if any(length.is_dynamic for length in lengths):
        raise DeviceError("device `onnx` cannot compute this model: it splits a dynamic dimension")
    sizes = builder.integers(*(length.get_length() for length in lengths))
    return builder.emit_many("Split", [inputs[0], sizes], len(lengths), axis=_integers(node, 1)[0])


_CONVERTED: Mapping[str, Callable[[_Builder, Any, Sequence[str]], str | list[str]]] = {
    "Clamp": _clamp,
    "Concat": _concat,
    "Constant": _constant,
    "Convert": _cast,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Gelu": _gelu,
    "MVN": _mvn,
    "MatMul": _matmul,
    "Range": _range,
    "ReduceMax": _reduce("ReduceMax"),
    "ReduceMean": _reduce("ReduceMean"),
    "ReduceSum": _reduce("ReduceSum"),
    "Reshape": _reshape,
    "ScaledDotProductAttention": _attention,
    "ShapeOf": _shape_of,
    "Slice": _slice,
    "Softmax": _softmax,
    "Squeeze": _with_axes("Squeeze"),
    "Swish": _swish,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _with_axes("Unsqueeze"),
    "VariadicSplit": _split,
}
"""Operations that need more than another name."""
