"""OpenAI's API on plain values: what each field of a body asks for, the fields of a reply, and the codes of errors."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from api_values import Listing, body, json, model_info, paths, result, served

from npu_proxy import DeadlineError, DeviceError, DType, EmbedRequest, EmptyInputError, InputError, OverloadedError, TooLongError
from npu_proxy.errors import NpuProxyError
from npu_proxy.server.apis import openai
from npu_proxy.server.apis.openai import DIALECT, EmbeddingsBody, to_error, to_reply, to_requests
from npu_proxy.server.errors import BodyTooLargeError, ClientGoneError, ForbiddenError, UnauthorizedError, UnknownModelError
from npu_proxy.types import Truncate


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
        ({"embedding_type": "binary", "encoding_format": "float"}, "dtype", DType.FLOAT32),
        ({"normalize": False}, "normalize", False),
        ({"normalized": False}, "normalize", False),
        ({"normalize": True, "normalized": False}, "normalize", False),
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
        ({"task": "retrieval.query", "input_type": "document"}, "input_type", "document"),
        ({"prompt_name": "query"}, "prompt_name", "query"),
    ],
)
def test_each_field_sets_its_option_alone(fields: dict[str, object], name: str, value: Any) -> None:
    assert request_of(**fields) == EmbedRequest(texts=["the cat"], **{name: value})


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


def test_a_reply_has_openais_fields_and_no_others() -> None:
    reply = to_reply([result([[0.5, 1.0], [1.5, 2.0]], tokens=[3, 4])], body(EmbeddingsBody, input="a"), served(asked="asked"))
    assert json(reply) == {
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
    assert set(listed["data"][0]) == {"id", "object", "created", "owned_by"}
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
        *(("GET", f"{base}/models") for base in bases),
        *(("GET", f"{base}/models/{{id:path}}") for base in bases),
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
    assert json(to_error(error, status)) == {"error": {"message": str(error), "type": kind, "param": param, "code": code}}
