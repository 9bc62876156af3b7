"""What is not read of a model folder: refused by name, unless it is harmless or the user accepts it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import GOLDEN
from npu_proxy import Engine, ModelError, Settings
from npu_proxy.commands.models import describe
from npu_proxy.models.json_files import JsonObject
from npu_proxy.models.layout import read_spec

Folder = Callable[[str], Path]


@pytest.fixture
def copied(tmp_path: Path) -> Folder:
    """Copies a golden model to where a test may change it."""
    return lambda name: Path(shutil.copytree(GOLDEN / name, tmp_path / "copy", ignore=shutil.ignore_patterns("onnx")))


def change(file: Path, **values: Any) -> None:
    """Set keys of a JSON object, or remove those that are ``...``."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    changed = {key: value for key, value in {**content, **values}.items() if value is not ...}
    file.write_text(json.dumps(changed), encoding="utf-8")


def tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors")


def refusal(folder: Path, **settings: Any) -> str:
    with pytest.raises(ModelError) as caught, Engine(folder, settings=Settings(device="cpu", **settings)):
        pass
    return str(caught.value)


ABOUT, LIMITS, TOKENIZER = "config_sentence_transformers.json", "sentence_bert_config.json", "tokenizer_config.json"


@pytest.mark.parametrize(
    ("model", "file", "values", "names"),
    [
        ("mean", "config.json", {"brand_new": 1}, ["copy/config.json", "`brand_new` is `1`", "set `accept_unread` to brand_new"]),
        ("mean", "config.json", {"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ("mean", "config.json", {"pruned_heads": {"0": [1]}}, ["pruned_heads"]),
        ("mean", "config.json", {"is_causal": True}, ["is_causal"]),
        ("mean", "config.json", {"auto_map": {"AutoModel": "my_code.MyBert"}}, ["auto_map", "MyBert"]),
        ("mean", "config.json", {"intermediate_size": 65}, ["intermediate_size", "64, 32"]),
        ("mean", "config.json", {"vocab_size": 30522}, ["word_embeddings", "vocab_size", "30522"]),
        ("mean", "config.json", {"max_position_embeddings": 512}, ["position_embeddings", "max_position_embeddings"]),
        ("mean", "config.json", {"num_attention_heads": 5}, ["num_attention_heads"]),
        ("mean", "config.json", {"num_hidden_layers": 1}, ["encoder.layer.1."]),
        ("mean", "1_Pooling/config.json", {"brand_new": True}, ["1_Pooling/config.json", "brand_new"]),
        ("mean", ABOUT, {"brand_new": True}, [ABOUT, "brand_new"]),
        ("mean", ABOUT, {"model_type": "SparseEncoder"}, [ABOUT, "model_type"]),
        ("mean", ABOUT, {"truncate_dim": -4}, ["truncate_dim"]),
        ("mean", LIMITS, {"brand_new": True}, [LIMITS, "brand_new"]),
        ("mean", LIMITS, {"processing_kwargs": {"text": {"max_length": 5}}}, ["processing_kwargs"]),
        ("mean", LIMITS, {"tokenizer_name_or_path": "other"}, ["tokenizer_name_or_path"]),
        ("mean", TOKENIZER, {"tokenizer_class": "MyTokenizer"}, ["tokenizer_class", "MyTokenizer"]),
        ("mean", TOKENIZER, {"split_special_tokens": True}, ["split_special_tokens"]),
        ("mean", TOKENIZER, {"do_lower_case": None}, ["do_lower_case"]),
        ("mean", TOKENIZER, {"auto_map": {"AutoTokenizer": ["x.T", None]}}, ["auto_map"]),
        ("mean", TOKENIZER, {"truncation_side": "middle"}, ["truncation_side"]),
        ("dense", "2_Dense/config.json", {"module_input_name": "token_embeddings"}, ["module_input_name"]),
        ("dense", "2_Dense/config.json", {"module_output_name": "scores"}, ["scores"]),
        ("qwen3_last", "config.json", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ("qwen3_last", "config.json", {"is_causal": None}, ["is_causal"]),
        ("qwen3_last", "config.json", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, ["longrope"]),
        ("gemma3_mean", "config.json", {"sliding_window": None}, ["sliding_window"]),
        ("gemma3_mean", "config.json", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, ["rope_parameters"]),
        ("mpnet_mean", "config.json", {"relative_attention_num_buckets": 64}, ["relative_attention_num_buckets"]),
        ("modernbert_mean", "config.json", {"layer_types": ["full_attention"]}, ["layer_types"]),
        ("modernbert_mean", "config.json", {"local_rope_theta": None, "rope_parameters": ...}, ["local_rope_theta"]),
        ("deberta_mean", "config.json", {"relative_attention": ...}, ["relative_attention"]),
        ("bert_splade", "config.json", {"tie_word_embeddings": False}, ["cls.predictions.decoder.weight"]),
        ("bert_splade", ABOUT, {"max_active_dims": 5}, ["max_active_dims"]),
        ("colbert", "2_MultiVectorMask/config.json", {"brand_new": 1}, ["2_MultiVectorMask/config.json", "brand_new"]),
        ("odd/yes_or_no", "1_LogitScore/config.json", {"true_token_id": 10**6}, ["true_token_id"]),
        ("odd/model2vec_int8", "config.json", {"max_length": -1}, ["max_length"]),
        ("odd/splade_sum", "1_SpladePooling/config.json", {"pooling_strategy": "mean"}, ["pooling_strategy"]),
    ],
)
def test_what_is_not_read_or_not_computed_is_named(copied: Folder, model: str, file: str, values: dict, names: list[str]) -> None:
    folder = copied(model)
    change(folder / file, **values)
    message = refusal(folder)
    assert all(name in message for name in names), message


@pytest.mark.parametrize(
    ("model", "file", "values"),
    [
        ("mean", "config.json", {"attention_probs_dropout_prob": 0.5, "torch_dtype": "float16", "transformers_version": "9.9"}),
        ("mean", "config.json", {"task_specific_params": {"a": 1}, "directionality": "bidi", "use_cache": False}),
        ("mean", ABOUT, {"similarity_fn_name": "dot_score", "__version__": {"sentence_transformers": "9.0"}}),
        ("mean", LIMITS, {"modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}}),
        ("mean", TOKENIZER, {"clean_up_tokenization_spaces": True, "name_or_path": "x", "padding_side": "left"}),
        ("dense", "2_Dense/config.json", {"module_input_name": "sentence_embedding", "module_output_name": None}),
    ],
)
def test_what_cannot_change_numbers_changes_none(copied: Folder, model: str, file: str, values: dict) -> None:
    folder = copied(model)
    with Engine(folder, settings=Settings(device="cpu")) as engine:
        before = engine.embed(["the cat sleeps"])
    change(folder / file, **values)
    with Engine(folder, settings=Settings(device="cpu")) as engine:
        np.testing.assert_array_equal(engine.embed(["the cat sleeps"]), before)


def test_a_graph_file_contains_what_config_json_says_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = shutil.copytree(GOLDEN / "mean", tmp_path / "copy")  # with its ONNX file
    change(folder / "config.json", brand_new=True, auto_map={"AutoModel": "my_code.MyBert"})
    with Engine(folder, settings=Settings()) as engine:
        assert engine.device.reports()[0].kind == "onnx"
    assert "is served from its own graph file" in caplog.text
    assert "MyBert" in refusal(folder)
    change(folder / "config.json", auto_map=...)
    assert "brand_new" in refusal(folder)
    for file in ("1_Pooling/config.json", ABOUT, LIMITS, TOKENIZER):
        before = (folder / file).read_text() if (folder / file).exists() else "{}"
        change(folder / file, other=True)
        with pytest.raises(ModelError, match="`other` is `True`"):
            read_spec(folder)
        (folder / file).write_text(before)


def test_tensors_are_named_if_nothing_reads_them_or_they_are_missing(copied: Folder) -> None:
    folder = copied("mean")
    tensors(folder, lambda stored: stored.update({"linear.weight": np.ones((32, 32), np.float32)}))
    assert "`linear.weight`" in refusal(folder)
    tensors(folder, lambda stored: stored.pop("linear.weight"))
    tensors(folder, lambda stored: stored.update({"pooler.dense.weight": np.ones((32, 32), np.float32)}))  # of another head
    with Engine(folder, settings=Settings(device="cpu")) as engine:
        assert engine.embed(["the cat"]).shape == (1, 32)
    tensors(folder, lambda stored: stored.pop("encoder.layer.0.output.dense.bias"))
    assert "encoder.layer.0.output.dense.bias" in refusal(folder)


def test_a_head_that_is_used_is_read_whole(copied: Folder) -> None:
    folder = copied("bert_rerank")
    tensors(folder, lambda stored: stored.update({"classifier.extra.weight": np.ones((3, 3), np.float32)}))
    assert "`classifier.extra.weight`" in refusal(folder)


def test_only_stanfords_layout_has_a_projection_among_its_weights(copied: Folder) -> None:
    folder = copied("colbert")
    tensors(folder, lambda stored: stored.update({"linear.weight": np.ones((16, 32), np.float32)}))
    assert "`linear.weight`" in refusal(folder)


def test_a_tensor_is_accepted_by_the_name_that_the_refusal_says(copied: Folder) -> None:
    folder = copied("qwen3_last")
    before = read_spec(folder).fingerprint
    tensors(folder, lambda stored: stored.update({"model.layers.0.extra.weight": np.ones(3, np.float32)}))
    name = "layers.0.extra.weight"
    assert f"set `accept_unread` to {name}" in refusal(folder)
    with Engine(folder, settings=Settings(device="cpu", accept_unread=(name,))) as engine:
        assert engine.spec.accepted == [name]
        assert engine.spec.fingerprint != before


def test_a_tensor_that_is_there_under_two_names_is_refused(copied: Folder) -> None:
    folder = copied("mean")
    name = "embeddings.word_embeddings.weight"
    tensors(folder, lambda stored: stored.update({f"bert.{name}": stored[name]}))
    assert f"`bert.{name}`" in refusal(folder) or f"`{name}`" in refusal(folder)


def test_the_user_may_accept_what_is_not_read_and_the_fingerprint_says_so(copied: Folder) -> None:
    folder = copied("mean")
    before = read_spec(folder).fingerprint
    change(folder / "config.json", brand_new=True)
    tensors(folder, lambda stored: stored.update({"linear.weight": np.ones(3, np.float32)}))
    accept = ("brand_*", "linear.weight", "not_there")
    assert "linear.weight" in refusal(folder, accept_unread=accept[:1])
    with Engine(folder, settings=Settings(device="cpu", accept_unread=accept)) as engine:
        assert engine.spec.accepted == ["brand_*", "linear.weight"]
        assert engine.spec.fingerprint != before
        assert engine.embed(["the cat"]).shape == (1, 32)
    shown = describe(Settings(device="cpu", model=(str(folder),), accept_unread=accept))
    assert shown["accepted"] == ["brand_*", "linear.weight"]
    assert read_spec(GOLDEN / "mean", accept_unread=accept).fingerprint == before  # nothing to accept


def test_adapters_gguf_and_old_files_say_what_to_do(copied: Folder) -> None:
    folder = copied("mean")
    change(folder / "adapter_config.json", base_model_name_or_path="org/base", peft_type="LORA", r=4, lora_alpha=8, use_dora=True)
    assert "adapter_model.safetensors is missing" in refusal(folder)
    shutil.copy(GOLDEN / "odd" / "lora_adapter" / "adapter_model.safetensors", folder)
    assert "use_dora" in refusal(folder)
    (folder / "adapter_config.json").unlink()
    assert read_spec(folder).adapter_scale == 0
    (folder / "model.safetensors").rename(folder / "model.gguf")
    assert "GGUF" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
    assert "torch before 1.6" in refusal(folder)
    for name in ("tokenizer.json", "pytorch_model.bin", "model.gguf"):
        (folder / name).unlink()
    shutil.copy(GOLDEN / "mean" / "model.safetensors", folder)
    (folder / "sentencepiece.bpe.model").write_bytes(b"x")
    assert "sentencepiece.bpe.model" in refusal(folder)


def test_a_single_file_of_weights_goes_before_shards(copied: Folder) -> None:
    """As in transformers, which leaves an old index when it saves a model again in one file."""
    folder = copied("mean")
    shard = folder / "model-00001-of-00001.safetensors"
    shutil.copy(folder / "model.safetensors", shard)
    tensors(folder, lambda stored: stored.update({name: tensor * 2 for name, tensor in stored.items()}))
    index = {"weight_map": dict.fromkeys(load_file(shard), shard.name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [file.name for file in read_spec(folder).weight_files] == ["model.safetensors"]
    shard.unlink()
    assert read_spec(folder).max_length == 48
    (folder / "model.safetensors").unlink()
    assert shard.name in refusal(folder)


def test_the_first_module_must_be_a_known_class_too(copied: Folder) -> None:
    folder = copied("mean")
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([{**modules[0], "type": "custom_st.Transformer"}, *modules[1:]]))
    assert "custom_st.Transformer" in refusal(folder)


def test_a_text_with_a_token_beyond_the_table_is_an_error_of_that_text(copied: Folder) -> None:
    folder = copied("odd/added_by_decoder")
    entry = {"content": "<new>", "special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    about = json.loads((folder / TOKENIZER).read_text())
    change(folder / TOKENIZER, added_tokens_decoder={**about["added_tokens_decoder"], "900": entry})
    with Engine(folder, settings=Settings(device="cpu")) as engine:
        (result,) = engine.results(["the cat", "the <new> cat"])
    assert result.errors[0] is None
    assert "`<new>`" in str(result.errors[1])


def test_objects_know_what_was_read_of_them() -> None:
    tracked = JsonObject({"a": 1, "b": {"c": 2, "d": 3}, "e": {"f": 4}})
    assert "a" in tracked
    assert tracked == {"a": 1, "b": {"c": 2, "d": 3}, "e": {"f": 4}}
    assert dict(tracked.unread()) == {"a": 1, "b": {"c": 2, "d": 3}, "e": {"f": 4}}
    assert tracked["b"]["c"] == 2
    assert tracked.get("a") == 1
    assert dict(tracked.unread()) == {"b.d": 3, "e": {"f": 4}}
