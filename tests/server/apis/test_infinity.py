"""Infinity's API on plain values: the fields of its rankings and classes, its errors, and which bodies of /classify are its own."""

from typing import Any

import pytest
from api_values import CLASSIFIER, RERANKER, Listing, body, body_fields, inference, json, model_info, paths, result, served

from npu_proxy import DeviceError, EmbedRequest, EmptyInputError, InputError, OverloadedError, Settings, TooLongError
from npu_proxy.errors import NpuProxyError, UnsupportedError
from npu_proxy.server.apis import infinity
from npu_proxy.server.apis.infinity import DIALECT, ClassifyBody
from npu_proxy.server.apis.scoring import RerankBody, requests_of
from npu_proxy.types import OutputType, Pair

DOCUMENTS = ["a", "b", "c"]


def ranking(**fields: object) -> dict:
    asked = body(RerankBody, query="q", documents=DOCUMENTS, **fields)
    return json(infinity.rerank_reply([result([[0.0], [2.0], [1.0]])], asked, served(RERANKER, asked="asked")))


# -- rerank --------------------------------------------------------------------------------------------------------------


def test_a_query_is_paired_with_each_document() -> None:
    (request,) = requests_of(body(RerankBody, query="q", documents=DOCUMENTS), served(RERANKER))
    assert request == EmbedRequest(texts=[Pair("q", document) for document in DOCUMENTS], output_type=OutputType.SCORES)


def test_a_ranking_has_infinitys_fields() -> None:
    found = ranking(raw_scores=True)
    assert found["results"] == [
        {"relevance_score": 2.0, "index": 1, "document": None},
        {"relevance_score": 1.0, "index": 2, "document": None},
        {"relevance_score": 0.0, "index": 0, "document": None},
    ]
    assert (found["object"], found["model"]) == ("rerank", "asked")
    assert found["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
    assert found["id"].startswith("infinity-")
    assert found["created"] > 1_700_000_000
    assert set(found) == {"object", "results", "model", "usage", "id", "created"}


def test_scores_lie_between_0_and_1_and_documents_are_strings_where_asked_for() -> None:
    found = ranking(return_documents=True, top_n=2)["results"]
    assert [entry["document"] for entry in found] == ["b", "c"]
    assert all(0.5 < entry["relevance_score"] < 1 for entry in found)


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"documents": []}, "documents"), ({"query": ""}, "query"), ({"top_n": -1}, "top_n")],
)
def test_a_body_without_anything_to_rank_names_its_field(fields: dict[str, object], param: str) -> None:
    with pytest.raises(InputError) as caught:
        requests_of(body(RerankBody, **{"query": "q", "documents": DOCUMENTS, **fields}), served(RERANKER))
    assert caught.value.param == param


# -- classify ------------------------------------------------------------------------------------------------------------


def test_classes_have_infinitys_fields() -> None:
    asked = body(ClassifyBody, input=["a", "b"], raw_scores=True)
    assert infinity.classify_requests(asked, served(CLASSIFIER)) == [EmbedRequest(texts=["a", "b"], output_type=OutputType.SCORES)]
    logits = [result([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])]
    found = json(infinity.classify_reply(logits, asked, served(CLASSIFIER, asked="asked")))
    assert found["data"][0] == [
        {"score": 2.0, "label": "LABEL_1"},
        {"score": 1.0, "label": "LABEL_2"},
        {"score": 0.0, "label": "LABEL_0"},
    ]
    assert found["data"][1][0] == {"score": 3.0, "label": "LABEL_0"}
    assert (found["object"], found["model"], found["usage"]["total_tokens"]) == ("classify", "asked", 6)
    assert set(found) == {"object", "data", "model", "usage", "id", "created"}
    shares = json(infinity.classify_reply(logits, body(ClassifyBody, input=["a", "b"]), served(CLASSIFIER)))["data"]
    assert [sum(label["score"] for label in labels) for labels in shares] == pytest.approx([1, 1])


def test_nothing_to_classify_and_no_classifier_are_errors() -> None:
    with pytest.raises(EmptyInputError) as caught:
        infinity.classify_requests(body(ClassifyBody, input=[]), served(CLASSIFIER))
    assert caught.value.param == "input"
    with pytest.raises(UnsupportedError):
        infinity.classify_requests(body(ClassifyBody, input=["a"]), served("mean"))


@pytest.mark.parametrize(
    ("given", "own"),
    [(["a"], True), ([], True), (None, False), ("a", False), ([5, 6], False), ([["a"]], True)],
)
def test_lists_of_texts_are_infinitys_unless_the_setting_says_otherwise(given: object, own: bool) -> None:
    applies = inference(DIALECT, "/classify").applies
    fields = body_fields(input=given)
    assert applies(fields, Settings()) is own
    assert applies(fields, Settings(classify_dialect="infinity"))
    assert not applies(fields, Settings(classify_dialect="vllm"))


def test_a_body_without_input_is_answered_in_infinitys_words() -> None:
    assert inference(DIALECT, "/classify").applies(body_fields(), Settings())
    assert paths(DIALECT) == {("POST", "/rerank"), ("POST", "/classify"), ("GET", "/models")}


@pytest.mark.parametrize(
    ("fields", "setting", "own"),
    [
        ({"raw_scores": False}, "auto", True),
        ({"raw_scores": True, "return_documents": True}, "auto", True),
        ({"return_documents": True}, "auto", False),
        ({"return_documents": True}, "infinity", True),
        ({"raw_scores": False}, "vllm", False),
        ({"texts": ["a"], "raw_scores": False}, "auto", False),
        ({"texts": ["a"]}, "infinity", False),
    ],
)
def test_rankings_with_raw_scores_are_infinitys_unless_the_setting_says_otherwise(fields: dict, setting: Any, own: bool) -> None:
    applies = inference(DIALECT, "/rerank").applies
    assert applies(body_fields(query="q", documents=["a"], **fields), Settings(rerank_dialect=setting)) is own


def test_models_have_what_infinitys_client_insists_on() -> None:
    listed = json(infinity.models(Listing(model_info("mean", names=("ada",)), model_info(RERANKER), model_info(CLASSIFIER)), ""))
    assert [(entry["id"], entry["capabilities"]) for entry in listed["data"]] == [
        ("mean", ["embed"]),
        (RERANKER, ["rerank"]),
        (CLASSIFIER, ["classify"]),
        ("ada", ["embed"]),
    ]
    assert {entry["owned_by"] for entry in listed["data"]} == {"infinity"}
    assert all(entry["stats"]["batch_size"] and entry["backend"] for entry in listed["data"])


# -- errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InputError("x", param="top_n"), 422, "invalid_request_error"),
        (EmptyInputError("x", param="input"), 422, "invalid_request_error"),
        (TooLongError(limit=5, tokens=6), 400, "invalid_request_error"),
        (OverloadedError("x"), 503, "server_error"),
        (DeviceError("x"), 503, "server_error"),
        (NpuProxyError("x"), 500, "server_error"),
    ],
)
def test_the_code_of_an_error_is_its_status(error: NpuProxyError, status: int, kind: str) -> None:
    assert DIALECT.status_of(error) == status
    told = json(DIALECT.to_error(error, status))
    assert told == {"error": {"message": str(error), "type": kind, "param": error.param, "code": status}}
