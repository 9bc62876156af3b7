"""Tiny models whose vectors transformers computed: every pooling, Dense, legacy names, and the pruned last layer."""

from dataclasses import replace

import numpy as np
import pytest

from conftest import GOLDEN_NAMES, golden, smallest_cosine
from npu_proxy import Engine, Settings
from npu_proxy.batch import NATIVE_STYLE, BatchShape, GraphShape
from npu_proxy.graph.build import build
from npu_proxy.models.fingerprint import fingerprint
from npu_proxy.models.layout import read_spec
from npu_proxy.models.weights import Tensors
from npu_proxy.types import Pooling


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_vectors_are_those_of_transformers(name: str, packing: bool) -> None:
    folder, texts, vectors = golden(name)
    with Engine(folder, settings=Settings(packing=packing)) as engine:
        together = engine.embed(texts, normalize=False)
        alone = np.stack([engine.embed([text], normalize=False)[0] for text in texts])
    assert smallest_cosine(together, vectors) >= 0.99999
    assert smallest_cosine(alone, vectors) >= 0.99999
    np.testing.assert_allclose(together, vectors, atol=2e-4)  # lengths count too: normalize is off


@pytest.mark.parametrize("name", ["cls", "lasttoken", "one_layer_cls"])
def test_the_last_layer_is_computed_for_pooled_tokens_only(name: str) -> None:
    spec = read_spec(golden(name)[0])
    weights = Tensors(spec.weight_files)
    shape = BatchShape(bins=2, positions=32, segments=4)
    model = build(spec, weights, GraphShape.static(shape), NATIVE_STYLE)
    sizes = [list(node.get_output_shape(0)) for node in model.get_ops() if node.get_type_name() == "Gelu"]
    assert sizes[-1] == [2 * 4, 64]
    assert all(size == [2 * 32, 64] for size in sizes[:-1])


def test_a_static_graph_has_static_shapes() -> None:
    spec = read_spec(golden("mean")[0])
    shape = BatchShape(bins=1, positions=32, segments=4)
    model = build(spec, Tensors(spec.weight_files), GraphShape.static(shape), NATIVE_STYLE)
    assert not model.is_dynamic()
    assert list(model.output(0).shape) == [1, 4, spec.width]


def test_a_different_pooling_is_a_different_fingerprint() -> None:
    spec = read_spec(golden("mean")[0])
    assert fingerprint(spec) == spec.fingerprint
    assert fingerprint(replace(spec, name="another")) == spec.fingerprint
    for other in (replace(spec, pooling=Pooling.CLS), replace(spec, max_length=12), replace(spec, prompts={"query": "x"})):
        assert fingerprint(other) != spec.fingerprint
