"""OpenVINO Model Server's API on plain values: its token lists, and the routes it shares with vLLM and Cohere."""

import pytest
from api_values import RERANKER, Listing, body, inference, json, model_info, paths, result, served

from npu_proxy import EmptyInputError, InputError, OverloadedError
from npu_proxy.errors import NpuProxyError
from npu_proxy.server.apis import vllm
from npu_proxy.server.apis.model_server import DIALECT, TokenizeBody, config, ready, tokenize
from npu_proxy.server.apis.pooling import PoolingBody, ScoreBody
from npu_proxy.server.apis.scoring import RerankBody
from npu_proxy.server.errors import UnknownModelError

IDS = served().tokenizer.plain(["the cat"])[0].ids.tolist()


# -- tokens --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"text": "the cat"}, IDS),
        ({"text": ["the cat"]}, [IDS]),
        ({"text": ["the cat", "the cat the"]}, [IDS, [*IDS[:-1], IDS[1], IDS[-1]]]),
        ({"text": "the cat", "add_special_tokens": True}, IDS),
        ({"text": "the cat", "add_special_tokens": False}, IDS[1:-1]),
        ({"text": "the cat", "max_length": 3}, IDS[:3]),
        ({"text": ["the cat", "the"], "max_length": 2}, [IDS[:2], IDS[:2]]),
        ({"text": "the cat", "max_length": 99}, IDS),
        ({"text": "the cat", "max_length": 0}, IDS),
        ({"text": "the cat", "max_length": -1}, IDS),
    ],
)
def test_one_text_has_its_ids_and_several_have_lists_of_them(fields: dict[str, object], tokens: list) -> None:
    assert json(tokenize(body(TokenizeBody, **fields), served())) == {"tokens": tokens}


def test_no_text_at_all_names_its_field() -> None:
    with pytest.raises(EmptyInputError) as caught:
        tokenize(body(TokenizeBody, text=[]), served())
    assert caught.value.param == "text"
    assert json(tokenize(body(TokenizeBody, text=""), served())) == {"tokens": [2, 3]}


# -- routes --------------------------------------------------------------------------------------------------------------


def test_all_paths_of_its_clients_are_there() -> None:
    posts = {("POST", path) for path in ("/v3/pooling", "/v3/score", "/tokenize", "/v3/tokenize", "/v3/rerank")}
    assert paths(DIALECT) == posts | {("GET", "/v1/config"), ("GET", "/v2/models/{id:path}/ready")}


def test_the_configuration_lists_the_models() -> None:
    listing = Listing(model_info("mean"), model_info("cls", loaded=False))
    found = json(config(listing, ""))
    assert {name: entry["model_version_status"][0]["state"] for name, entry in found.items()} == {"mean": "AVAILABLE", "cls": "END"}
    assert json(ready(listing, "cls")) == {"name": "cls", "ready": True}
    with pytest.raises(UnknownModelError):
        ready(listing, "none")


@pytest.mark.parametrize(
    ("path", "other", "asked", "name", "embeddings"),
    [
        ("/v3/pooling", inference(vllm.DIALECT, "/pooling"), body(PoolingBody, input=["a", "b"]), "mean", [[0.5], [1.0]]),
        ("/v3/score", inference(vllm.DIALECT, "/score"), body(ScoreBody, text_1="a", text_2="b"), "mean", [[0.6], [0.8]]),
        (
            "/v3/rerank",
            inference(vllm.DIALECT, "/v1/rerank"),
            body(RerankBody, query="q", documents=["a", "b"], top_n=1),
            RERANKER,
            [[0.5], [1.0]],
        ),
    ],
)
def test_shared_routes_ask_and_answer_alike(path: str, other: object, asked: object, name: str, embeddings: list) -> None:
    own, model = inference(DIALECT, path), served(name)
    assert own.to_requests(asked, model) == other.to_requests(asked, model)  # type: ignore[attr-defined]
    replies = [json(route.to_reply([result(embeddings)], asked, model)) for route in (own, other)]  # type: ignore[attr-defined]
    for reply in replies:
        assert reply.pop("id")
        assert reply.pop("created")
    assert replies[0] == replies[1]
    assert (own.suits, own.texts_per_item) == (other.suits, other.texts_per_item)  # type: ignore[attr-defined]


# -- errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InputError("x", param="text"), 400, "invalid_request_error"),
        (EmptyInputError("x"), 400, "invalid_request_error"),
        (OverloadedError("x"), 503, "server_error"),
        (NpuProxyError("x"), 500, "server_error"),
    ],
)
def test_the_code_of_an_error_is_its_status(error: NpuProxyError, status: int, kind: str) -> None:
    assert DIALECT.status_of(error) == status
    told = json(DIALECT.to_error(error, status))
    assert told == {"error": {"message": str(error), "type": kind, "param": error.param, "code": status}}
