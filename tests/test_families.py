"""Every family and output type against what the reference libraries computed: packed, padded, alone, under the rules of an NPU."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import GOLDEN, smallest_cosine
from npu_proxy import Engine, Settings
from npu_proxy.batch import NATIVE_STYLE, BatchShape, GraphShape
from npu_proxy.graph.build import build, family
from npu_proxy.models.layout import read_spec
from npu_proxy.models.weights import Tensors
from npu_proxy.types import EmbedRequest, OutputType, Pair, Pooling, SparseVector

NAMES = sorted(folder.name for folder in GOLDEN.iterdir() if (folder / "answers.npz").exists())
WAYS = {
    "packed": Settings(device="cpu"),
    "padded": Settings(device="cpu", packing=False),
    "npu-sim": Settings(device="npu-sim", fallback=False, compile_cache_mb=0),
}


@contextmanager
def engine_of(folder: Path, way: str, tmp_path: Path, **more: Any) -> Iterator[Engine]:
    with Engine(folder, settings=replace(WAYS[way], compile_cache=tmp_path, store=tmp_path, **more)) as engine:
        yield engine


def compute(engine: Engine, texts: list, *, alone: bool = False, **options: Any) -> list[np.ndarray]:
    """Outputs as arrays; sparse vectors as wide as the vocabulary."""
    batches = [[text] for text in texts] if alone else [texts]
    options = {"output_type": engine.spec.output_types[0], **options}
    found: list[np.ndarray] = []
    for batch in batches:
        result = engine.submit(EmbedRequest(texts=batch, normalize=False, **options)).result().raise_first()
        for output in result.embeddings:
            if isinstance(output, SparseVector):
                wide = np.zeros(engine.spec.vocabulary, np.float32)
                wide[output.indices] = output.values
                found.append(wide)
            else:
                assert not isinstance(output, str)
                found.append(output)
    return found


def read_expected(folder: Path, key: str = "") -> list[np.ndarray]:
    arrays = np.load(folder / "answers.npz")
    count = sum(1 for name in arrays.files if name.startswith(key) and name.removeprefix(key).isdigit())
    return [arrays[f"{key}{index}"] for index in range(count)]


def check(found: list[np.ndarray], expected: list[np.ndarray], *, cosine: bool = True) -> None:
    assert len(found) == len(expected)
    for own, stored in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, stored, atol=1e-4)
    if cosine:
        own, stored = (np.concatenate([np.atleast_2d(vector) for vector in vectors]) for vectors in (found, expected))
        assert smallest_cosine(own, stored) >= 0.99999


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_the_reference(name: str, way: str, tmp_path: Path) -> None:
    folder = GOLDEN / name
    inputs = json.loads((folder / "texts.json").read_text())
    with engine_of(folder, way, tmp_path) as engine:
        output_type = engine.spec.output_type
        if output_type is OutputType.SCORES:
            pairs = [Pair(*pair) for pair in inputs["pairs"]]
            check(compute(engine, pairs), read_expected(folder), cosine=False)
            check(compute(engine, pairs, alone=True), read_expected(folder), cosine=False)
            check(compute(engine, inputs["texts"]), read_expected(folder, "single"), cosine=False)
        elif output_type is OutputType.TOKENS:
            for side, key in (("document", ""), ("query", "query")):
                result = engine.submit(EmbedRequest(texts=inputs, output_type=output_type, input_type=side)).result().raise_first()
                check([np.asarray(vectors) for vectors in result.embeddings], read_expected(folder, key))
        else:
            check(compute(engine, inputs), read_expected(folder))
            check(compute(engine, inputs, alone=True), read_expected(folder))
            if output_type is OutputType.DENSE and (queries := read_expected(folder, "query")):
                check(compute(engine, inputs, input_type="query"), queries)


@pytest.mark.parametrize("way", WAYS)
def test_bge_m3_computes_three_outputs_in_one_pass(way: str, tmp_path: Path) -> None:
    folder = GOLDEN / "bge_m3"
    texts = json.loads((folder / "texts.json").read_text())
    with engine_of(folder, way, tmp_path, pooling=Pooling.NONE) as engine:
        assert engine.spec.output_type is OutputType.MULTI
        check(compute(engine, texts), read_expected(folder))
        batches = engine.stats().counters.batches
        check(compute(engine, texts, output_type=OutputType.TOKENS), read_expected(folder, "tokens"))
        sparse = []
        for entries in read_expected(folder, "sparse"):
            wide = np.zeros(engine.spec.vocabulary, np.float32)
            wide[entries[:, 0].astype(int)] = entries[:, 1]
            sparse.append(wide)
        np.testing.assert_allclose(compute(engine, texts, output_type=OutputType.SPARSE), sparse, atol=1e-4)
        assert engine.stats().counters.batches == batches  # the first pass had them all


@pytest.mark.parametrize("name", [name for name in NAMES if read_spec(GOLDEN / name).pooling.prunes])
def test_the_last_layer_is_computed_for_pooled_tokens_only(name: str) -> None:
    spec = read_spec(GOLDEN / name)
    shape = BatchShape(bins=2, positions=32, segments=4)
    weights = Tensors(spec.weight_files, family(spec.family).canonical_name)
    model = build(spec, weights, GraphShape.static(shape), NATIVE_STYLE)
    rows = [
        next(iter(node.get_output_shape(0)))
        for node in model.get_ops()
        if node.get_type_name() == "MatMul" and len(node.get_output_shape(0)) == 2
    ]
    assert 2 * 32 in rows
    assert rows.count(2 * 4) >= 4  # query, output, and both of the feed-forward


def test_token_vectors_of_a_dense_model_pool_to_its_vectors(tmp_path: Path) -> None:
    folder = GOLDEN / "mpnet_mean"
    texts = json.loads((folder / "texts.json").read_text())
    with engine_of(folder, "packed", tmp_path, pooling=Pooling.NONE) as engine:
        check([vectors.mean(axis=0) for vectors in compute(engine, texts)], read_expected(folder))
