"""What a folder's files say about output types, scores, late interaction and limits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import GOLDEN
from npu_proxy import EmptyInputError, Engine, Pooling, Settings
from npu_proxy.models.layout import read_spec

Folder = Callable[[str], Path]


@pytest.fixture
def copied(tmp_path: Path) -> Folder:
    def copy(name: str) -> Path:
        return shutil.copytree(GOLDEN / name, tmp_path / name)

    return copy


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "stored", "problem", "activation"),
    [
        ("bert_rerank", "torch.nn.modules.activation.Sigmoid", None, "sigmoid"),
        ("bert_rerank", "torch.nn.modules.linear.Identity", None, "identity"),
        ("bert_rerank", None, "regression", "sigmoid"),
        ("roberta_labels", "torch.nn.modules.linear.Identity", None, "softmax"),
        ("roberta_labels", "torch.nn.modules.activation.Sigmoid", None, "sigmoid"),
        ("roberta_labels", None, "multi_label_classification", "sigmoid"),
        ("roberta_labels", None, "regression", "identity"),
    ],
)
def test_what_turns_logits_into_scores(copied: Folder, name: str, stored: str | None, problem: str | None, activation: str) -> None:
    folder = copied(name)
    change(folder / "config_sentence_transformers.json", activation_fn=stored)
    change(folder / "config.json", problem_type=problem)
    assert read_spec(folder).activation == activation


def test_a_mask_says_which_side_skips_words(copied: Folder) -> None:
    folder = copied("colbert")
    file = next(folder.glob("*_MultiVectorMask")) / "config.json"
    documents = read_spec(folder)
    assert documents.late_interaction is not None
    assert documents.late_interaction.skip_ids
    assert not documents.late_interaction.query_skip_ids
    change(file, skiplist_tasks=["query", "document"])
    both = read_spec(folder)
    assert both.late_interaction is not None
    assert both.late_interaction.query_skip_ids == both.late_interaction.skip_ids == documents.late_interaction.skip_ids
    assert both.fingerprint != documents.fingerprint
    with Engine(folder, "cpu") as skipping, Engine(GOLDEN / "colbert", "cpu") as plain:
        fewer, all = (len(engine.embed_tokens(["cat ? dog ?"], input_type="query")[0]) for engine in (skipping, plain))
        assert all - fewer == 2


def test_a_limit_applies_to_queries_and_documents() -> None:
    spec = read_spec(GOLDEN / "colbert", max_length=8)
    assert spec.late_interaction is not None
    config = spec.late_interaction
    assert max(spec.max_length, config.expanded_length, config.query_length, config.document_length) == 8
    with Engine(GOLDEN / "colbert", settings=Settings(device="cpu", max_length=8)) as engine:
        assert len(engine.embed_tokens(["x"], input_type="query")[0]) == 8
    assert read_spec(GOLDEN / "mean", max_length=1000).max_length == 48


def test_static_models_share_and_weigh_vectors_as_model2vec_stores_them(copied: Folder) -> None:
    folder = copied("static")
    table = load_file(folder / "model.safetensors")["embedding.weight"]
    rng = np.random.default_rng(0)
    mapping, weights = rng.integers(0, 20, len(table)), rng.random(len(table)).astype(np.float32)
    save_file({"embeddings": table[:20], "mapping": mapping, "weights": weights}, folder / "model.safetensors")
    whole = table[:20][mapping] * weights[:, None]
    with Engine(folder, "cpu") as engine:
        texts = ["the cat sleeps", "one two three", "x"]
        for text, found in zip(texts, engine.embed(texts, normalize=False), strict=True):
            ids = engine.tokenizer.plain([text])[0].ids
            np.testing.assert_allclose(found, whole[ids].mean(axis=0), atol=1e-5)


def test_a_text_without_any_token_is_an_error_not_a_vector() -> None:
    with Engine(GOLDEN / "static", "cpu") as engine:
        for truncate in ("end", "chunk"):
            with pytest.raises(EmptyInputError, match="has no tokens"):
                engine.embed(["  \n "], truncate=truncate)


def test_pooling_none_gives_the_tokens_of_a_dense_model_and_all_outputs_of_bge_m3() -> None:
    assert read_spec(GOLDEN / "mean", pooling=Pooling.NONE).output_types == ("tokens",)
    assert read_spec(GOLDEN / "bge_m3", pooling=Pooling.NONE).output_types == ("dense", "sparse", "tokens")
    assert read_spec(GOLDEN / "bge_m3").output_types == ("dense",)
