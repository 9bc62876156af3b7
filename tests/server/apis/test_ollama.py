"""Ollama's API on plain values: what bodies ask for, durations, what is said of models, lines of a pull, words of errors."""

from dataclasses import replace
from typing import Any

import pytest
from api_values import Listing, body, json, model_info, paths, result, served
from hypothesis import given
from hypothesis import strategies as st

from npu_proxy import DeviceError, EmbedRequest, EmptyInputError, InputError, OverloadedError, PullError, TooLongError
from npu_proxy.errors import NothingLeftError, NpuProxyError, UnavailableError
from npu_proxy.server.apis import ollama
from npu_proxy.server.apis.ollama import DIALECT, EmbedBody, NameBody, PromptBody, to_error, to_reply, to_requests
from npu_proxy.server.errors import ForbiddenError, NoBodyError, UnknownModelError
from npu_proxy.types import Truncate
from npu_proxy.version import __version__

# -- bodies --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({"options": {}}, {}),
        ({"truncate": True}, {}),
        ({"truncate": False}, {"truncate": Truncate.ERROR}),
        ({"dimensions": 8}, {"dimensions": 8}),
        ({"dimensions": 32}, {}),  # the model's own width
        ({"dimensions": 4096}, {}),
        ({"dimensions": 0}, {}),
        ({"dimensions": -3}, {}),
        ({"options": {"num_ctx": 5}}, {"max_tokens": 5}),
        ({"options": {"num_ctx": 5.9}}, {"max_tokens": 5}),
        ({"options": {"num_ctx": -1}}, {}),
        ({"options": {"num_ctx": 1e12}}, {}),
        ({"options": {"temperature": 1, "num_ctx": None}}, {}),
    ],
)
def test_each_field_sets_its_option_alone(fields: dict[str, object], options: dict[str, Any]) -> None:
    for given_input, texts in (("a", ["a"]), (["a", "b"], ["a", "b"])):
        (request,) = to_requests(body(EmbedBody, input=given_input, **fields), served())
        assert request == EmbedRequest(texts=texts, on_empty="embed", **options)


def test_the_older_route_has_one_text_that_is_not_normalized() -> None:
    (request,) = ollama.prompt_requests(body(PromptBody, prompt="a", options={"num_ctx": 4}), served())
    assert request == EmbedRequest(texts=["a"], normalize=False, max_tokens=4, on_empty="embed")
    assert ollama.prompt_requests(body(PromptBody, input="a"), served())[0].texts == ["a"]
    assert ollama.prompt_requests(body(PromptBody), served()) == []


@pytest.mark.parametrize("given", [0, 0.0, 0.5])
def test_a_context_of_no_tokens_is_refused_in_ollamas_words(given: float) -> None:
    with pytest.raises(InputError, match="cannot be truncated further"):
        to_requests(body(EmbedBody, input="a", options={"num_ctx": given}), served())


def test_an_operators_placeholder_stands_for_empty_texts_here_too() -> None:
    (request,) = to_requests(body(EmbedBody, input=["a", ""]), served(on_empty="placeholder"))
    assert request.on_empty is None


@pytest.mark.parametrize("given_input", [5, True, {"a": 1}, [["a"]], ["a", None]])
def test_what_is_no_text_names_its_field(given_input: object) -> None:
    with pytest.raises(InputError) as caught:
        to_requests(body(EmbedBody, input=given_input), served())
    assert caught.value.param == "input"


@given(st.integers(0, 10**6), st.sampled_from(["s", "m", "h", "ms", "us", "µs", "ns"]))
def test_a_duration_is_as_long_with_either_sign(number: int, unit: str) -> None:
    def seconds(text: str) -> float | None:
        return ollama.keep_alive(body(EmbedBody, keep_alive=text))

    plain, negative = seconds(f"{number}{unit}"), seconds(f"-{number}{unit}")
    assert plain is not None
    assert negative is not None
    assert seconds(f"+{number}{unit}") == plain
    assert negative == (-number * {"s": 1, "m": 60, "h": 3600, "ms": 1e-3}.get(unit, 1e-6 if unit != "ns" else 1e-9))
    assert plain in (-negative, -1.0)  # ten years are for ever
    assert plain >= 0 or -negative >= 10 * 365 * 86400


@pytest.mark.parametrize("text", ["", "m", "5 m", "m5", "5d", "1h-5m", "--5m", "nan", "9" * 61, "5" * 70 + "s"])
def test_what_is_no_duration_names_its_field(text: str) -> None:
    with pytest.raises(InputError) as caught:
        ollama.keep_alive(body(PromptBody, keep_alive=text))
    assert caught.value.param == "keep_alive"
    assert len(str(caught.value)) < 200


# -- replies -------------------------------------------------------------------------------------------------------------


def test_a_reply_counts_in_nanoseconds_and_adds_the_time_of_loading() -> None:
    reply = to_reply([result([[0.5, 1.0]], tokens=[7])], body(EmbedBody), served(asked="asked", load_seconds=3.0))
    assert json(reply) == {
        "model": "asked",
        "embeddings": [[0.5, 1.0]],
        "total_duration": 5_000_000_000,
        "load_duration": 3_000_000_000,
        "prompt_eval_count": 7,
    }
    assert json(to_reply([], body(EmbedBody), served())) == {
        "model": "some-name",
        "embeddings": [],
        "total_duration": 0,
        "load_duration": 0,
        "prompt_eval_count": 0,
    }
    assert json(ollama.prompt_reply([result([[0.5, 1.0]])], body(PromptBody), served())) == {"embedding": [0.5, 1.0]}
    assert json(ollama.prompt_reply([], body(PromptBody), served())) == {"embedding": []}


def test_models_are_listed_by_all_their_names_and_run_under_one() -> None:
    loaded = model_info("mean", names=("ada", "small:v2"), expires=1_700_000_060.0)
    stored = model_info("cls", loaded=False)
    listed = json(ollama.tags(Listing(loaded, stored), ""))["models"]
    assert [entry["name"] for entry in listed] == ["mean:latest", "ada:latest", "small:v2", "cls:latest"]
    assert set(listed[0]) == {"name", "model", "modified_at", "size", "digest", "details"}
    assert (listed[0]["size"], len(listed[0]["digest"])) == (loaded.size, 64)
    assert set(listed[0]["details"]) == {
        "parent_model",
        "format",
        "family",
        "families",
        "parameter_size",
        "quantization_level",
    }
    assert listed[0]["modified_at"].startswith("2023-11-14T22:13:20")
    (running,) = json(ollama.ps(Listing(loaded, stored), ""))["models"]
    assert set(running) - set(listed[0]) == {"expires_at", "size_vram", "context_length"}
    assert running["expires_at"].startswith("2023-11-14T22:14:20")
    (forever,) = json(ollama.ps(Listing(model_info()), ""))["models"]
    assert forever["expires_at"].startswith("2318")


@pytest.mark.parametrize(("precision", "level"), [("fp32", "F32"), ("fp16", "F16"), ("int8", "Q8_0")])
def test_a_precision_has_ollamas_name(precision: str, level: str) -> None:
    info = model_info()
    shown = ollama.show(body(NameBody, model="mean"), Listing(replace(info, spec=replace(info.spec, precision=precision))))
    assert shown.details.quantization_level == level


def test_a_model_is_shown_by_either_field() -> None:
    listing = Listing(model_info("mean"), model_info("cls"))
    for fields in ({"model": "cls"}, {"name": "cls"}, {"model": "cls", "name": "mean"}):
        shown = json(ollama.show(body(NameBody, **fields), listing))
        assert shown["modelfile"] == "FROM cls\n"
    assert set(shown) == {
        "details",
        "model_info",
        "capabilities",
        "modelfile",
        "parameters",
        "template",
        "license",
        "modified_at",
    }
    assert shown["model_info"] == {
        "general.architecture": "bert",
        "general.parameter_count": model_info("cls").parameters,
        "bert.context_length": 48,
        "bert.embedding_length": 32,
        "bert.pooling_type": "cls",
    }
    with pytest.raises(UnknownModelError):
        ollama.show(body(NameBody, model="other"), listing)


def test_a_model_is_deleted_by_either_field() -> None:
    listing = Listing()
    for fields in ({"model": "a"}, {"name": "b"}, {}):
        assert json(ollama.delete(body(NameBody, **fields), listing)) == {}
    assert listing.deleted == ["a", "b", ""]


# -- pulling -------------------------------------------------------------------------------------------------------------


def lines_of(listing: Listing, **fields: object) -> list[dict]:
    return [json(line) for line in ollama.pull(body(NameBody, **fields), listing)]  # type: ignore[union-attr]


def test_a_pull_is_told_line_by_line() -> None:
    def work(name: str, report: Any) -> None:
        report(f"fetching {name}")
        report("checking")

    listing = Listing(work=work, allow_pull=True)
    assert lines_of(listing, name="e5") == [
        {"status": "pulling e5"},
        {"status": "fetching e5"},
        {"status": "checking"},
        {"status": "success"},
    ]
    assert json(ollama.pull(body(NameBody, model="e5", stream=False), listing)) == {"status": "success"}


@pytest.mark.parametrize("error", [PullError("no mirror has it"), ZeroDivisionError("a secret")])
def test_an_error_is_the_last_line_and_shows_nothing_of_the_server(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    def work(name: str, report: Any) -> None:
        raise error

    listing = Listing(work=work, allow_pull=True)
    first, last = lines_of(listing, model="e5")
    assert first == {"status": "pulling e5"}
    assert set(last) == {"error"}
    assert ("secret" in last["error"]) is False
    assert (str(error) == last["error"]) is isinstance(error, PullError)
    with pytest.raises(type(error)):  # without a stream it is an error like any other
        ollama.pull(body(NameBody, model="e5", stream=False), listing)


def test_a_pull_that_is_not_allowed_is_refused_before_the_first_line() -> None:
    def work(name: str, report: Any) -> None:
        raise ForbiddenError("not here")

    with pytest.raises(ForbiddenError):
        ollama.pull(body(NameBody, model="e5"), Listing(work=work))


# -- errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (NoBodyError("x"), 400, "missing request body"),
        (UnknownModelError("e5"), 404, 'model "e5" not found, try pulling it first'),
        (TooLongError(limit=5, tokens=6), 400, "the input length exceeds the context length"),
        (NothingLeftError("x"), 400, "input after truncation exceeds maximum context length"),
        (OverloadedError("x"), 503, "server busy, please try again.  maximum pending requests exceeded"),
        (EmptyInputError("it is empty", param="input"), 400, "input: it is empty"),
        (InputError("its own words"), 400, "its own words"),
        (DeviceError("its own words"), 503, "its own words"),
        (UnavailableError("its own words"), 503, "its own words"),
        (NpuProxyError("its own words"), 500, "its own words"),
    ],
)
def test_errors_have_ollamas_words_where_its_clients_look_for_them(error: NpuProxyError, status: int, words: str) -> None:
    assert DIALECT.status_of(error) == status
    assert json(to_error(error, status)) == {"error": words}


def test_all_paths_of_its_clients_are_there() -> None:
    assert paths(DIALECT) == {
        ("POST", "/api/embed"),
        ("POST", "/embed"),
        ("POST", "/api/generate"),
        ("POST", "/api/chat"),
        ("POST", "/api/embeddings"),
        ("POST", "/api/show"),
        ("POST", "/api/pull"),
        ("DELETE", "/api/delete"),
        ("GET", "/api/tags"),
        ("GET", "/api/ps"),
        ("GET", "/api/version"),
    }
    (version,) = [route for route in DIALECT.routes if route.path == "/api/version"]
    told = json(version.answer(Listing(), ""))  # type: ignore[union-attr, operator, arg-type]
    assert told["npu_proxy"] == __version__
    assert tuple(map(int, told["version"].split("."))) >= (0, 6, 4)  # which clients ask for
