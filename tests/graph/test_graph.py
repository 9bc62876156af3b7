"""Pieces of the graph against their definitions."""

import math

import numpy as np
import openvino as ov
import pytest
from openvino import opset15 as op

from npu_proxy.batch import BLOCK, CPU_STYLE, NATIVE_STYLE, BatchLayout, BatchShape, GraphShape, GraphStyle
from npu_proxy.graph.activations import gelu
from npu_proxy.graph.heads import splade
from npu_proxy.graph.inputs import attention_mask, batch_inputs
from npu_proxy.graph.layers import attend
from npu_proxy.types import Pooling


def run(inputs: list, output: ov.Output | ov.Node) -> np.ndarray:
    model = ov.Model(  # pyright: ignore[reportGeneralTypeIssues] - a wrong stub
        [op.result(output)], [node for node, _ in inputs], "test"
    )
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # processors with bfloat16 would use it
    compiled = ov.Core().compile_model(model, "CPU", exact)
    return compiled([value for _, value in inputs])[0]


@pytest.mark.parametrize("style", [CPU_STYLE, NATIVE_STYLE], ids=["cpu", "native"])
def test_gelu_is_exact_to_float32(style: GraphStyle) -> None:
    x = np.concatenate([np.linspace(-12, 12, 4001), [0.0, -1e-8, 1e30, -1e30]]).astype(np.float32)
    node = op.parameter([len(x)], np.float32)
    exact = np.array([value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x.astype(np.float64)])
    np.testing.assert_allclose(run([(node, x)], gelu(node, style)), exact, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("bins", [1, 2, 8])
@pytest.mark.parametrize("positions", [32, 64, 128, 256])
def test_segments_of_pooled_tokens_are_those_at_their_positions(bins: int, positions: int) -> None:
    shape = BatchShape(bins=bins, positions=positions, segments=positions // 8)
    inputs = batch_inputs(GraphShape.static(shape), BatchLayout(pooling=Pooling.CLS))
    _, _, segments, pool = inputs.parameters
    output = inputs.last_tokens.segments
    rng = np.random.default_rng(0)
    for _ in range(20):
        numbers = rng.integers(-1, 7, (bins, positions)).astype(np.int32)
        pooled = rng.integers(0, positions, (bins, shape.segments)).astype(np.int32)
        found = run([(segments, numbers), (pool, pooled)], output)
        np.testing.assert_array_equal(found, np.take_along_axis(numbers, pooled, 1))


@pytest.mark.parametrize("style", [CPU_STYLE, NATIVE_STYLE], ids=["cpu", "native"])
def test_attention_stays_inside_a_segment(style: GraphStyle) -> None:
    rng = np.random.default_rng(0)
    segments = np.array([[0, 0, 0, 1, 1, -1]], np.int32)
    query, key, value = (rng.standard_normal((1, 2, 6, 4)).astype(np.float32) for _ in range(3))
    nodes = [op.parameter([1, 2, 6, 4], np.float32) for _ in range(3)]
    inputs = batch_inputs(GraphShape(bins=1, positions=6, segments=2, tokens=6), BatchLayout(pooling=Pooling.MEAN))
    given = inputs.parameters[2]
    output = attend(nodes[0], nodes[1], nodes[2], attention_mask(inputs, inputs.all_tokens), 0.5, style)
    found = run([*zip(nodes, (query, key, value), strict=True), (given, segments)], output)
    for start, end in ((0, 3), (3, 5), (5, 6)):
        scores = query[:, :, start:end] @ key[:, :, start:end].transpose(0, 1, 3, 2) / 2
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = weights / weights.sum(-1, keepdims=True) @ value[:, :, start:end]
        np.testing.assert_allclose(found[:, :, start:end], expected, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 2])
def test_masks_hold_within_a_text(causal: bool, window: int | None) -> None:
    inputs = batch_inputs(GraphShape(bins=1, positions=9, segments=2, tokens=9), BatchLayout(pooling=Pooling.MEAN))
    numbers = np.array([[0] * 5 + [1] * 3 + [-1]], np.int32)
    places = np.array([[*range(5), *range(3), 0]], np.int32)
    _, positions, segments, _ = inputs.parameters
    mask = attention_mask(inputs, inputs.all_tokens, causal=causal, window=window)
    found = run([(positions, places), (segments, numbers)], mask)[0, 0]
    for query in range(9):
        for key in range(9):
            distance = places[0, key] - places[0, query]
            seen = (
                numbers[0, query] == numbers[0, key]
                and not (causal and distance > 0)
                and not (window is not None and abs(distance) > window)
            )
            assert (found[query, key] == 0) == seen


@pytest.mark.parametrize("shape", [GraphShape(), GraphShape(tokens=128)], ids=["dynamic", "flat"])
def test_splade_takes_the_maximum_over_each_text(shape: GraphShape) -> None:
    rng = np.random.default_rng(0)
    inputs = batch_inputs(shape, BatchLayout(pooling=Pooling.SPLADE))
    logits = op.parameter([-1, 5], np.float32)
    output = splade(logits, inputs, 5, 64)
    for lengths in ([[3, 20, 8], [64]], [[40, 24], [1, 1, 1, 1, 1, 9]]):
        numbers, places = np.full([2, 64], -1, np.int32), np.zeros([2, 64], np.int32)
        pool = np.zeros([2, 8], np.int32)
        values = rng.normal(size=[128, 5]).astype(np.float32)
        expected = np.zeros([2, 8, 5], np.float32)
        for bin, texts in enumerate(lengths):
            start = 0
            for segment, count in enumerate(texts):
                span = slice(start, start + count)
                numbers[bin, span], places[bin, span], pool[bin, segment] = segment, np.arange(count), start
                own = values[64 * bin + start : 64 * bin + start + count].max(axis=0)
                expected[bin, segment] = np.log1p(np.maximum(own, 0))
                start += -(-count // BLOCK) * BLOCK
        given = dict(zip(("input_ids", "position_ids", "segment_ids", "pool"), inputs.parameters, strict=True))
        arrays = [(given["position_ids"], places), (given["segment_ids"], numbers), (given["pool"], pool), (logits, values)]
        found = run(arrays, output)
        for bin, texts in enumerate(lengths):
            np.testing.assert_allclose(found[bin, : len(texts)], expected[bin, : len(texts)], rtol=1e-5, atol=1e-6)
