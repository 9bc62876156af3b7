"""Graph files of a repository give the model's vectors, under a fingerprint of their own; families not built here, too."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from conftest import GOLDEN, golden, smallest_cosine
from npu_proxy import EmbedRequest, Engine, InputError, Kind, ModelError, Pair, Pooling, Settings, SettingsError
from npu_proxy.models.layout import read_spec
from npu_proxy.prepare.convert import convert


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
    with pytest.raises(ModelError, match="multi answers"):
        Engine(GOLDEN / "bge_m3", device="onnx", settings=Settings(onnx_file="config.json", pooling=Pooling.NONE)).start()


def test_a_family_that_is_not_built_gives_the_vectors_of_its_own_code() -> None:
    folder = GOLDEN / "exported" / "t5_mean"
    texts = json.loads((folder / "texts.json").read_text())
    answers = np.load(folder / "answers.npz")
    with Engine(folder) as engine:  # auto: no family, but a graph file
        assert (engine.device.name, engine.spec.width, engine.spec.family) == ("ir", 48, "t5")
        for key, how in (("", {}), ("query", {"prompt_name": "query"})):
            wanted = np.stack([answers[f"{key}{index}"] for index in range(len(texts))])
            found = engine.embed(texts, normalize=False, **how)
            np.testing.assert_allclose(found, wanted, atol=1e-4)
            assert smallest_cosine(found, wanted) > 0.99999
        engine.device.probe()


def test_a_reranker_of_another_family_ranks_as_its_own_code_does() -> None:
    folder = GOLDEN / "exported" / "electra_rerank"
    stored, answers = json.loads((folder / "texts.json").read_text()), np.load(folder / "answers.npz")
    with Engine(folder) as engine:
        for texts, key in (([Pair(*pair) for pair in stored["pairs"]], ""), (stored["texts"], "single")):
            found = engine.submit(EmbedRequest(texts=texts, want=Kind.SCORES)).result().raise_first().embeddings
            np.testing.assert_allclose(found, [answers[f"{key}{index}"] for index in range(len(texts))], atol=1e-4)


def test_such_a_model_says_where_it_can_be_served(tmp_path: Path) -> None:
    folder = GOLDEN / "exported" / "t5_mean"
    spec = read_spec(folder)
    assert "t5_mean/model.safetensors is missing" in spec.refused
    with pytest.raises(ModelError, match="`device` ir with `ir_file` or `device` onnx with `onnx_file`"):
        Engine(folder, device="cpu").start()
    bare = Path(shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("openvino")))
    shutil.copy(GOLDEN / "mean" / "model.safetensors", bare)
    with pytest.raises(ModelError, match=r"model_type `t5` is not supported; .*`npu-proxy convert` makes"):
        read_spec(bare)


def test_convert_says_what_it_needs(tmp_path: Path) -> None:
    settings = Settings(model=(str(GOLDEN / "mean"),))
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="is there already"):
        convert(settings, tmp_path / "there", trust=False, say=print)
    with pytest.raises(SettingsError, match=r"pip install 'npu-proxy\[convert\]'"):
        convert(settings, tmp_path / "new", trust=False, say=print)
    assert not list(tmp_path.glob("*new*"))
    assert not list(tmp_path.glob(".convert*"))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for file in ("onnx/model_quantized.onnx", "../cls/onnx/model.onnx"):
        with pytest.raises(ModelError, match="set `onnx_file`"):
            Engine(settings=Settings(model=str(golden("mean")[0]), device="onnx", onnx_file=file)).start()
    with pytest.raises(ModelError, match=r"config\.json cannot be loaded"):
        Engine(settings=Settings(model=str(golden("mean")[0]), device="onnx", onnx_file="config.json")).start()


def test_made_up_vectors_have_a_fingerprint_that_says_so() -> None:
    with Engine(golden("mean")[0], device="debug") as engine:
        assert engine.spec.fingerprint.startswith("debug-")
        assert engine.embed(["one", "two"]).shape == (2, 32)
        assert engine.stats().counters.executed == {"debug": 2}
