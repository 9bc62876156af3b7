"""Cohere's API on plain values: bodies of both versions, vectors by type, and the shared format of rankings."""

import base64
from typing import Any

import numpy as np
import pytest
from api_values import RERANKER, body, inference, json, paths, result, served

from npu_proxy import Chunking, DeviceError, EmbedRequest, EmptyInputError, InputError, OverloadedError
from npu_proxy.errors import NpuProxyError
from npu_proxy.server.apis import cohere
from npu_proxy.server.apis.cohere import DIALECT, BodyV1, BodyV2
from npu_proxy.server.apis.scoring import RerankBody
from npu_proxy.server.errors import UnknownModelError
from npu_proxy.types import OutputType, Pair, Truncate

BOTH = [BodyV1, BodyV2]

# -- bodies --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({"input_type": "search_query"}, {"input_type": "query"}),
        ({"input_type": "search_document"}, {"input_type": "document"}),
        ({"input_type": "classification"}, {"input_type": "classification"}),
        ({"input_type": "clustering"}, {"input_type": "clustering"}),
        ({"truncate": "NONE"}, {"truncate": Truncate.ERROR}),
        ({"truncate": "START"}, {"truncate": Truncate.START}),
        ({"truncate": "END"}, {"truncate": Truncate.END}),
        ({"embedding_types": ["int8"]}, {}),  # made of floats afterwards
        ({"embedding_types": ["int8", "base64"]}, {"most_numbers": int(256e6 / 21 / 2)}),
    ],
)
def test_each_field_sets_its_option_alone(kind: type[BodyV1], fields: dict[str, object], options: dict) -> None:
    (request,) = cohere.to_requests(body(kind, texts=["a", "b"], **fields), served())
    assert request == EmbedRequest(texts=["a", "b"], **options)


def test_only_the_second_version_has_limits() -> None:
    fields = {"texts": ["a"], "output_dimension": 8, "max_tokens": 5}
    assert cohere.to_requests(body(BodyV1, **fields), served()) == [EmbedRequest(texts=["a"])]
    assert cohere.to_requests(body(BodyV2, **fields), served()) == [EmbedRequest(texts=["a"], dimensions=8, max_tokens=5)]


def test_the_parts_of_an_input_are_one_text() -> None:
    parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "cat"}]
    inputs = [{"content": parts}, {"content": parts[:1]}]
    asked = body(BodyV2, inputs=inputs, texts=["not", "these"])
    assert cohere.to_requests(asked, served()) == [EmbedRequest(texts=["the\ncat", "the"])]
    assert json(cohere.to_v2([result([[1.0], [2.0]])], asked, served()))["texts"] == ["the\ncat", "the"]


@pytest.mark.parametrize(
    ("kind", "fields", "error", "param"),
    [
        (BodyV1, {}, EmptyInputError, "texts"),
        (BodyV2, {"inputs": []}, EmptyInputError, "texts"),
        (BodyV1, {"texts": []}, EmptyInputError, "texts"),
        (BodyV1, {"texts": ["a"], "input_type": "image"}, InputError, "input_type"),
        (BodyV2, {"texts": ["a"], "max_tokens": 0}, InputError, "max_tokens"),
        (BodyV2, {"texts": ["a"], "output_dimension": 9, "embedding_types": ["ubinary"]}, InputError, "output_dimension"),
        (BodyV2, {"inputs": [{"content": [{"type": "image_url"}]}]}, InputError, "inputs"),
        (BodyV2, {"inputs": [{"content": [{"type": "text"}]}]}, InputError, "inputs"),
    ],
)
def test_what_cannot_be_embedded_names_its_field(kind: type, fields: dict, error: type[InputError], param: str) -> None:
    with pytest.raises(InputError) as caught:
        cohere.to_requests(body(kind, **fields), served())
    assert type(caught.value) is error
    assert caught.value.param == param


# -- replies -------------------------------------------------------------------------------------------------------------

UNIT = np.array([[0.6, -0.8, 0, 0, 0, 0, 0, 0]], np.float32)


def test_the_first_version_says_which_form_its_vectors_have() -> None:
    plain = json(cohere.to_v1([result(UNIT, tokens=[7])], body(BodyV1, texts=["a"]), served()))
    assert plain["response_type"] == "embeddings_floats"
    np.testing.assert_allclose(plain["embeddings"], UNIT, atol=1e-6)
    assert plain["texts"] == ["a"]
    assert plain["meta"] == {"api_version": {"version": "1"}, "billed_units": {"input_tokens": 7}}
    assert set(plain) == {"response_type", "id", "embeddings", "texts", "meta"}
    typed = json(cohere.to_v1([result(UNIT)], body(BodyV1, texts=["a"], embedding_types=["int8"]), served()))
    assert (typed["response_type"], typed["embeddings"]) == ("embeddings_by_type", {"int8": [[76, -102, 0, 0, 0, 0, 0, 0]]})


def test_the_second_version_has_the_types_that_were_asked_for() -> None:
    plain = json(cohere.to_v2([result(UNIT)], body(BodyV2, texts=["a"]), served()))
    assert list(plain["embeddings"]) == ["float"]
    assert plain["meta"]["api_version"] == {"version": "2"}
    assert set(plain) == {"id", "embeddings", "texts", "meta"}
    names = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    found = json(cohere.to_v2([result(UNIT)], body(BodyV2, texts=["a"], embedding_types=[*names, "int8"]), served()))["embeddings"]
    assert set(found) == set(names)
    np.testing.assert_allclose(found["float"], UNIT, atol=1e-6)
    assert found["int8"] == [[76, -102, 0, 0, 0, 0, 0, 0]]
    assert found["uint8"] == [[204, 26, 128, 128, 128, 128, 128, 128]]
    assert found["ubinary"] == [[0b10111111]]
    assert found["binary"] == [[0b10111111 - 128]]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(found["base64"][0]), "<f4"), UNIT[0])


# -- rankings ------------------------------------------------------------------------------------------------------------

RERANK = inference(DIALECT, "/v2/rerank")


def rerank_texts(**fields: object) -> list:
    (request,) = RERANK.to_requests(body(RerankBody, query="q", **fields), served(RERANKER))
    assert request.output_type is OutputType.SCORES
    return list(request.texts)


def test_a_document_is_a_text_or_the_fields_that_are_ranked() -> None:
    documents = [{"title": "t", "text": "x", "other": "o"}, "plain", {"text": "y"}]
    assert rerank_texts(documents=documents) == [Pair("q", "x"), Pair("q", "plain"), Pair("q", "y")]
    assert rerank_texts(documents=documents, rank_fields=["title", "text"]) == [
        Pair("q", "t\nx"),
        Pair("q", "plain"),
        Pair("q", "y"),
    ]
    with pytest.raises(InputError) as caught:
        rerank_texts(documents=documents, rank_fields=["title"])
    assert caught.value.param == "documents"


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({"max_tokens_per_doc": 9}, {"max_document_tokens": 9}),
        ({"truncate_prompt_tokens": 9}, {"max_tokens": 9}),
        ({"max_tokens_per_doc": 9, "truncate_prompt_tokens": 5}, {"max_document_tokens": 9, "max_tokens": 5}),
        ({"truncate_prompt_tokens": -1}, {}),
        ({"max_tokens_per_doc": 0}, {}),
        ({"max_chunks_per_doc": 1}, {}),
        ({"max_chunks_per_doc": 3}, {"truncate": Truncate.CHUNK, "chunking": Chunking(most=3)}),
        ({"truncation_side": "left"}, {"truncate": Truncate.START}),
        ({"truncation": False}, {"truncate": Truncate.ERROR}),
        ({"truncate": "none"}, {"truncate": Truncate.ERROR}),
        ({"top_n": 0}, {}),
    ],
)
def test_each_field_of_a_ranking_sets_its_option_alone(fields: dict[str, object], options: dict[str, Any]) -> None:
    (request,) = RERANK.to_requests(body(RerankBody, query="q", documents=["a"], **fields), served(RERANKER))
    assert request == EmbedRequest(texts=[Pair("q", "a")], output_type=OutputType.SCORES, **options)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_n": -1}, "top_n"),
        ({"top_k": -1}, "top_k"),
        ({"top_n": 1, "top_k": 2}, "top_k"),
        ({"use_activation": True, "raw_scores": True}, "use_activation"),
        ({"max_tokens_per_doc": -1, "max_chunks_per_doc": 2, "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"max_tokens_per_doc": 5, "max_chunks_per_doc": 2}, "max_chunks_per_doc"),
        ({"documents": [{"content": [{"type": "image_url"}]}]}, "documents"),
        ({"documents": [{"title": "t"}]}, "documents"),
    ],
)
def test_what_a_ranking_cannot_obey_is_refused_by_name(fields: dict[str, object], param: str) -> None:
    with pytest.raises(InputError) as caught:
        RERANK.to_requests(body(RerankBody, **{"query": "q", "documents": ["a"], **fields}), served(RERANKER))
    assert caught.value.param == param


def test_documents_and_queries_may_be_content_parts() -> None:
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]
    asked = body(
        RerankBody, query={"text": "q"}, documents=[{"content": parts}, {"content": "z"}, {"text": "t", "n": 1, "m": None}]
    )
    (request,) = RERANK.to_requests(asked, served(RERANKER))
    assert request.texts == [Pair("q", "x\ny"), Pair("q", "z"), Pair("q", "t")]


def test_raw_scores_are_logits() -> None:
    for fields in ({"raw_scores": True}, {"use_activation": False}):
        asked = body(RerankBody, query="q", documents=["a", "b"], **fields)
        found = json(RERANK.to_reply([result([[-1.0], [2.0]])], asked, served(RERANKER)))["results"]
        assert [entry["relevance_score"] for entry in found] == [2.0, -1.0]


def test_an_embedding_model_ranks_by_cosine() -> None:
    asked = body(RerankBody, query="q", documents=["a", "b"], top_n=1)
    query, documents = RERANK.to_requests(asked, served())
    assert query == EmbedRequest(texts=["q"], input_type="query")
    assert documents == EmbedRequest(texts=["a", "b"], input_type="document", on_empty="embed")
    results = [result([[0.6, 0.8]]), result([[1.0, 0.0], [0.0, 1.0]])]
    found = json(RERANK.to_reply(results, asked, served()))["results"]
    assert found == [{"index": 1, "relevance_score": pytest.approx(0.8)}]
    with pytest.raises(EmptyInputError):
        RERANK.to_requests(body(RerankBody, query="", documents=["a"]), served())


def test_a_ranking_has_the_fields_of_all_four_apis() -> None:
    documents = [{"title": "t", "text": "x"}, *("plain",) * 100]
    logits = [result([[number / 50] for number in range(101)], tokens=[2] * 101)]
    asked = body(RerankBody, query="q", documents=documents, top_n=2)
    found = json(RERANK.to_reply(logits, asked, served(RERANKER, asked="asked")))
    assert [set(entry) for entry in found["results"]] == [{"index", "relevance_score"}] * 2
    assert [entry["index"] for entry in found["results"]] == [100, 99]
    assert found["meta"].pop("tokens") == {"input_tokens": 202, "output_tokens": 0}
    assert found["meta"] == {"api_version": {"version": "2"}, "billed_units": {"search_units": 2}}  # a hundred documents each
    assert (found["object"], found["model"], found["usage"]["total_tokens"]) == ("rerank", "asked", 202)
    assert set(found) == {"id", "object", "model", "created", "results", "usage", "meta"}
    every = body(RerankBody, query="q", documents=documents, top_n=0, return_documents=True, rank_fields=["title", "text"])
    shown = json(RERANK.to_reply(logits, every, served(RERANKER)))["results"]
    assert len(shown) == 101  # top_n 0 is all
    assert shown[-1]["document"] == {"text": "t\nx"}


# -- errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputError("x", param="texts"), 400),
        (EmptyInputError("x"), 400),
        (UnknownModelError("x"), 404),
        (OverloadedError("x"), 429),
        (DeviceError("x"), 503),
        (NpuProxyError("x"), 500),
    ],
)
def test_an_error_is_a_message(error: NpuProxyError, status: int) -> None:
    assert DIALECT.status_of(error) == status
    assert json(DIALECT.to_error(error, status)) == {"message": str(error)}


def test_all_paths_of_its_clients_are_there() -> None:
    assert paths(DIALECT) == {("POST", path) for path in ("/v1/embed", "/v2/embed", "/v1/rerank", "/v2/rerank", "/v1/tokenize")}
