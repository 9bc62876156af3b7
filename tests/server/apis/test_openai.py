"""OpenAI's API on plain values: what each field of a body asks for, the fields of a reply, and the codes of errors."""

import base64
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from api_values import Listing, body, json, model_info, paths, result, served

from npu_proxy import (
    Chunking,
    DeadlineError,
    DeviceError,
    DType,
    EmbedRequest,
    EmptyInputError,
    InputError,
    OverloadedError,
    TooLongError,
)
from npu_proxy.errors import NpuProxyError
from npu_proxy.server.apis import openai
from npu_proxy.server.apis.embeddings import EmbeddingsBody, to_reply, to_requests
from npu_proxy.server.apis.openai import DIALECT, to_error
from npu_proxy.server.errors import BodyTooLargeError, ClientGoneError, ForbiddenError, UnauthorizedError, UnknownModelError
from npu_proxy.types import TextChunk, Truncate


def request_of(**fields: object) -> EmbedRequest:
    (request,) = to_requests(body(EmbeddingsBody, **{"input": "the cat", **fields}), served())
    return request


# -- bodies --------------------------------------------------------------------------------------------------------------


def test_a_body_with_nothing_but_a_text_asks_for_the_defaults() -> None:
    assert request_of(user="somebody", model="any", unknown=1) == EmbedRequest(texts=["the cat"])
    assert request_of(input=["the cat", "a dog"]) == EmbedRequest(texts=["the cat", "a dog"])


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"dimensions": 8}, "dimensions", 8),
        ({"encoding_format": "float"}, "dtype", DType.FLOAT32),
        ({"encoding_format": "base64"}, "dtype", DType.BASE64),
        ({"embedding_type": "base64"}, "dtype", DType.BASE64),
        ({"embedding_type": "binary"}, "dtype", DType.BINARY),
        ({"embedding_type": "ubinary"}, "dtype", DType.UBINARY),
        ({"embedding_type": "binary", "encoding_format": "float"}, "dtype", DType.BINARY),
        ({"encoding_type": "float"}, "dtype", DType.FLOAT32),
        ({"encoding_format": "BASE64"}, "dtype", DType.BASE64),
        ({"output_dtype": "int8"}, "dtype", DType.INT8),
        ({"output_dtype": "int8", "encoding_format": "base64"}, "dtype", DType.INT8),
        ({"output_dtype": "float", "encoding_format": "base64"}, "dtype", DType.BASE64),
        ({"embed_dtype": "float16"}, "dtype", DType.FLOAT32),
        ({"embed_dtype": "float16", "encoding_format": "base64"}, "dtype", DType.FLOAT16),
        ({"endianness": "big", "encoding_format": "base64"}, "dtype", DType.FLOAT32),
        ({"embedding_type": ["float", "float"]}, "dtype", DType.FLOAT32),
        ({"embedding_type": ["float", "binary"]}, "most_numbers", int(256e6 / 21 / 2)),
        ({"dimensions": 0}, "dimensions", None),
        ({"output_dimension": 8}, "dimensions", 8),
        ({"output_dimension": 8, "dimensions": 8}, "dimensions", 8),
        ({"use_activation": False}, "normalize", False),
        ({"embd_normalize": -1}, "normalize", False),
        ({"embd_normalize": 2}, "normalize", True),
        ({"truncate_prompt_tokens": 9}, "max_tokens", 9),
        ({"truncate_prompt_tokens": -1}, "max_tokens", None),
        ({"truncation_side": "left"}, "truncate", Truncate.START),
        ({"truncation_side": "right"}, "truncate", Truncate.END),
        ({"truncate": "NONE"}, "truncate", Truncate.ERROR),
        ({"truncate": "START"}, "truncate", Truncate.START),
        ({"truncate": "END"}, "truncate", Truncate.END),
        ({"truncation": False}, "truncate", Truncate.ERROR),
        ({"truncation": True}, "truncate", Truncate.END),
        ({"input_type": "passage"}, "input_type", "document"),
        ({"input_type": "SEARCH_QUERY"}, "input_type", "query"),
        ({"input_type": ""}, "input_type", None),
        ({"normalize": False}, "normalize", False),
        ({"normalized": False}, "normalize", False),
        ({"truncate": True}, "truncate", Truncate.END),
        ({"truncate": False}, "truncate", Truncate.ERROR),
        ({"truncate": "end"}, "truncate", Truncate.END),
        ({"truncate": "error"}, "truncate", Truncate.ERROR),
        ({"truncate": "start"}, "truncate", Truncate.START),
        ({"truncate": "chunk"}, "truncate", Truncate.CHUNK),
        ({"input_type": "query"}, "input_type", "query"),
        ({"task": "retrieval.query"}, "input_type", "query"),
        ({"task": "retrieval.passage"}, "input_type", "document"),
        ({"task": "text-matching"}, "input_type", None),
        ({"task": "retrieval.query", "input_type": "search_query"}, "input_type", "query"),
        ({"prompt_name": "query"}, "prompt_name", "query"),
    ],
)
def test_each_field_sets_its_option_alone(fields: dict[str, object], name: str, value: Any) -> None:
    assert request_of(**fields) == EmbedRequest(texts=["the cat"], **{name: value})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"normalize": True, "normalized": False}, "normalized"),
        ({"dimensions": 8, "output_dimension": 16}, "output_dimension"),
        ({"task": "retrieval.query", "input_type": "document"}, "task"),
        ({"task": "poetry"}, "task"),
        ({"input_type": "poetry"}, "input_type"),
        ({"truncate": "middle"}, "truncate"),
        ({"truncate": True, "truncation": False}, "truncation"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"encoding_format": "bytes"}, "encoding_format"),
        ({"embed_dtype": "fp8_e4m3"}, "embed_dtype"),
        ({"output_dtype": "int4"}, "output_dtype"),
        ({"embedding_type": ["float", "int4"]}, "embedding_type"),
        ({"embedding_type": ["float"], "encoding_format": "base64"}, "embedding_type"),
        ({"embedding_type": "binary", "encoding_type": "int8"}, "encoding_type"),
        ({"embedding_type": "base64", "encoding_format": "float"}, "encoding_format"),
        ({"output_dtype": "base64"}, "output_dtype"),
        ({"embedding_type": "binary", "output_dtype": "int8"}, "output_dtype"),
        ({"embd_normalize": 1}, "embd_normalize"),
        ({"embedding_type": ["int8"], "normalize": False}, "normalize"),
        ({"late_chunking": True, "input": [[5, 6], [7]]}, "input"),
        ({"input": [{"type": "image_url", "image_url": {"url": "x"}}]}, "input"),
        ({"input": [{"image": "x"}]}, "input"),
    ],
)
def test_what_cannot_be_obeyed_or_contradicts_itself_is_refused_by_name(fields: dict[str, object], param: str) -> None:
    with pytest.raises(InputError) as caught:
        request_of(**fields)
    assert caught.value.param == param
    assert param in str(caught.value)


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ({"text": "a"}, ["a"]),
        ([{"text": "a"}, {"type": "text", "text": "b"}, "c"], ["a", "b", "c"]),
        ([{"role": "user", "content": "a"}], ["a"]),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, ["a\nb"]),
    ],
)
def test_texts_may_be_in_objects(given: object, texts: list[str]) -> None:
    assert request_of(input=given) == EmbedRequest(texts=texts)


def test_a_task_is_a_prompt_of_that_name_if_the_model_has_one() -> None:
    model = served()
    named = replace(model, spec=replace(model.spec, prompts={"text-matching": "match: "}))
    (request,) = to_requests(body(EmbeddingsBody, input="a", task="text-matching"), named)
    assert request == EmbedRequest(texts=["a"], prompt_name="text-matching")


def test_late_chunking_reads_the_texts_as_one() -> None:
    request = request_of(input=["the cat", "a dog", "x"], late_chunking=True, dimensions=8)
    assert request.texts == ["the cat a dog x"]
    assert request.chunking == Chunking(late=True, spans=True, boundaries=(8, 14))
    assert (request.truncate, request.dimensions) == (Truncate.CHUNK, 8)
    assert request_of(input=["the cat"], late_chunking=True) == EmbedRequest(texts=["the cat"])


FOREIGN = [100_000]


@pytest.mark.parametrize(
    ("given", "name", "token_ids", "texts"),
    [
        (FOREIGN, "text-embedding-3-small", "auto", ["word100000"]),
        ([FOREIGN, [1, 2]], "some-name", "cl100k", ["word100000", "word1 word2"]),
        ([5, 6], "some-name", "model", [[5, 6]]),
        ([[5, 6], [7]], "some-name", "model", [[5, 6], [7]]),
        (FOREIGN, "some-name", "auto", ["word100000"]),  # no ids of the model's own
    ],
)
def test_token_ids_are_whose_the_setting_says(given: list, name: str, token_ids: str, texts: list) -> None:
    (request,) = to_requests(body(EmbeddingsBody, input=given), served(asked=name, token_ids=token_ids))
    assert request.texts == texts


@pytest.mark.parametrize(
    ("given", "settings", "error"),
    [
        ([], {}, EmptyInputError),
        ([[]], {"token_ids": "model"}, EmptyInputError),
        (["a", 5], {}, InputError),
        (["a", [5]], {}, InputError),
        ([5, [5]], {}, InputError),
        ([5], {"token_ids": "reject"}, InputError),
    ],
)
def test_inputs_that_mean_nothing_name_their_field(given: list, settings: dict, error: type[InputError]) -> None:
    with pytest.raises(InputError) as caught:
        to_requests(body(EmbeddingsBody, input=given), served(**settings))
    assert type(caught.value) is error
    assert caught.value.param == "input"


def test_lists_of_token_ids_are_counted_before_they_are_decoded() -> None:
    with pytest.raises(InputError):
        to_requests(body(EmbeddingsBody, input=[[5]] * 4), served(token_ids="cl100k", max_client_batch=3))
    to_requests(body(EmbeddingsBody, input=[[5]] * 3), served(token_ids="cl100k", max_client_batch=3))


# -- replies -------------------------------------------------------------------------------------------------------------


def test_a_reply_has_openais_fields_and_those_that_other_clients_need() -> None:
    reply = to_reply([result([[0.5, 1.0], [1.5, 2.0]], tokens=[3, 4])], body(EmbeddingsBody, input="a"), served(asked="asked"))
    found = json(reply)
    assert found.pop("id").startswith("embd-")
    assert abs(found.pop("created") - time.time()) < 60
    assert found == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.5, 1.0]},
            {"object": "embedding", "index": 1, "embedding": [1.5, 2.0]},
        ],
        "model": "asked",
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    }


def test_coded_and_whole_numbers_are_passed_on_as_they_are() -> None:
    coded = to_reply([result(["AACAPw=="])], body(EmbeddingsBody, input="a"), served())
    assert json(coded)["data"][0]["embedding"] == "AACAPw=="
    bits = to_reply([result(np.array([[-128, 127]], np.int8))], body(EmbeddingsBody, input="a"), served())
    assert json(bits)["data"][0]["embedding"] == [-128, 127]


def vectors_of(embeddings: Any, **fields: object) -> list[Any]:
    reply = to_reply([result(embeddings)], body(EmbeddingsBody, **{"input": "a", **fields}), served())
    return [entry["embedding"] for entry in json(reply)["data"]]


def test_base64_has_the_bytes_of_the_type_that_was_asked_for() -> None:
    coded = vectors_of(np.array([[-128, 5, 127]], np.int8), output_dtype="int8", encoding_format="base64")
    assert np.frombuffer(base64.b64decode(coded[0]), np.int8).tolist() == [-128, 5, 127]
    half = vectors_of(np.array([[0.5, 1.5]], np.float16), embed_dtype="float16", encoding_format="base64")
    assert np.frombuffer(base64.b64decode(half[0]), "<f2").tolist() == [0.5, 1.5]
    big = vectors_of([[0.5, 1.5]], endianness="big", encoding_format="base64")
    assert np.frombuffer(base64.b64decode(big[0]), ">f4").tolist() == [0.5, 1.5]


def test_several_types_have_a_key_each() -> None:
    rows = vectors_of([[0.6, -0.8] * 4, [1.0, 0.0] * 4], embedding_type=["float", "base64", "ubinary"])
    assert rows[0]["float"] == pytest.approx([0.6, -0.8] * 4)
    assert np.frombuffer(base64.b64decode(rows[1]["base64"]), "<f4").tolist() == [1.0, 0.0] * 4
    assert [row["ubinary"] for row in rows] == [[0b10101010], [0b11111111]]
    assert vectors_of([[0.5, 1.0]], embedding_type=["float"]) == [{"float": [0.5, 1.0]}]


def test_late_chunks_are_the_vectors_of_the_texts() -> None:
    chunks = [TextChunk(0, 1, 3, np.array([0.6, 0.8], np.float32)), TextChunk(2, 3, 3, np.array([1.0, 0.0], np.float32))]
    late = replace(result([[0.0, 1.0]]), chunks=[chunks])
    reply = to_reply([late], body(EmbeddingsBody, input=["a", "b"], late_chunking=True), served())
    assert [entry["embedding"] for entry in json(reply)["data"]] == [pytest.approx([0.6, 0.8]), [1.0, 0.0]]


def test_a_model_has_further_names_behind_all_others() -> None:
    listing = Listing(model_info("mean", names=("ada", "small")), model_info("cls", since=5))
    listed = json(openai.models(listing, ""))
    assert [(entry["id"], entry["created"]) for entry in listed["data"]] == [
        ("mean", 1_700_000_000),
        ("cls", 5),
        ("ada", 1_700_000_000),
        ("small", 1_700_000_000),
    ]
    assert listed["object"] == "list"
    assert {"id", "object", "created", "owned_by", "max_model_len", "name", "type", "model_type"} <= set(listed["data"][0])
    assert listed["data"][0]["max_model_len"] == model_info("mean").spec.max_length
    assert listed["models"] == listed["data"]
    assert json(openai.model(listing, "ada"))["id"] == "ada"
    with pytest.raises(UnknownModelError):
        openai.model(listing, "other")


def test_an_owner_is_what_a_name_begins_with() -> None:
    info = model_info()
    owned = replace(info, spec=replace(info.spec, name="intfloat/e5-small"))
    assert json(openai.models(Listing(owned), ""))["data"][0]["owned_by"] == "intfloat"


def test_all_paths_of_its_clients_are_there() -> None:
    bases = ("/v1", "", "/v3")
    assert paths(DIALECT) == {
        *(("POST", f"{base}/embeddings") for base in bases),
        *(("GET", f"{base}/models") for base in bases if base),
        *(("GET", f"{base}/models/{{id:path}}") for base in bases),
        ("POST", "/v1/embedding"),
    }


# -- errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "param"),
    [
        (InputError("x", param="dimensions"), 400, "invalid_request_error", None, "dimensions"),
        (EmptyInputError("x"), 400, "invalid_request_error", None, None),
        (TooLongError(limit=5, tokens=6), 400, "invalid_request_error", "context_length_exceeded", "input"),
        (UnauthorizedError("x"), 401, "invalid_request_error", "invalid_api_key", None),
        (ForbiddenError("x"), 403, "invalid_request_error", None, None),
        (UnknownModelError("x"), 404, "invalid_request_error", "model_not_found", "model"),
        (BodyTooLargeError("x"), 413, "invalid_request_error", None, None),
        (ClientGoneError("x"), 499, "server_error", None, None),
        (NpuProxyError("x"), 500, "server_error", None, None),
        (OverloadedError("x"), 503, "server_error", None, None),
        (DeviceError("x"), 503, "server_error", None, None),
        (DeadlineError("x"), 504, "server_error", None, None),
    ],
)
def test_errors_have_a_type_by_status_and_a_code_where_clients_branch(
    error: NpuProxyError, status: int, kind: str, code: str | None, param: str | None
) -> None:
    assert DIALECT.status_of(error) == status
    assert json(to_error(error, status)) == {
        "error": {"message": str(error), "type": kind, "param": param, "code": code},
        "detail": str(error),
    }
