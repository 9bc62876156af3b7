"""Graph files of a repository compute the model's vectors, under a fingerprint of their own; also for families not built here."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset15 as op

from conftest import GOLDEN, golden, smallest_cosine
from npu_proxy import DeviceError, EmbedRequest, Engine, InputError, ModelError, OutputType, Pair, Pooling, Settings, SettingsError
from npu_proxy.graph import mpnet, roberta
from npu_proxy.models.graph_files import from_graph_file, normalize_config
from npu_proxy.models.layout import read_spec
from npu_proxy.models.pull import pull
from npu_proxy.models.store import ModelStore
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
    answers = dict(np.load(folder / "answers.npz"))
    with Engine(folder, device="onnx") as engine:
        for texts, key in (([Pair(*pair) for pair in stored["pairs"]], ""), (stored["texts"], "single")):
            found = engine.submit(EmbedRequest(texts=texts, output_type=OutputType.SCORES)).result().raise_first().embeddings
            np.testing.assert_allclose(np.asarray(found), [answers[f"{key}{index}"] for index in range(len(texts))], atol=2e-5)
        assert engine.rerank("the cat", ["sea", "the cat sleeps"])
    with pytest.raises(ModelError, match="multi output"):
        Engine(GOLDEN / "bge_m3", device="onnx", settings=Settings(onnx_file="config.json", pooling=Pooling.NONE)).start()


def test_a_family_that_is_not_built_here_has_the_vectors_of_its_own_code() -> None:
    folder = GOLDEN / "exported" / "t5_mean"
    texts = json.loads((folder / "texts.json").read_text())
    answers = dict(np.load(folder / "answers.npz"))
    with Engine(folder) as engine:  # auto: no family, but a graph file
        assert (engine.device.name, engine.spec.width, engine.spec.family) == ("ir", 48, "t5")
        variants: list[tuple[str, dict[str, Any]]] = [("", {}), ("query", {"prompt_name": "query"})]
        for key, options in variants:
            wanted = np.stack([answers[f"{key}{index}"] for index in range(len(texts))])
            found = engine.embed(texts, normalize=False, **options)
            np.testing.assert_allclose(found, wanted, atol=1e-4)
            assert smallest_cosine(found, wanted) > 0.99999
        engine.device.probe()


def test_a_reranker_of_another_family_ranks_as_its_own_code_does() -> None:
    folder = GOLDEN / "exported" / "electra_rerank"
    stored, answers = json.loads((folder / "texts.json").read_text()), dict(np.load(folder / "answers.npz"))
    with Engine(folder) as engine:
        for texts, key in (([Pair(*pair) for pair in stored["pairs"]], ""), (stored["texts"], "single")):
            found = engine.submit(EmbedRequest(texts=texts, output_type=OutputType.SCORES)).result().raise_first().embeddings
            np.testing.assert_allclose(np.asarray(found), [answers[f"{key}{index}"] for index in range(len(texts))], atol=1e-4)


def test_such_a_model_says_where_it_can_be_served(tmp_path: Path) -> None:
    folder = GOLDEN / "exported" / "t5_mean"
    spec = read_spec(folder)
    assert "model_type `t5` is not supported" in spec.refused
    with pytest.raises(ModelError, match=r"cannot be served by `device` cpu: set `device` to ir, or leave it unset"):
        Engine(folder, device="cpu").start()
    with pytest.raises(ModelError, match="set `device` to ir, for which it has a file"):
        Engine(folder, device="onnx").start()
    bare = Path(shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("openvino")))
    shutil.copy(GOLDEN / "mean" / "model.safetensors", bare)
    with pytest.raises(ModelError, match=r"model_type `t5` is not supported; .*`npu-proxy convert` makes"):
        read_spec(bare)


def test_a_graph_of_another_width_is_an_error_and_its_data_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "mean", tmp_path / "mean"))
    (folder / "openvino").mkdir()
    ids, mask = (op.parameter([-1, -1], np.int64, name=name) for name in ("input_ids", "attention_mask"))
    for node, name in ((ids, "input_ids"), (mask, "attention_mask")):
        node.output(0).set_names({name, "12"})
    narrow = op.unsqueeze(op.convert(op.add(ids, mask), "f32"), op.constant(2))
    narrow.output(0).set_names({"1020", "last_hidden_state"})
    model = ov.Model([narrow], [ids, mask], "narrow")  # pyright: ignore[reportGeneralTypeIssues] - a wrong stub
    ov.save_model(model, folder / "openvino" / "openvino_model.xml")
    with pytest.raises(DeviceError, match=r"computed 1 numbers per vector, .* specify 32"):
        Engine(folder, device="ir").start()
    data = folder / "onnx" / "model.onnx.data"
    seen = set()
    for content in (b"one", b"two"):
        data.write_bytes(content)
        seen.add(from_graph_file(Settings(device="onnx"), read_spec(folder)).fingerprint)
    assert len(seen) == 2


def test_an_ir_may_be_in_the_root_as_optimum_writes_it(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "mean", tmp_path / "model")
    ov.save_model(ov.Core().read_model(folder / "onnx" / "model.onnx"), folder / "openvino_model.xml", compress_to_fp16=False)
    shutil.rmtree(folder / "onnx")
    (folder / "model.safetensors").unlink()
    _, texts, vectors = golden("mean")
    with Engine(folder, settings=Settings(device="ir", ir_file="openvino_model.xml")) as engine:
        assert smallest_cosine(engine.embed(texts, normalize=False), vectors) > 0.99999


def test_an_onnx_file_may_take_integers_of_32_bits(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    folder = shutil.copytree(GOLDEN / "mean", tmp_path / "model")
    file = folder / "onnx" / "model.onnx"
    model = onnx.load(file)
    for given in model.graph.input:  # each is widened at once
        given.type.tensor_type.elem_type = onnx.TensorProto.INT32
        for node in model.graph.node:
            node.input[:] = [f"{name}_64" if name == given.name else name for name in node.input]
        cast = onnx.helper.make_node("Cast", [given.name], [f"{given.name}_64"], to=onnx.TensorProto.INT64)
        model.graph.node.insert(0, cast)
    onnx.save(model, file)
    _, texts, vectors = golden("mean")
    with Engine(folder, settings=Settings(device="onnx")) as engine:
        assert smallest_cosine(engine.embed(texts, normalize=False), vectors) > 0.99999


def test_positions_count_from_where_the_family_has_them() -> None:
    for config, first in (
        ({"model_type": "t5", "pad_token_id": 0}, 0),
        ({"model_type": "ibert"}, 2),
        ({"model_type": "longformer", "pad_token_id": 3}, 4),
    ):
        assert normalize_config(config)["first_position"] == first
    assert roberta.KEYS["first_position"]({"pad_token_id": 0}) == 1
    assert mpnet.KEYS["first_position"]({"pad_token_id": 0}) == 2  # whatever its config says


def test_files_may_be_links_as_in_a_hugging_face_cache(tmp_path: Path) -> None:
    for name in ("exported/t5_mean", "mean"):
        source, folder = GOLDEN / name, tmp_path / name
        for file in (path for path in source.rglob("*") if path.is_file()):
            (folder / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (folder / file.relative_to(source)).symlink_to(file)
        with Engine(folder) as engine, Engine(source) as plain:
            np.testing.assert_array_equal(engine.embed(["the cat"]), plain.embed(["the cat"]))
            assert engine.spec.refused == plain.spec.refused


def test_a_converted_model_survives_a_pull(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    stored = pull(store, str(GOLDEN / "exported" / "t5_mean"), mirrors=(), report=print)
    assert (stored.folder / "openvino" / "openvino_model.bin").is_file()
    with Engine(stored.name, settings=Settings(store=tmp_path)) as engine:
        assert engine.device.name == "ir"


def test_convert_says_what_it_needs(tmp_path: Path) -> None:
    settings = Settings(model=(str(GOLDEN / "mean"),))
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="already exists"):
        convert(settings, tmp_path / "there", trust=False, say=print)
    with pytest.raises(SettingsError, match=r"pip install 'npu-proxy\[convert\]'"):
        convert(settings, tmp_path / "new", trust=False, say=print)
    assert not list(tmp_path.glob("*new*"))
    assert not list(tmp_path.glob(".convert*"))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for file, message in (("onnx/model_quantized.onnx", "set `onnx_file`"), ("../cls/onnx/model.onnx", "leads out")):
        with pytest.raises(ModelError, match=message):
            Engine(settings=Settings(model=(str(golden("mean")[0]),), device="onnx", onnx_file=file)).start()
    with pytest.raises(ModelError, match=r"config\.json cannot be loaded"):
        Engine(settings=Settings(model=(str(golden("mean")[0]),), device="onnx", onnx_file="config.json")).start()


def test_debug_vectors_have_a_fingerprint_that_says_so() -> None:
    with Engine(golden("mean")[0], device="debug") as engine:
        assert engine.spec.fingerprint.startswith("debug-")
        assert engine.embed(["one", "two"]).shape == (2, 32)
        assert engine.stats().counters.executed == {"debug": 2}
