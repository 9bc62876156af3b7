"""vLLM's API on plain values: pooling, scores, classes and tokens, and the form of its errors."""

import numpy as np
import pytest
from api_values import CLASSIFIER, RERANKER, body, body_fields, inference, json, model_info, paths, result, served

from npu_proxy import DeviceError, DType, EmbedRequest, InputError, OverloadedError, Settings
from npu_proxy.errors import NpuProxyError, UnsupportedError
from npu_proxy.server.apis import vllm
from npu_proxy.server.apis.pooling import PoolingBody, ScoreBody
from npu_proxy.server.apis.vllm import DIALECT, ClassifyBody, DetokenizeBody, TokenizeBody
from npu_proxy.server.errors import UnknownModelError
from npu_proxy.types import OutputType, Pair, Truncate

POOLING, SCORE = inference(DIALECT, "/pooling"), inference(DIALECT, "/score")
COMMON = {"id", "object", "created", "model", "data", "usage"}

# -- pooling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({"dimensions": 8}, {"dimensions": 8}),
        ({"encoding_format": "float"}, {}),
        ({"encoding_format": "base64"}, {"dtype": DType.BASE64}),
        ({"normalize": True}, {}),
        ({"normalize": False}, {"normalize": False}),
        ({"truncate_prompt_tokens": 5}, {"max_tokens": 5}),
        ({"truncate_prompt_tokens": -1}, {}),
        ({"truncation_side": "left"}, {"truncate": Truncate.START}),
        ({"use_activation": False}, {"normalize": False}),
        ({"endianness": "big", "encoding_format": "base64"}, {}),
    ],
)
def test_each_field_sets_its_option_alone(fields: dict[str, object], options: dict) -> None:
    assert POOLING.to_requests(body(PoolingBody, input="a", **fields), served()) == [EmbedRequest(texts=["a"], **options)]


def test_pooled_vectors_have_vllms_fields() -> None:
    found = json(POOLING.to_reply([result([[0.5], [1.5]], tokens=[3, 4])], body(PoolingBody, input="a"), served(asked="asked")))
    assert found["data"] == [
        {"index": 0, "object": "pooling", "data": [0.5]},
        {"index": 1, "object": "pooling", "data": [1.5]},
    ]
    assert (found["object"], found["model"]) == ("list", "asked")
    assert found["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert set(found) == COMMON
    coded = json(POOLING.to_reply([result(["AAAAAA=="])], body(PoolingBody, input="a", encoding_format="base64"), served()))
    assert coded["data"][0]["data"] == "AAAAAA=="


# -- score ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "left", "right"),
    [
        ({"text_1": "a", "text_2": "b"}, ["a"], ["b"]),
        ({"text_1": "a", "text_2": ["b", "c"]}, ["a"], ["b", "c"]),
        ({"text_1": ["a", "d"], "text_2": ["b", "c"]}, ["a", "d"], ["b", "c"]),
        ({"queries": ["a"], "documents": ["b", "c"]}, ["a"], ["b", "c"]),
        ({"data_1": {"content": [{"type": "text", "text": "a"}]}, "data_2": [{"text": "b"}, "c"]}, ["a"], ["b", "c"]),
        ({"queries": "a", "items": ["b"]}, ["a"], ["b"]),
    ],
)
def test_one_text_is_compared_with_all_or_each_with_its_own(fields: dict[str, object], left: list[str], right: list[str]) -> None:
    asked = body(ScoreBody, truncate_prompt_tokens=9, **fields)
    assert SCORE.to_requests(asked, served()) == [EmbedRequest(texts=[*left, *right], max_tokens=9, on_empty="embed")]
    pairs = [Pair(left[0] if len(left) == 1 else left[index], text) for index, text in enumerate(right)]
    assert SCORE.to_requests(asked, served(RERANKER)) == [EmbedRequest(texts=pairs, output_type=OutputType.SCORES, max_tokens=9)]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "queries"),
        ({"text_1": "a"}, "documents"),
        ({"text_2": "a"}, "queries"),
        ({"text_1": [], "text_2": ["a"]}, "queries"),
        ({"text_1": "a", "text_2": []}, "documents"),
        ({"text_1": ["a", "b"], "text_2": ["c"]}, "queries"),
        ({"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, "queries"),
    ],
)
def test_sides_that_do_not_pair_up_name_their_field(fields: dict[str, object], param: str) -> None:
    for name in ("mean", RERANKER):
        with pytest.raises(InputError) as caught:
            SCORE.to_requests(body(ScoreBody, **fields), served(name))
        assert caught.value.param == param


def test_scores_are_cosines_or_a_cross_encoders_own() -> None:
    vectors = [result([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]], tokens=[3, 4, 5])]
    one_with_two = body(ScoreBody, text_1="a", text_2=["b", "c"])
    found = json(SCORE.to_reply(vectors, one_with_two, served(asked="asked")))
    assert [(entry["index"], entry["object"]) for entry in found["data"]] == [(0, "score"), (1, "score")]
    assert [entry["score"] for entry in found["data"]] == pytest.approx([0.6, 0.8])
    assert (found["object"], found["model"], found["usage"]["total_tokens"]) == ("list", "asked", 12)
    assert set(found) == COMMON
    logits = [result([[0.0], [3.0]])]
    ranked = json(SCORE.to_reply(logits, one_with_two, served(RERANKER)))["data"]
    assert [entry["score"] for entry in ranked] == pytest.approx([0.5, 1 / (1 + np.exp(-3.0))])
    each = [result([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.6, 0.8]])]
    paired = json(SCORE.to_reply(each, body(ScoreBody, text_1=["a", "b"], text_2=["c", "d"]), served()))["data"]
    assert [entry["score"] for entry in paired] == pytest.approx([0.6, 0.8])


def test_a_classifier_of_many_labels_does_not_score() -> None:
    with pytest.raises(UnsupportedError):
        SCORE.to_requests(body(ScoreBody, text_1="a", text_2="b"), served(CLASSIFIER))
    assert {name for name in ("mean", "bert_splade", "colbert", RERANKER) if SCORE.suits(model_info(name).spec)} == {
        "mean",
        RERANKER,
    }
    assert SCORE.texts_per_item == 2


# -- classify ------------------------------------------------------------------------------------------------------------


def test_classes_are_in_the_models_order() -> None:
    logits = [result([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])]
    found = json(vllm.to_reply(logits, body(ClassifyBody, input=["a", "b"]), served(CLASSIFIER, asked="asked")))
    first, second = found["data"]
    assert (first["index"], first["label"], first["num_classes"]) == (0, "LABEL_1", 3)
    assert (second["index"], second["label"]) == (1, "LABEL_0")
    exponentials = np.exp([0.0, 2.0, 1.0])
    assert first["probs"] == pytest.approx(exponentials / exponentials.sum())
    assert set(first) == {"index", "label", "probs", "num_classes"}
    assert set(found) == COMMON
    assert (found["object"], found["model"]) == ("list", "asked")


def test_a_text_is_classified_alone_or_with_others() -> None:
    for given, texts in (("a", ["a"]), (["a", "b"], ["a", "b"])):
        requests = vllm.to_requests(body(ClassifyBody, input=given), served(CLASSIFIER))
        assert requests == [EmbedRequest(texts=texts, output_type=OutputType.SCORES)]
    (request,) = vllm.to_requests(body(ClassifyBody, input=[5, 6]), served(CLASSIFIER, token_ids="model"))
    assert request.texts == [[5, 6]]
    with pytest.raises(UnsupportedError):
        vllm.to_requests(body(ClassifyBody, input="a"), served("mean"))


# -- tokens --------------------------------------------------------------------------------------------------------------


def test_tokens_are_counted_and_named_where_asked_for() -> None:
    plain = json(vllm.tokenize(body(TokenizeBody, prompt="the cat"), served()))
    assert plain == {"count": 4, "max_model_len": 48, "tokens": plain["tokens"], "token_strs": None}
    named = json(vllm.tokenize(body(TokenizeBody, prompt="the cat", return_token_strs=True), served()))
    assert named["token_strs"] == ["[CLS]", "the", "cat", "[SEP]"]
    bare = json(vllm.tokenize(body(TokenizeBody, prompt="the cat", add_special_tokens=False), served()))
    assert bare["tokens"] == plain["tokens"][1:-1]
    back = vllm.detokenize(body(DetokenizeBody, tokens=plain["tokens"]), served())
    assert json(back) == dict.fromkeys(("prompt", "content", "text"), "[CLS] the cat [SEP]")
    with pytest.raises(InputError):
        vllm.detokenize(body(DetokenizeBody, tokens=[10**6]), served())


def test_a_body_with_a_prompt_is_vllms() -> None:
    (route,) = [route for route in DIALECT.routes if route.path == "/tokenize"]
    assert route.applies(body_fields(prompt="a"), Settings())  # type: ignore[union-attr]
    assert not route.applies(body_fields(inputs="a", text="a"), Settings())  # type: ignore[union-attr]
    assert {path for _, path in paths(DIALECT)} == {
        "/pooling",
        "/score",
        "/v1/score",
        "/tokenize",
        "/v1/tokenize",
        "/detokenize",
        "/v1/detokenize",
        "/classify",
        "/v1/classify",
        "/rerank",
        "/v1/rerank",
        "/v2/rerank",
        "/v1/reranks",
    }


# -- errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InputError("x", param="input"), 400, "invalid_request_error"),
        (UnknownModelError("x"), 404, "invalid_request_error"),
        (OverloadedError("x"), 503, "server_error"),
        (DeviceError("x"), 503, "server_error"),
        (NpuProxyError("x"), 500, "server_error"),
    ],
)
def test_the_code_of_an_error_is_its_status(error: NpuProxyError, status: int, kind: str) -> None:
    assert DIALECT.status_of(error) == status
    told = json(DIALECT.to_error(error, status))
    assert told == {"error": {"message": str(error), "type": kind, "param": error.param, "code": status}}
