"""Requests to models whose queries, pairs or tokens are special: what they obey, and what they refuse."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import GOLDEN
from npu_proxy import EmbedRequest, Engine, InputError, ModelError, Pair, Settings, SparseVector
from npu_proxy.errors import EmptyInputError, UnsupportedError
from npu_proxy.models.layout import read_spec
from npu_proxy.types import OutputType, Truncate

ODD = GOLDEN / "odd"


def entries(engine: Engine, text: Any, **options: Any) -> dict[int, float]:
    request = EmbedRequest(texts=[text], output_type=OutputType.SPARSE, **options)
    (vector,) = engine.submit(request).result().raise_first().embeddings
    assert isinstance(vector, SparseVector)
    return dict(zip(vector.indices.tolist(), vector.values.tolist(), strict=True))


def test_a_query_by_table_obeys_the_options_of_its_request() -> None:
    with Engine(ODD / "queries_by_table", settings=Settings(device="cpu")) as engine:
        whole = entries(engine, "the cat sleeps", input_type="query")
        assert len(whole) in (2, 3)  # some weights are 0
        assert entries(engine, "the cat sleeps", input_type="query", truncate=Truncate.CHUNK) == whole
        assert len(entries(engine, "one two three four five", input_type="query", max_tokens=2)) <= 2
        assert len(entries(engine, "the cat sleeps", input_type="document")) > len(whole)
        assert entries(engine, "the cat sleeps") == entries(engine, "the cat sleeps", input_type="document")


def test_what_a_text_is_by_default_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    folder = shutil.copytree(ODD / "queries_by_table", tmp_path / "model")
    before = read_spec(folder).fingerprint
    routes = json.loads((folder / "router_config.json").read_text())
    routes["parameters"]["default_route"] = "query"
    (folder / "router_config.json").write_text(json.dumps(routes))
    assert read_spec(folder).fingerprint != before
    routes["types"] = {name: kind.replace("sentence_transformers.", "my_code.") for name, kind in routes["types"].items()}
    (folder / "router_config.json").write_text(json.dumps(routes))
    with pytest.raises(ModelError, match=r"my_code\..*SparseStaticEmbedding"):
        read_spec(folder)


def test_padding_that_has_no_position_is_refused_in_sparse_models_as_text_and_as_ids() -> None:
    with Engine(GOLDEN / "roberta_splade", settings=Settings(device="cpu")) as engine:
        for text in ("the [PAD] cat", [5, 1, 6]):
            with pytest.raises(InputError, match=r"`\[PAD\]`"):
                entries(engine, text)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"prompt": "query: "}, UnsupportedError),
        ({"truncate": Truncate.START}, UnsupportedError),
    ],
)
def test_a_reranker_with_a_chat_template_refuses_what_it_cannot_do(options: dict, error: type[Exception]) -> None:
    with Engine(ODD / "yes_or_no", settings=Settings(device="cpu")) as engine, pytest.raises(error):
        engine.submit(EmbedRequest(texts=[Pair("a", "b")], output_type=OutputType.SCORES, **options)).result().raise_first()


def test_a_reranker_with_a_chat_template_checks_both_texts() -> None:
    with Engine(ODD / "yes_or_no", settings=Settings(device="cpu", sanitize="basic")) as engine:
        assert len(engine.rerank("the cat", ["a dog", "a\ud800 dog"])) == 2
        request = EmbedRequest(texts=[Pair("", ""), Pair("the cat", ""), "no pair"], output_type=OutputType.SCORES)
        (empty, none, single) = engine.submit(request).result().errors
        assert (type(empty), none, type(single)) == (EmptyInputError, None, UnsupportedError)
        long = engine.rerank("the cat", ["sea " * 500], truncate="chunk")
        assert 0 <= long[0].score <= 1


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content | upper }} {{ messages[1].content }}",
        "{{ messages[1].content }} {{ messages[0].content }}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ 'x' * 1000000 }}",
        "{{ raise_exception('no') }}",
        "{% if %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_does_more_than_put_texts_in_is_refused(
    tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("npu_proxy.models.logit_score._SECONDS", 3.0)
    folder = shutil.copytree(ODD / "yes_or_no", tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match=r"chat_template\.jinja"):
        read_spec(folder)


def test_labels_are_numbered_from_zero(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "roberta_labels", tmp_path / "model")
    stored = json.loads((folder / "config.json").read_text())
    for labels in ({"a": "x", "b": "y"}, ["x", "y"], {"0": "x", "2": "y"}):
        (folder / "config.json").write_text(json.dumps({**stored, "id2label": labels}))
        with pytest.raises(ModelError, match="id2label"):
            read_spec(folder)
