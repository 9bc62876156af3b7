"""The API of text-embeddings-inference on plain values: bodies, the fields of replies, error types, and who gets a shared path."""

from dataclasses import replace

import numpy as np
import pytest
from api_values import CLASSIFIER, RERANKER, Listing, body, body_fields, inference, json, model_info, paths, result, served

from npu_proxy import DeadlineError, DeviceError, EmbedRequest, EmptyInputError, InputError, OverloadedError, Settings, TooLongError
from npu_proxy.errors import NpuProxyError, StoppedError, UnsupportedError
from npu_proxy.server.apis import tei
from npu_proxy.server.apis.contract import InferenceRoute
from npu_proxy.server.apis.tei import (
    DIALECT,
    AllBody,
    DecodeBody,
    EmbedBody,
    PredictBody,
    RerankBody,
    SimilarityBody,
    TokenizeBody,
)
from npu_proxy.server.errors import BodyTooLargeError, UnauthorizedError, UnknownModelError
from npu_proxy.types import OutputType, Pair, SparseVector, Truncate

# -- bodies --------------------------------------------------------------------------------------------------------------

HOW_CUT = [
    ({}, Truncate.END),
    ({"truncate": None}, Truncate.END),
    ({"truncate": True}, Truncate.END),
    ({"truncate": False}, Truncate.ERROR),
    ({"truncate": False, "truncation_direction": "left"}, Truncate.ERROR),
    ({"truncate": True, "truncation_direction": "right"}, Truncate.END),
    ({"truncation_direction": "Left"}, Truncate.START),
    ({"truncation_direction": "left"}, Truncate.START),
    ({"truncation_direction": "Right"}, Truncate.END),
]


@pytest.mark.parametrize(("fields", "truncate"), HOW_CUT)
def test_every_route_cuts_texts_as_the_body_says(fields: dict[str, object], truncate: Truncate) -> None:
    sentences = {"source_sentence": "a", "sentences": ["b"]}
    found = [
        *tei.to_requests(body(EmbedBody, inputs="a", **fields), served()),
        *tei.similarity_requests(body(SimilarityBody, inputs=sentences, parameters=fields), served()),
        *tei.sparse_requests(body(AllBody, inputs="a", **fields), served("bert_splade")),
        *tei.all_requests(body(AllBody, inputs="a", **fields), served("colbert")),
        *tei.predict_requests(body(PredictBody, inputs="a", **fields), served(CLASSIFIER)),
        *tei.rerank_requests(body(RerankBody, query="q", texts=["a"], **fields), served(RERANKER)),
    ]
    assert [request.truncate for request in found] == [truncate] * 6


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({"normalize": True}, {}),
        ({"normalize": False}, {"normalize": False}),
        ({"prompt_name": "query"}, {"prompt_name": "query"}),
        ({"dimensions": 8}, {"dimensions": 8}),
    ],
)
def test_each_field_sets_its_option_alone(fields: dict[str, object], options: dict[str, object]) -> None:
    (request,) = tei.to_requests(body(EmbedBody, inputs=["a", "b"], **fields), served())
    assert request == EmbedRequest(texts=["a", "b"], on_empty="embed", **options)  # type: ignore[arg-type]


def test_inputs_are_texts_or_ids_or_both() -> None:
    for given, texts in (
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        (["a", [5]], ["a", [5]]),
    ):
        (request,) = tei.to_requests(body(EmbedBody, inputs=given), served())
        assert request.texts == texts


@pytest.mark.parametrize(
    ("given", "settings", "error"),
    [
        ([], {}, EmptyInputError),
        ([5, "a"], {}, InputError),
        ([5, [6]], {}, InputError),
        ([5], {"token_ids": "reject"}, InputError),
        (["a", [5]], {"token_ids": "reject"}, InputError),
    ],
)
def test_inputs_that_mean_nothing_name_their_field(given: list, settings: dict, error: type[InputError]) -> None:
    for kind, convert in ((EmbedBody, tei.to_requests), (AllBody, tei.sparse_requests), (AllBody, tei.all_requests)):
        with pytest.raises(InputError) as caught:
            convert(body(kind, inputs=given), served(**settings))
        assert type(caught.value) is error
        assert caught.value.param == "inputs"


def test_sentences_are_compared_with_the_first_text() -> None:
    given = body(SimilarityBody, inputs={"source_sentence": "a", "sentences": ["b", "c"]}, parameters={"prompt_name": "query"})
    assert tei.similarity_requests(given, served()) == [EmbedRequest(texts=["a", "b", "c"], prompt_name="query")]
    vectors = result([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    assert tei.similarity_reply([vectors], given, served()) == pytest.approx([0.6, 0.8])
    with pytest.raises(EmptyInputError) as caught:
        tei.similarity_requests(body(SimilarityBody, inputs={"source_sentence": "a", "sentences": []}), served())
    assert caught.value.param == "inputs"


def test_sparse_and_token_vectors_are_asked_for_as_they_are() -> None:
    (sparse,) = tei.sparse_requests(body(AllBody, inputs="a", prompt_name="query"), served("bert_splade"))
    (tokens,) = tei.all_requests(body(AllBody, inputs="a"), served("colbert"))
    assert sparse == EmbedRequest(texts=["a"], output_type=OutputType.SPARSE, normalize=False, prompt_name="query")
    assert tokens == EmbedRequest(texts=["a"], output_type=OutputType.TOKENS, normalize=False)


@pytest.mark.parametrize(
    ("given", "texts", "single"),
    [
        ("a", ["a"], True),
        (["a", "b"], [Pair("a", "b")], True),
        ([["a", "b"]], [Pair("a", "b")], False),
        ([["a"], ["b", "c"]], ["a", Pair("b", "c")], False),
    ],
)
def test_two_texts_in_a_list_are_a_pair(given: object, texts: list, single: bool) -> None:
    asked = body(PredictBody, inputs=given)
    (request,) = tei.predict_requests(asked, served(CLASSIFIER))
    assert request == EmbedRequest(texts=texts, output_type=OutputType.SCORES)
    reply = json(tei.predict_reply([result([[0.0, 1.0, 2.0]] * len(texts))], asked, served(CLASSIFIER)))
    assert isinstance(reply[0], dict) == single
    assert len(reply) == (3 if single else len(texts))


@pytest.mark.parametrize("given", [[], ["a", "b", "c"], [[]], [["a", "b", "c"]], ["a", ["b"]]])
def test_predictions_of_anything_else_name_their_field(given: list) -> None:
    with pytest.raises(InputError) as caught:
        tei.predict_requests(body(PredictBody, inputs=given), served(CLASSIFIER))
    assert caught.value.param == "inputs"
    assert isinstance(caught.value, EmptyInputError) == (given == [])


def test_a_list_of_one_text_is_a_single_text_and_parameters_ask_for_a_list_per_text() -> None:
    logits = [result([[0.0, 1.0, 2.0]])]
    alone = body(PredictBody, inputs=["a"])
    assert tei.predict_requests(alone, served(CLASSIFIER)) == [EmbedRequest(texts=["a"], output_type=OutputType.SCORES)]
    assert isinstance(json(tei.predict_reply(logits, alone, served(CLASSIFIER)))[0], dict)
    hugging = body(PredictBody, inputs="a", parameters={"top_k": 2, "function_to_apply": "none"})
    assert [entry["score"] for entry in json(tei.predict_reply(logits, hugging, served(CLASSIFIER)))[0]] == [2.0, 1.0]
    for wrong in ({"top_k": 0}, {"function_to_apply": "sigmoid"}):
        with pytest.raises(InputError) as caught:
            tei.predict_requests(body(PredictBody, inputs="a", parameters=wrong), served(CLASSIFIER))
        assert caught.value.param == f"parameters.{next(iter(wrong))}"


def test_hosted_models_are_asked_by_the_body_and_by_their_kind() -> None:
    routes = [route for route in DIALECT.routes if route.path == "/" and isinstance(route, InferenceRoute)]

    def chosen(name: str, **fields: object) -> type:
        found = (route for route in routes if route.applies(body_fields(**fields), Settings()) and route.suits(served(name).spec))
        return next(found).body

    sentences = {"source_sentence": "a", "sentences": ["b"]}
    assert chosen("mean", inputs="a") is EmbedBody
    assert chosen("mean", inputs=sentences) is SimilarityBody
    assert chosen(CLASSIFIER, inputs="a") is PredictBody
    assert chosen("bert_splade", inputs="a") is AllBody
    assert chosen(RERANKER, query="q", texts=["a"]) is RerankBody


@pytest.mark.parametrize(
    ("speed", "most", "offer"),
    [(0.0, 2048, 32), (10.0, 2048, 32), (6000.0, 2048, 1250), (1e9, 2048, 2048), (1e9, 64, 64), (0.0, 8, 8)],
)
def test_as_many_texts_are_offered_as_fit_into_a_third_of_the_time(speed: float, most: int, offer: int) -> None:
    info = json(tei.info(Listing(model_info(tokens_per_second=speed), max_client_batch=most), ""))
    assert model_info().spec.max_length == 48
    assert info["max_client_batch_size"] == offer


def test_only_a_classifier_predicts_and_only_a_ranker_ranks() -> None:
    with pytest.raises(UnsupportedError):
        tei.predict_requests(body(PredictBody, inputs="a"), served("mean"))
    for name in ("mean", CLASSIFIER):
        with pytest.raises(UnsupportedError):
            tei.rerank_requests(body(RerankBody, query="q", texts=["a"]), served(name))


# -- replies -------------------------------------------------------------------------------------------------------------


def test_one_text_has_a_list_of_one_vector() -> None:
    assert json(tei.to_reply([result([[0.5, 1.0]])], body(EmbedBody, inputs="a"), served())) == [[0.5, 1.0]]


def test_ranks_have_a_text_only_where_it_is_asked_for() -> None:
    logits = [result([[0.0], [2.0]])]
    plain = body(RerankBody, query="q", texts=["a", "b"], raw_scores=True)
    assert json(tei.rerank_reply(logits, plain, served(RERANKER))) == [{"index": 1, "score": 2.0}, {"index": 0, "score": 0.0}]
    shown = body(RerankBody, query="q", texts=["a", "b"], return_text=True)
    first, second = json(tei.rerank_reply(logits, shown, served(RERANKER)))
    assert first == {"index": 1, "score": pytest.approx(1 / (1 + np.exp(-2.0))), "text": "b"}
    assert second == {"index": 0, "score": 0.5, "text": "a"}


def test_predictions_are_probabilities_unless_raw_scores_are_asked_for() -> None:
    logits = [result([[0.0, 2.0, 1.0]])]
    raw = json(tei.predict_reply(logits, body(PredictBody, inputs="a", raw_scores=True), served(CLASSIFIER)))
    assert raw == [
        {"score": 2.0, "label": "LABEL_1"},
        {"score": 1.0, "label": "LABEL_2"},
        {"score": 0.0, "label": "LABEL_0"},
    ]
    shares = json(tei.predict_reply(logits, body(PredictBody, inputs="a"), served(CLASSIFIER)))
    assert sum(entry["score"] for entry in shares) == pytest.approx(1)


def test_sparse_vectors_are_lists_of_entries() -> None:
    vectors = [SparseVector(np.array([3, 7], np.int32), np.array([0.5, 2.0], np.float32))]
    assert json(tei.sparse_reply([result(vectors)], body(AllBody, inputs="a"), served())) == [
        [{"index": 3, "value": 0.5}, {"index": 7, "value": 2.0}]
    ]
    tokens = [np.ones([2, 3], np.float32), np.zeros([1, 3], np.float32)]
    assert json(tei.all_reply([result(tokens)], body(AllBody, inputs="a"), served())) == [[[1.0] * 3] * 2, [[0.0] * 3]]


def test_tokens_have_a_place_unless_they_are_special() -> None:
    asked = body(TokenizeBody, inputs=["the cat"], add_special_tokens=False, prompt_name="query")
    (tokens,) = json(tei.tokenize(asked, served()))
    assert [token["text"] for token in tokens] == ["one", "two", "the", "cat"]
    assert not any(token["special"] for token in tokens)
    (special,) = json(tei.tokenize(body(TokenizeBody, inputs="the"), served()))
    assert [(token["special"], token["start"], token["stop"]) for token in special] == [
        (True, None, None),
        (False, 0, 3),
        (True, None, None),
    ]
    assert set(special[0]) == {"id", "text", "special", "start", "stop"}
    with pytest.raises(EmptyInputError) as caught:
        tei.tokenize(body(TokenizeBody, inputs=[]), served())
    assert caught.value.param == "inputs"


def test_ids_are_one_text_or_one_per_list() -> None:
    class Recorded:
        def decode(self, ids: list[int], *, skip_special: bool) -> str:
            return f"{ids} {skip_special}"

    recorded = replace(served(), tokenizer=Recorded())  # type: ignore[arg-type]  # all that is called of it
    assert tei.decode(body(DecodeBody, ids=[5, 6]), recorded) == ["[5, 6] True"]
    assert tei.decode(body(DecodeBody, ids=[[5, 6], [7]]), recorded) == ["[5, 6] True", "[7] True"]
    assert tei.decode(body(DecodeBody, ids=[5], skip_special_tokens=True), recorded) == ["[5] True"]
    assert tei.decode(body(DecodeBody, ids=[5], skip_special_tokens=False), recorded) == ["[5] False"]
    for wrong in ([5, [6]], [10**6], [-1]):
        with pytest.raises(InputError) as caught:
            tei.decode(body(DecodeBody, ids=wrong), served())
        assert caught.value.param == "ids"


# -- the server ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mean", {"embedding": {"pooling": "mean"}}),
        ("lasttoken", {"embedding": {"pooling": "last_token"}}),
        ("bert_splade", {"embedding": {"pooling": "splade"}}),
        (RERANKER, {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}}),
        (
            CLASSIFIER,
            {
                "classifier": {
                    "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
                    "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2},
                }
            },
        ),
    ],
)
def test_the_info_says_which_routes_to_call(name: str, kind: dict) -> None:
    told = json(tei.info(Listing(model_info(name)), ""))
    assert told["model_type"] == kind
    assert (told["model_id"], told["served_model_name"]) == (name, name)


def test_the_info_has_the_limits_that_clients_split_by() -> None:
    info = model_info("mean", names=("ada", "small"))
    info = replace(info, spec=replace(info.spec, precision="fp16", max_length=99))
    listing = Listing(info, max_client_batch=7, max_queue_items=50, max_queue_tokens=900)
    told = json(tei.info(listing, ""))
    assert told["served_model_name"] == "ada"
    assert (told["model_dtype"], told["max_input_length"], told["max_client_batch_size"]) == ("float16", 99, 7)
    assert (told["max_concurrent_requests"], told["max_batch_tokens"], told["auto_truncate"]) == (50, 900, True)
    assert (told["sha"], told["docker_label"]) == (None, None)


def test_headers_are_whole_numbers_in_one_line() -> None:
    answer = replace(result([[0.5], [1.0]], tokens=[3, 4]), devices=["npu", "a\r\nb: c"])
    found = DIALECT.headers(answer, EmbedRequest(texts=["abc", [5, 6]]))
    assert found == {
        "x-compute-type": "npu,a??b: c",
        "x-compute-characters": "3",
        "x-compute-time": "2000",
        "x-compute-tokens": "7",
        "x-total-time": "2000",
        "x-tokenization-time": "500",
        "x-queue-time": "250",
        "x-inference-time": "1250",
    }


def test_a_shared_path_goes_by_the_fields_of_the_body() -> None:
    routes = {route.path: route for route in DIALECT.routes}
    rerank, tokenize = (routes[path].applies for path in ("/rerank", "/tokenize"))  # type: ignore[union-attr]
    settings = Settings()
    assert rerank(body_fields(query="q", texts=["a"]), settings)
    assert rerank(body_fields(query="q"), settings)  # the error is told in this API's words
    assert not rerank(body_fields(query="q", documents=["a"]), settings)
    assert tokenize(body_fields(inputs="a"), settings)
    assert not tokenize(body_fields(prompt="a"), settings)
    assert not tokenize(body_fields(text="a"), settings)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("/embed", {"mean"}),
        ("/embed_sparse", {"bert_splade"}),
        ("/embed_all", {"colbert"}),
        ("/predict", {CLASSIFIER}),
        ("/rerank", {RERANKER, "colbert"}),
    ],
)
def test_a_body_without_a_model_goes_to_one_that_suits(path: str, names: set[str]) -> None:
    suits = inference(DIALECT, path).suits
    models = ("mean", "bert_splade", "colbert", CLASSIFIER, RERANKER)
    assert {name for name in models if suits(model_info(name).spec)} == names


def test_pairs_count_twice() -> None:
    assert [inference(DIALECT, path).texts_per_item for path in ("/embed", "/similarity")] == [1, 2]
    assert ("GET", "/info") in paths(DIALECT)


# -- errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (EmptyInputError("x"), 400, "Empty"),
        (InputError("x", param="inputs"), 422, "Validation"),
        (InputError("x", param="ids"), 422, "Tokenizer"),
        (TooLongError(limit=5, tokens=6), 422, "Validation"),
        (BodyTooLargeError("x"), 413, "Validation"),
        (UnknownModelError("x"), 404, "Validation"),
        (UnauthorizedError("x"), 401, "Validation"),
        (UnsupportedError("x"), 424, "Backend"),
        (DeviceError("x"), 424, "Backend"),
        (OverloadedError("x"), 429, "Overloaded"),
        (StoppedError("x"), 503, "Unhealthy"),
        (DeadlineError("x"), 504, "Unhealthy"),
    ],
)
def test_errors_are_flat_and_have_the_types_its_clients_know(error: NpuProxyError, status: int, kind: str) -> None:
    assert DIALECT.status_of(error) == status
    assert json(DIALECT.to_error(error, status)) == {"error": str(error), "error_type": kind}
