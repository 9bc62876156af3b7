"""Whatever is in a model's folder, reading it gives a spec or a ModelError that names the model, and takes little memory."""

import json
import math
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import GOLDEN
from npu_proxy.batch import NATIVE_STYLE, GraphShape
from npu_proxy.devices.graphs import Graphs
from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.errors import ModelError
from npu_proxy.models.layout import read_spec
from npu_proxy.models.store import ModelStore

Spoil = Callable[[Path], object]


def put(file: str, **values: Any) -> Spoil:
    """Change keys of a JSON file."""

    def spoil(folder: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, **values}))

    return spoil


def write(file: str, content: str | bytes) -> Spoil:
    return lambda folder: (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())


ODD_VALUES = [0, -1, "6", 1.5, True, None, [], {}, [1], math.nan, math.inf, 10**30, 10**9]
SIZES = ["num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"]
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
MANY_TENSORS = json.dumps({str(number): EMPTY for number in range(200_000)}).encode()
JSON_FILES = [
    "config.json",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "tokenizer.json",
    "config_sentence_transformers.json",
]
ODD_CONTENTS = ["", "[", "[" * 200_000, "null", "7", '"a"', "[1]", "[[]]", "{}", '{"a":' + "1" * 10_000 + "}", "\0", '{"a": NaN}']
ODD_ORDER = '[{"type": "T.Transformer", "path": "", "idx": "a"}, {"type": "a", "path": "", "idx": 1}]'
SPOILED: dict[str, Spoil] = {
    **{f"{key}={value!r}": put("config.json", **{key: value}) for key in SIZES for value in ODD_VALUES},
    **{f"layer_norm_eps={value!r}": put("config.json", layer_norm_eps=value) for value in ["small", [], {}, None]},
    **{f"max_seq_length={value!r}": put("sentence_bert_config.json", max_seq_length=value) for value in ODD_VALUES},
    **{f"model_max_length={value!r}": put("tokenizer_config.json", model_max_length=value) for value in ODD_VALUES},
    **{f"{file} is {content[:12]!r}": write(file, content) for file in JSON_FILES for content in ODD_CONTENTS},
    **{f"{file} is no UTF-8": write(file, b"\xff\xfe{}") for file in ["config.json", "modules.json", "tokenizer.json"]},
    "10,000 digits": write("config.json", '{"model_type": "bert", "vocab_size": ' + "9" * 10_000 + "}"),
    "modules without types": write("modules.json", '[{"path": ""}]'),
    "modules of numbers": write("modules.json", '[{"type": 1, "path": 2, "idx": "a"}, {"type": 1, "path": 2}]'),
    "idx of many kinds": write("modules.json", ODD_ORDER),
    "a million labels": put("config.json", architectures=["BertForSequenceClassification"], num_labels=10**9),
    "labels are a list": put("config.json", architectures=["BertForSequenceClassification"], id2label=[1, 2]),
    "architectures are text": put("config.json", architectures="Bert"),
    "prompts are a list": put("config_sentence_transformers.json", prompts=["a"]),
    "prompts are numbers": put("config_sentence_transformers.json", prompts={"query": 7}),
    "default prompt is a list": put("config_sentence_transformers.json", default_prompt_name=["a"]),
    "similarity is a number": put("config_sentence_transformers.json", similarity_fn_name=7),
    "model type is a list": put("config.json", model_type=["bert"]),
    "matryoshka is text": put("config.json", matryoshka_dimensions="a"),
    "pooling mode is a number": put("1_Pooling/config.json", pooling_mode=7),
    "a large file": write("config.json", b" " * (17 << 20)),
    "weights are a folder": lambda folder: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").mkdir()),
    "weights are empty": write("model.safetensors", b""),
    "weights are a header": write("model.safetensors", (2**40).to_bytes(8, "little") + b"{}"),
    "shards are numbers": write("model.safetensors.index.json", '{"weight_map": 7}'),
    "shards are elsewhere": write("model.safetensors.index.json", '{"weight_map": {"a": "../../x"}}'),
    "a million tensors": write(
        "model.safetensors",
        len(MANY_TENSORS).to_bytes(8, "little") + MANY_TENSORS,
    ),
}


def error_of(folder: Path) -> str:
    """What is wrong with a model, according to all that reads its files; "" if nothing is. Any other error is raised."""
    try:
        spec = read_spec(folder)
        RequestTokenizer(spec)
        Graphs(spec)(GraphShape(), NATIVE_STYLE)
    except ModelError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("how", SPOILED)
def test_a_folder_is_read_or_refused_by_name(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "odd-model"
    shutil.copytree(GOLDEN / "mean", folder, ignore=shutil.ignore_patterns("onnx", "vectors.npy", "texts.json"))
    SPOILED[how](folder)
    tracemalloc.start()
    try:
        message = error_of(folder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(message) < 1000
    assert peak < 100_000_000


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"name": 7}', '{"name": "other", "source": "", "files": {}}', "[" * 200_000])
def test_a_folder_without_a_manifest_of_its_own_is_no_stored_model(tmp_path: Path, manifest: str) -> None:
    for name in ("mine", "odd name!", "a--b--c"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / ".manifest.json").write_text(manifest)
    store = ModelStore(tmp_path)
    assert store.list() == []
    assert store.find("mine") is None
