"""Instructions: of the call, the settings, the model's files and its documentation, in this order; and settings per model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import GOLDEN
from npu_proxy import EmbedRequest, Engine, FingerprintError, Settings, SettingsError
from npu_proxy.commands.models import describe
from npu_proxy.engine.encode_options import find_prompt
from npu_proxy.models.instructions import DOCUMENTED
from npu_proxy.models.layout import read_spec
from npu_proxy.models.per_model import check_models, settings_of
from npu_proxy.models.resolve import with_documentation
from npu_proxy.settings import general_value

PLAIN = replace(read_spec(GOLDEN / "max"), prompts={})
E5 = replace(PLAIN, name="intfloat/e5-small-v2")


def prompt(spec_name: str = "", files: dict[str, str] | None = None, request: dict[str, str] | None = None, **settings: str) -> str:
    """The prompt of a request to a model with this name and these prompts in its files."""
    spec = replace(PLAIN, name=spec_name or PLAIN.name, prompts=files or {})
    chosen = Settings(**{name: (value,) for name, value in settings.items()})  # type: ignore[arg-type]
    return find_prompt(with_documentation(spec, chosen), EmbedRequest(texts=["a"], **(request or {})))  # type: ignore[arg-type]


def test_the_call_comes_before_the_setting_the_files_and_the_documentation() -> None:
    query = {"input_type": "query"}
    assert prompt("intfloat/e5-small-v2", request=query) == "query: "
    assert prompt("intfloat/e5-small-v2", {"query": "q> "}, query) == "q> "
    assert prompt("intfloat/e5-small-v2", {"query": "q> "}, query, query_instruction="set: ") == "set: "
    assert prompt("intfloat/e5-small-v2", {"query": "q> "}, {"prompt": "own: "}, query_instruction="set: ") == "own: "
    assert prompt("intfloat/e5-small-v2", request={"input_type": "document"}) == "passage: "
    assert prompt("intfloat/e5-small-v2", {"passage": "p> "}, {"input_type": "document"}) == "p> "
    assert prompt("intfloat/e5-small-v2", {"passage": "p> "}, {"input_type": "document"}, document_instruction="d: ") == "d: "
    assert prompt("intfloat/e5-small-v2") == ""  # nobody says what it is
    assert prompt(request=query) == ""


def test_documented_instructions_are_exact_where_copies_are_often_wrong() -> None:
    assert DOCUMENTED["qwen/qwen3-embedding-0.6b"].query.endswith("\nQuery:")
    assert DOCUMENTED["intfloat/multilingual-e5-large-instruct"].query.endswith("\nQuery: ")
    assert "baai/bge-m3" not in DOCUMENTED
    assert all(name == name.lower() and row.source.startswith("https://") for name, row in DOCUMENTED.items())
    assert (
        with_documentation(replace(PLAIN, name="Qwen/Qwen3-Embedding-0.6B"), Settings()).instruction == "Instruct: {task}\nQuery:"
    )


def test_an_instruction_changes_the_fingerprint_and_only_then() -> None:
    assert with_documentation(PLAIN, Settings()).fingerprint == PLAIN.fingerprint
    set_once = with_documentation(PLAIN, Settings(query_instruction=("a: ",)))
    assert set_once.fingerprint != PLAIN.fingerprint
    assert set_once.fingerprint == with_documentation(PLAIN, Settings(query_instruction=("=a: ",))).fingerprint
    assert with_documentation(E5, Settings()).prompt_sources["query"].startswith("https://huggingface.co/intfloat/")


def test_show_says_where_instructions_come_from() -> None:
    about = describe(settings_of(Settings(query_instruction=("find: ",)), str(GOLDEN / "max")))
    assert about["prompts"] == {"query": "find: "} | {k: v for k, v in read_spec(GOLDEN / "max").prompts.items() if k != "query"}
    assert about["prompt sources"] == {"query": "the setting `query_instruction`"}


def test_an_instruction_of_the_settings_is_put_before_the_text() -> None:
    folder = GOLDEN / "max"
    with Engine(folder, settings=Settings(query_instruction=("one two ",), document_instruction=("three ",))) as engine:
        np.testing.assert_array_equal(engine.embed_query("cat"), engine.embed(["one two cat"])[0])
        np.testing.assert_array_equal(engine.embed_documents(["cat"]), engine.embed(["three cat"]))


def test_late_interaction_models_keep_their_own_markers() -> None:
    with pytest.raises(SettingsError, match="late-interaction"):
        with_documentation(read_spec(GOLDEN / "colbert"), Settings(query_instruction=("a: ",)))


# -- per model -----------------------------------------------------------------------------------------------------------


def test_a_setting_is_for_all_models_or_for_one() -> None:
    settings = Settings(model=("all-minilm", "other"), cache_prefix=("general", "all-minilm=own"), query_instruction=("other=q: ",))
    for name in ("all-minilm", "sentence-transformers/all-MiniLM-L6-v2", "ALL-minilm"):
        own = settings_of(settings, name)
        assert (general_value(own.cache_prefix), general_value(own.query_instruction)) == ("own", "")
        assert settings_of(own, name) == own
    other = settings_of(settings, "/folder/other")
    assert (general_value(other.cache_prefix), general_value(other.query_instruction)) == ("general", "q: ")
    check_models(settings, [])


def test_a_value_may_contain_an_equals_sign_and_a_wrong_name_is_refused() -> None:
    settings = Settings(query_instruction=("=a=b: ",))
    check_models(settings, [])
    assert general_value(settings_of(settings, "x").query_instruction) == "a=b: "
    with pytest.raises(SettingsError, match="no model is named `al-minilm`"):
        check_models(Settings(query_instruction=("al-minilm=q: ",)), ["org/stored"])
    check_models(Settings(query_instruction=("stored=q: ",)), ["org/stored"])


def test_matryoshka_dimensions_come_from_the_configuration_or_the_documentation(tmp_path: Path) -> None:
    assert with_documentation(PLAIN, Settings()).matryoshka == ()
    assert with_documentation(replace(PLAIN, name="nomic-ai/nomic-embed-text-v1.5"), Settings()).matryoshka == (
        768,
        512,
        256,
        128,
        64,
    )
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "max", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"matryoshka_dimensions": [16]}))
    assert describe(settings_of(Settings(), str(folder)))["matryoshka"] == "16"
    assert "costs quality" in str(describe(settings_of(Settings(), str(GOLDEN / "max")))["matryoshka"])


# -- fingerprints --------------------------------------------------------------------------------------------------------


def test_another_fingerprint_than_expected_computes_nothing() -> None:
    with Engine(GOLDEN / "max") as engine:
        expected = engine.spec.fingerprint
        assert engine.embed(["a"], expect_fingerprint=expected).shape == (1, engine.spec.width)
        before = engine.stats().counters
        for wrong in ("", "0" * 16, expected.upper()):
            with pytest.raises(FingerprintError, match=expected):
                engine.embed(["b"] * 600, expect_fingerprint=wrong)
        assert engine.stats().counters == before
