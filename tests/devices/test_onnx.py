"""ONNX Runtime gives the vectors of the same model, under a fingerprint of its own, and refuses what it cannot do."""

import json
from pathlib import Path

import numpy as np
import pytest

from conftest import GOLDEN, golden, smallest_cosine
from npu_proxy import EmbedRequest, Engine, Kind, ModelError, Pair, Settings


@pytest.mark.parametrize("name", ["mean", "cls"])
def test_the_vectors_are_those_of_the_model(name: str) -> None:
    folder, texts, vectors = golden(name)
    with Engine(folder, device="onnx") as engine, Engine(folder, device="cpu") as cpu:
        found = engine.embed(texts, normalize=False)
        np.testing.assert_allclose(found, vectors, atol=2e-5)
        assert smallest_cosine(found, cpu.embed(texts)) > 0.99999
        assert engine.spec.fingerprint != cpu.spec.fingerprint
        assert engine.embed(texts[:1], normalize=False)[0] == pytest.approx(found[0], abs=1e-5)
        engine.device.probe()
        report = engine.device.reports()[0]
        assert (report.name, report.state) == ("onnx", "serving")
        assert "CPUExecutionProvider" in report.reason


def test_scores_of_pairs_are_those_of_the_model() -> None:
    folder = GOLDEN / "bert_rerank"
    stored = json.loads((folder / "texts.json").read_text())
    answers = np.load(folder / "answers.npz")
    with Engine(folder, device="onnx") as engine:
        for texts, key in (([Pair(*pair) for pair in stored["pairs"]], ""), (stored["texts"], "single")):
            found = engine.submit(EmbedRequest(texts=texts, want=Kind.SCORES)).result().raise_first().embeddings
            np.testing.assert_allclose(found, [answers[f"{key}{index}"] for index in range(len(texts))], atol=2e-5)
        assert engine.rerank("the cat", ["sea", "the cat sleeps"])
    with pytest.raises(ModelError, match="sparse answers"):
        Engine(GOLDEN / "bert_splade", device="onnx", settings=Settings(onnx_file="config.json")).start()


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for file in ("onnx/model_quantized.onnx", "../cls/onnx/model.onnx"):
        with pytest.raises(ModelError, match="set `onnx_file`"):
            Engine(settings=Settings(model=str(golden("mean")[0]), device="onnx", onnx_file=file)).start()
    with pytest.raises(ModelError, match=r"config\.json cannot be loaded"):
        Engine(settings=Settings(model=str(golden("mean")[0]), device="onnx", onnx_file="config.json")).start()
    dense = golden("dense")[0]
    with pytest.raises(ModelError, match="Dense"):
        Engine(settings=Settings(model=str(dense), device="onnx", onnx_file="config.json")).start()


def test_made_up_vectors_have_a_fingerprint_that_says_so() -> None:
    with Engine(golden("mean")[0], device="debug") as engine:
        assert engine.spec.fingerprint.startswith("debug-")
        assert engine.embed(["one", "two"]).shape == (2, 32)
        assert engine.stats().counters.executed == {"debug": 2}
