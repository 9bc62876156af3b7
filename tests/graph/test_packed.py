"""Pieces of the graph against their definitions."""

import math

import numpy as np
import openvino as ov
import pytest
from openvino import opset15 as op

from npu_proxy.graph.heads import wanted_segments
from npu_proxy.graph.packed import CPU, NATIVE, Form, RowShape, Style, attend, gelu, row_inputs, segment_mask
from npu_proxy.types import Pooling


def run(inputs: list, output) -> np.ndarray:
    model = ov.Model([op.result(output)], [node for node, _ in inputs], "test")
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # processors with bfloat16 would use it
    compiled = ov.Core().compile_model(model, "CPU", exact)
    return compiled([value for _, value in inputs])[0]


@pytest.mark.parametrize("style", [CPU, NATIVE], ids=["cpu", "native"])
def test_gelu_is_exact_to_float32(style: Style) -> None:
    x = np.concatenate([np.linspace(-12, 12, 4001), [0.0, -1e-8, 1e30, -1e30]]).astype(np.float32)
    node = op.parameter([len(x)], np.float32)
    exact = np.array([value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x.astype(np.float64)])
    np.testing.assert_allclose(run([(node, x)], gelu(node, style)), exact, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("bins", [1, 2, 8])
@pytest.mark.parametrize("positions", [32, 64, 128, 256])
def test_segments_of_wanted_rows_are_those_at_their_positions(bins: int, positions: int) -> None:
    shape = RowShape(bins=bins, positions=positions, segments=positions // 8)
    inputs = row_inputs(Form.of(shape), pool_by_index=True)
    _, _, segments, pool = inputs.parameters
    output = wanted_segments(inputs, Pooling.CLS)
    rng = np.random.default_rng(0)
    for _ in range(20):
        numbers = rng.integers(-1, 7, (bins, positions)).astype(np.int32)
        wanted = rng.integers(0, positions, (bins, shape.segments)).astype(np.int32)
        found = run([(segments, numbers), (pool, wanted)], output)
        np.testing.assert_array_equal(found, np.take_along_axis(numbers, wanted, 1))


@pytest.mark.parametrize("style", [CPU, NATIVE], ids=["cpu", "native"])
def test_attention_stays_inside_a_segment(style: Style) -> None:
    rng = np.random.default_rng(0)
    segments = np.array([[0, 0, 0, 1, 1, -1]], np.int32)
    query, key, value = (rng.standard_normal((1, 2, 6, 4)).astype(np.float32) for _ in range(3))
    nodes = [op.parameter([1, 2, 6, 4], np.float32) for _ in range(3)]
    given = op.parameter([1, 6], np.int32)
    output = attend(*nodes, segment_mask(given, given), 4, style)
    found = run([*zip(nodes, (query, key, value), strict=True), (given, segments)], output)
    for start, end in ((0, 3), (3, 5), (5, 6)):
        scores = query[:, :, start:end] @ key[:, :, start:end].transpose(0, 1, 3, 2) / 2
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = weights / weights.sum(-1, keepdims=True) @ value[:, :, start:end]
        np.testing.assert_allclose(found[:, :, start:end], expected, atol=1e-5)
