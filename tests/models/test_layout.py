"""Model folders as sentence-transformers and Hugging Face write them, and the file that each refusal names."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import GOLDEN
from npu_proxy import ModelError, Pooling
from npu_proxy.models.layout import output_type_of, read_spec
from npu_proxy.types import OutputType

Folder = Callable[[str], Path]
MODULES, ABOUT, LIMITS = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"


@pytest.fixture
def copied(tmp_path: Path) -> Folder:
    """Copies a golden model to where a test may spoil it."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(GOLDEN / name, tmp_path / "copies" / name, ignore=shutil.ignore_patterns("onnx")))

    return copy


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def change(file: Path, **changes: object) -> None:
    """Set keys of a JSON object, or remove those that are None."""
    content = (read(file) if file.exists() else {}) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")


def refusal(folder: Path, **options: object) -> str:
    """The message with which a folder is refused; it shows no path of this machine."""
    with pytest.raises(ModelError) as caught:
        read_spec(folder, **options)  # type: ignore[arg-type]
    assert str(folder.parent) not in str(caught.value)
    return str(caught.value)


# -- sentence-transformers' folders --------------------------------------------------------------------------------------


def test_the_transformer_may_have_a_folder_of_its_own(copied: Folder) -> None:
    flat, nested = read_spec(GOLDEN / "mean"), copied("mean")
    (nested / "0_Transformer").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", LIMITS):
        (nested / name).rename(nested / "0_Transformer" / name)
    first, *rest = json.loads((nested / MODULES).read_text())
    (nested / MODULES).write_text(json.dumps([first | {"path": "0_Transformer"}, *rest]))
    spec = read_spec(nested)
    assert list(spec.tokenizer.files) == [nested / "0_Transformer" / "tokenizer.json"]
    assert list(spec.weight_files) == [nested / "0_Transformer" / "model.safetensors"]
    assert (spec.pooling, spec.width, spec.max_length, spec.prompts) == (flat.pooling, flat.width, flat.max_length, flat.prompts)
    (nested / "0_Transformer" / "config.json").unlink()
    (nested / "0_Transformer" / LIMITS).unlink()
    assert "0_Transformer/config.json" in refusal(nested) or "mean/config.json" in refusal(nested)


def test_modules_are_taken_by_their_place_not_their_numbers(copied: Folder) -> None:
    """As in sentence-transformers."""
    folder = copied("dense")
    modules = json.loads((folder / MODULES).read_text())
    (folder / MODULES).write_text(json.dumps([module | {"idx": 9 - module["idx"]} for module in modules]))
    spec = read_spec(folder)
    assert (spec.pooling, spec.width, len(spec.modules), spec.normalizes) == (Pooling.MEAN, 16, 1, True)
    assert spec.fingerprint == read_spec(GOLDEN / "dense").fingerprint


@pytest.mark.parametrize("mode", ["cls", ["cls"]])
def test_newer_pooling_files_name_their_mode(copied: Folder, mode: object) -> None:
    folder = copied("mean")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode, "include_prompt": False}))
    spec = read_spec(folder)
    assert (spec.pooling, spec.include_prompt) == (Pooling.CLS, False)
    change(folder / "1_Pooling" / "config.json", pooling_mode=["cls", "max"])
    assert "1_Pooling/config.json" in refusal(folder)
    change(folder / "1_Pooling" / "config.json", pooling_mode="median")
    assert "1_Pooling/config.json" in refusal(folder)


def test_the_limit_is_the_first_that_is_stated(copied: Folder) -> None:
    folder = copied("mean")
    positions = read(folder / "config.json")["max_position_embeddings"]
    change(folder / "tokenizer_config.json", model_max_length=40)
    assert read_spec(folder).max_length == 48  # sentence_bert_config.json goes first
    (folder / LIMITS).unlink()
    assert read_spec(folder).max_length == 40
    change(folder / "tokenizer_config.json", model_max_length=10**30)  # as transformers writes where it knows none
    assert read_spec(folder).max_length == positions
    (folder / "tokenizer_config.json").unlink()
    assert read_spec(folder).max_length == positions
    assert read_spec(folder, max_length=7).max_length == 7


def test_a_name_is_the_folders_unless_it_is_given() -> None:
    assert read_spec(GOLDEN / "mean").name == "mean"
    assert read_spec(GOLDEN / "mean", name="some/name").name == "some/name"


def test_a_prompt_may_be_the_default_and_null_is_none(copied: Folder) -> None:
    folder = copied("mean")
    change(folder / ABOUT, prompts={"query": "one ", "document": None}, default_prompt_name="query")
    spec = read_spec(folder)
    assert (dict(spec.prompts), spec.default_prompt) == ({"query": "one ", "document": ""}, "query")


@pytest.mark.parametrize(
    ("prompt", "template"),
    [
        ("Instruct: find it\nQuery:", "Instruct: {task}\nQuery:"),
        ("task: search result | query: ", "task: {task} | query: "),
        ("one two ", ""),
    ],
)
def test_a_prompt_shows_whether_the_model_takes_tasks(copied: Folder, prompt: str, template: str) -> None:
    folder = copied("mean")
    change(folder / ABOUT, prompts={"query": prompt})
    assert read_spec(folder).instruction == template


def test_the_fingerprint_is_that_of_what_decides_the_vectors(copied: Folder) -> None:
    folder = copied("mean")
    before = read_spec(folder).fingerprint
    assert read_spec(folder, name="another").fingerprint == before == read_spec(GOLDEN / "mean").fingerprint
    tensors = load_file(folder / "model.safetensors")
    name = min(tensors)
    tensors[name] = tensors[name] + np.float32(1)
    save_file(tensors, folder / "model.safetensors")
    weights = read_spec(folder).fingerprint
    change(folder / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False, pooling_mode_max_tokens=True)
    assert len({before, weights, read_spec(folder).fingerprint}) == 3


# -- plain Hugging Face folders ------------------------------------------------------------------------------------------


def plain(folder: Path) -> Path:
    """Without anything that sentence-transformers adds."""
    for name in (MODULES, ABOUT, LIMITS):
        (folder / name).unlink()
    for added in folder.glob("[0-9]_*"):
        shutil.rmtree(added)
    return folder


def test_a_plain_folder_is_read_with_the_pooling_it_is_given(copied: Folder) -> None:
    folder = plain(copied("mean"))
    spec = read_spec(folder, pooling=Pooling.MAX)
    assert (spec.pooling, spec.width, spec.modules, spec.normalizes) == (Pooling.MAX, 32, [], False)
    assert (dict(spec.prompts), spec.default_prompt, spec.similarity) == ({}, None, "cosine")
    assert spec.max_length == read(folder / "config.json")["max_position_embeddings"]
    assert "`pooling`" in refusal(folder)


def test_a_plain_classifier_needs_nothing_but_its_config(copied: Folder) -> None:
    folder = plain(copied("roberta_labels"))
    spec = read_spec(folder)
    assert (spec.output_type, spec.activation, spec.width) == (OutputType.SCORES, "softmax", 3)
    assert spec.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    change(folder / "config.json", id2label={"0": "no", "1": "yes"})
    assert read_spec(folder).labels == ["no", "yes"]
    change(folder / "config.json", id2label=None, label2id=None)
    assert read_spec(folder).labels == ["LABEL_0", "LABEL_1"]  # transformers' own default is two
    # With a pooling it is an encoder like any other.
    assert read_spec(folder, pooling=Pooling.CLS).output_type is OutputType.DENSE


@pytest.mark.parametrize(
    ("name", "setting", "output_type", "pooling"),
    [
        ("mean", None, OutputType.DENSE, Pooling.MEAN),
        ("mean", Pooling.NONE, OutputType.TOKENS, Pooling.NONE),
        ("bert_splade", None, OutputType.SPARSE, Pooling.SPLADE),
        ("colbert", None, OutputType.TOKENS, Pooling.NONE),
        ("colbert_stanford", None, OutputType.TOKENS, Pooling.NONE),
        ("bert_rerank", None, OutputType.SCORES, Pooling.CLS),
        ("static", None, OutputType.DENSE, Pooling.MEAN),
    ],
)
def test_the_output_type_is_that_of_the_files(
    name: str, setting: Pooling | None, output_type: OutputType, pooling: Pooling
) -> None:
    folder = GOLDEN / name
    spec = read_spec(folder, pooling=setting)
    assert (spec.output_type, spec.pooling) == (output_type, pooling)
    if name != "colbert_stanford":  # what else it needs is seen later
        assert output_type_of(folder, setting)[0] is output_type


def test_sparse_models_are_compared_by_products_unless_they_say_otherwise(copied: Folder) -> None:
    folder = copied("bert_splade")
    spec = read_spec(folder)
    assert (spec.similarity, spec.width) == ("dot", spec.vocabulary)
    change(folder / ABOUT, similarity_fn_name="cosine")
    assert read_spec(folder).similarity == "cosine"


def test_weights_may_lie_in_several_files(copied: Folder) -> None:
    folder = copied("mean")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert [file.name for file in read_spec(folder).weight_files] == sorted(shards)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../elsewhere"}}))
    assert "model.safetensors.index.json" in refusal(folder)


# -- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({}, MODULES),
        ([], MODULES),
        ([5], MODULES),
        ([{"type": "sentence_transformers.models.Transformer"}], MODULES),
        ([{"path": ""}], MODULES),
        ([{"type": "sentence_transformers.models.CLIPModel", "path": ""}], "sentence_transformers.models.CLIPModel"),
        ([{"type": "sentence_transformers.models.Transformer", "path": ""}], MODULES),  # nothing pools
        ([{"type": "sentence_transformers.models.Transformer", "path": "/etc"}], MODULES),
    ],
)
def test_modules_that_make_no_model_are_refused(copied: Folder, content: object, named: str) -> None:
    folder = copied("mean")
    (folder / MODULES).write_text(json.dumps(content))
    message = refusal(folder)
    assert MODULES in message
    assert named in message


@pytest.mark.parametrize("name", [MODULES, ABOUT, LIMITS, "config.json", "1_Pooling/config.json"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b"5"])
def test_a_file_that_cannot_be_read_is_named(copied: Folder, name: str, content: bytes) -> None:
    folder = copied("mean")
    (folder / name).write_bytes(content)
    assert name in refusal(folder)


@pytest.mark.parametrize(
    ("model", "removed"),
    [
        ("mean", "tokenizer.json"),
        ("mean", "config.json"),
        ("mean", "model.safetensors"),
        ("mean", "1_Pooling/config.json"),
        ("dense", "2_Dense/config.json"),
        ("dense", "2_Dense/model.safetensors"),
        ("bert_splade", "1_SpladePooling/config.json"),
        ("static", "model.safetensors"),
    ],
)
def test_a_file_that_is_missing_is_named(copied: Folder, model: str, removed: str) -> None:
    folder = copied(model)
    (folder / removed).unlink()
    assert removed in refusal(folder)


@pytest.mark.parametrize(
    ("model", "file", "changes"),
    [
        ("mean", "config.json", {"vocab_size": None}),
        ("mean", "config.json", {"vocab_size": "many"}),
        ("dense", "2_Dense/config.json", {"activation_function": "torch.nn.modules.activation.CELU"}),
        ("dense", "2_Dense/config.json", {"use_residual": True}),  # without the tensor
        ("dense", "2_Dense/config.json", {"out_features": 17}),
        ("dense", "2_Dense/config.json", {"in_features": 17}),
        ("bert_splade", "1_SpladePooling/config.json", {"pooling_strategy": "mean"}),
        ("bert_splade", "1_SpladePooling/config.json", {"activation_function": "gelu"}),
        ("colbert", "2_MultiVectorMask/config.json", {"keep_only_token_ids": [1, 2]}),
        ("colbert", LIMITS, {"query_expansion": {"strategy": "longest"}}),
        ("colbert", LIMITS, {"query_expansion": {"strategy": "fixed", "token": "[PAD]"}}),
    ],
)
def test_what_is_not_supported_names_its_file(copied: Folder, model: str, file: str, changes: dict[str, object]) -> None:
    folder = copied(model)
    read_spec(folder)
    change(folder / file, **changes)
    assert file in refusal(folder)


def test_a_second_pooling_is_refused(copied: Folder) -> None:
    folder = copied("mean")
    modules = json.loads((folder / MODULES).read_text())
    shutil.copytree(folder / "1_Pooling", folder / "2_Pooling")
    (folder / MODULES).write_text(json.dumps([*modules[:2], modules[1] | {"path": "2_Pooling", "idx": 2}]))
    assert "2_Pooling/config.json" in refusal(folder)


def test_rerankers_by_chat_template_are_refused(copied: Folder) -> None:
    folder = copied("mean")
    modules = json.loads((folder / MODULES).read_text())
    (folder / MODULES).write_text(json.dumps([modules[0], modules[1] | {"type": "sentence_transformers.models.LogitScore"}]))
    message = refusal(folder)
    assert MODULES in message
    assert "LogitScore" in message
    with pytest.raises(ModelError):
        output_type_of(folder, None)


def test_a_setting_may_not_contradict_the_files(copied: Folder) -> None:
    message = refusal(copied("mean"), pooling=Pooling.CLS)
    assert MODULES in message
    assert "`pooling`" in message
    assert read_spec(GOLDEN / "mean", pooling=Pooling.MEAN).pooling is Pooling.MEAN


def test_queries_expanded_with_a_token_that_is_not_there_are_refused(copied: Folder) -> None:
    folder = copied("colbert")
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    assert "[MASK]" in text
    (folder / "tokenizer.json").write_text(text.replace("[MASK]", "[NONE]"), encoding="utf-8")
    assert "tokenizer.json" in refusal(folder)
    change(folder / LIMITS, query_expansion=None)
    spec = read_spec(folder)
    assert spec.late_interaction is not None
    assert spec.late_interaction.expanded_length == 0


def test_the_projection_of_bge_m3_is_checked(copied: Folder) -> None:
    folder = copied("bge_m3")
    shutil.copy(folder / "sparse_linear.pt", folder / "colbert_linear.pt")
    assert "colbert_linear.pt" in refusal(folder, pooling=Pooling.NONE)
    assert read_spec(folder).output_type is OutputType.DENSE  # where it is not read


def test_a_folder_that_is_none_is_named_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        read_spec(tmp_path / "nothing")
    assert "nothing" in str(caught.value)
    with pytest.raises(ModelError) as caught:
        read_spec(tmp_path)  # empty
    assert "config.json" in str(caught.value)
