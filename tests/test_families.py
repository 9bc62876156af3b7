"""Every family and kind against what the reference libraries computed: packed, padded, alone, under the rules of an NPU."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from conftest import GOLDEN, smallest_cosine
from npu_proxy import Engine, Settings
from npu_proxy.graph.build import build, family
from npu_proxy.graph.packed import NATIVE, Form, RowShape
from npu_proxy.models.layout import read_spec
from npu_proxy.models.weights import Tensors
from npu_proxy.types import EmbedRequest, Kind, Pair, Pooling

NAMES = sorted(folder.name for folder in GOLDEN.iterdir() if (folder / "answers.npz").exists())
WAYS = {
    "packed": Settings(device="cpu"),
    "padded": Settings(device="cpu", packing=False),
    "npu-sim": Settings(device="npu-sim", fallback="off", compile_cache_mb=0),
}


@contextmanager
def engine_of(folder: Path, way: str, tmp_path: Path, **more: object) -> Iterator[Engine]:
    from dataclasses import replace

    with Engine(folder, settings=replace(WAYS[way], compile_cache=tmp_path, store=tmp_path, **more)) as engine:
        yield engine


def ask(engine: Engine, texts: list, *, alone: bool = False, **how: object) -> list[np.ndarray]:
    """Answers as arrays; sparse ones as wide as the vocabulary."""
    batches = [[text] for text in texts] if alone else [texts]
    how = {"want": engine.spec.kind.gives[0], **how}
    found = []
    for batch in batches:
        result = engine.submit(EmbedRequest(texts=batch, normalize=False, **how)).result().raise_first()
        for one in result.embeddings:
            if isinstance(one, tuple):
                wide = np.zeros(engine.spec.vocabulary, np.float32)
                wide[one.indices] = one.values
                found.append(wide)
            else:
                found.append(one)
    return found


def expected(folder: Path, key: str = "") -> list[np.ndarray]:
    arrays = np.load(folder / "answers.npz")
    count = sum(1 for name in arrays.files if name.startswith(key) and name.removeprefix(key).isdigit())
    return [arrays[f"{key}{index}"] for index in range(count)]


def check(found: list[np.ndarray], wanted: list[np.ndarray], *, cosine: bool = True) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    if cosine:
        rows = [np.atleast_2d(one) for one in found], [np.atleast_2d(one) for one in wanted]
        assert smallest_cosine(np.concatenate(rows[0]), np.concatenate(rows[1])) >= 0.99999


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_the_reference(name: str, way: str, tmp_path: Path) -> None:
    folder = GOLDEN / name
    inputs = json.loads((folder / "texts.json").read_text())
    with engine_of(folder, way, tmp_path) as engine:
        kind = engine.spec.kind
        if kind is Kind.SCORES:
            pairs = [Pair(*pair) for pair in inputs["pairs"]]
            check(ask(engine, pairs), expected(folder), cosine=False)
            check(ask(engine, pairs, alone=True), expected(folder), cosine=False)
            check(ask(engine, inputs["texts"]), expected(folder, "single"), cosine=False)
        elif kind is Kind.TOKENS:
            for side, key in (("document", ""), ("query", "query")):
                result = engine.submit(EmbedRequest(texts=inputs, want=kind, input_type=side)).result().raise_first()
                check(list(result.embeddings), expected(folder, key))
        else:
            check(ask(engine, inputs), expected(folder))
            check(ask(engine, inputs, alone=True), expected(folder))
            if kind is Kind.DENSE and (queries := expected(folder, "query")):
                check(ask(engine, inputs, input_type="query"), queries)


@pytest.mark.parametrize("way", WAYS)
def test_bge_m3_gives_three_answers_in_one_pass(way: str, tmp_path: Path) -> None:
    folder = GOLDEN / "bge_m3"
    texts = json.loads((folder / "texts.json").read_text())
    with engine_of(folder, way, tmp_path, pooling=Pooling.NONE) as engine:
        assert engine.spec.kind is Kind.MULTI
        check(ask(engine, texts), expected(folder))
        rows = engine.stats().counters.rows
        check(ask(engine, texts, want=Kind.TOKENS), expected(folder, "tokens"))
        sparse = []
        for entries in expected(folder, "sparse"):
            wide = np.zeros(engine.spec.vocabulary, np.float32)
            wide[entries[:, 0].astype(int)] = entries[:, 1]
            sparse.append(wide)
        np.testing.assert_allclose(ask(engine, texts, want=Kind.SPARSE), sparse, atol=1e-4)
        assert engine.stats().counters.rows == rows  # the first pass had them all


@pytest.mark.parametrize("name", [name for name in NAMES if read_spec(GOLDEN / name).pooling.prunes])
def test_the_last_layer_is_computed_for_pooled_rows_only(name: str) -> None:
    spec = read_spec(GOLDEN / name)
    shape = RowShape(bins=2, positions=32, segments=4)
    weights = Tensors(spec.weight_files, family(spec.family, spec.config).canonical_name)
    model = build(spec, weights, Form.of(shape), NATIVE)
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
        check([one.mean(axis=0) for one in ask(engine, texts)], expected(folder))
