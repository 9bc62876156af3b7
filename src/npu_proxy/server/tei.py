"""The dialect of text-embeddings-inference: /embed, /similarity, /tokenize, /decode, /info. Source: its router, 1.9."""

from __future__ import annotations

from typing import Literal

import msgspec

from npu_proxy.errors import EmptyInputError, InputError, NpuProxyError
from npu_proxy.server.dialect import Action, Dialect, Endpoint, Query, Served, Shelf, floats, header_text, no_head
from npu_proxy.types import EmbedRequest, EmbedResult, TextInput, Truncate
from npu_proxy.version import __version__

Direction = Literal["left", "right", "Left", "Right"]
Vectors = list[list[float]]


class EmbedBody(msgspec.Struct, kw_only=True):
    """Body of POST /embed. truncate: null is the server's default, which is yes."""

    inputs: str | list[str | int | list[int]]
    normalize: bool | None = None
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None
    dimensions: int | None = None


class Similar(msgspec.Struct, kw_only=True):
    """One sentence, and those it is compared with."""

    source_sentence: str
    sentences: list[str]


class SimilarityParameters(msgspec.Struct, kw_only=True):
    """How the sentences are embedded."""

    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None


class SimilarityBody(msgspec.Struct, kw_only=True):
    """Body of POST /similarity."""

    inputs: Similar
    parameters: SimilarityParameters | None = None


class RootBody(EmbedBody, kw_only=True):
    """Body of POST /, by which hosted models are asked: what there is to embed, or sentences to compare."""

    inputs: str | list[str | int | list[int]] | Similar  # type: ignore[reportIncompatibleVariableOverride]
    parameters: SimilarityParameters | None = None


class TokenizeBody(msgspec.Struct, kw_only=True):
    """Body of POST /tokenize."""

    inputs: str | list[str]
    add_special_tokens: bool | None = None
    prompt_name: str | None = None


class Token(msgspec.Struct, kw_only=True):
    """A token and where it lies in the text, in characters; special tokens lie nowhere."""

    id: int
    text: str
    special: bool
    start: int | None = None
    stop: int | None = None


class DecodeBody(msgspec.Struct, kw_only=True):
    """Body of POST /decode."""

    ids: list[int | list[int]]
    skip_special_tokens: bool | None = None


class AllBody(msgspec.Struct, kw_only=True):
    """Body of POST /embed_all and /embed_sparse."""

    inputs: str | list[str | int | list[int]]
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None


class PredictBody(msgspec.Struct, kw_only=True):
    """Body of POST /predict: a text, a pair, or a list of either."""

    inputs: str | list[str | list[str]]
    raw_scores: bool | None = None
    truncate: bool | None = None
    truncation_direction: Direction | None = None


class RerankBody(msgspec.Struct, kw_only=True):
    """Body of POST /rerank."""

    query: str
    texts: list[str]
    raw_scores: bool | None = None
    return_text: bool | None = None
    truncate: bool | None = None
    truncation_direction: Direction | None = None


class Info(msgspec.Struct, kw_only=True):
    """Answer of GET /info."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    served_model_name: str
    model_type: dict[str, dict[str, str]]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: str | None = None
    docker_label: str | None = None


class Error(msgspec.Struct, kw_only=True):
    """Every error of this dialect."""

    error: str
    error_type: str


def to_request(body: EmbedBody, served: Served) -> EmbedRequest:
    """Texts or token ids."""
    return EmbedRequest(
        texts=_inputs(body.inputs, served),
        normalize=body.normalize is not False,
        truncate=_truncate(body.truncate, body.truncation_direction),
        prompt_name=body.prompt_name,
        dimensions=body.dimensions,
    )


def _inputs(given: str | list[str | int | list[int]], served: Served) -> list[TextInput]:
    """A text, token ids of the model's own, or a list that may mix both."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise EmptyInputError("`inputs` cannot be empty", param="inputs")
    numbers = [one for one in given if isinstance(one, int)]
    if numbers and len(numbers) < len(given):
        raise InputError("`inputs` mixes token ids with texts; put the ids of a text in a list", param="inputs")
    texts: list[TextInput] = [numbers] if numbers else [one for one in given if not isinstance(one, int)]
    if served.settings.token_ids == "reject" and not all(isinstance(one, str) for one in texts):
        raise InputError("this server takes no token ids (setting `token_ids`); send text", param="inputs")
    return texts


def to_response(result: EmbedResult, _: EmbedBody, __: Served) -> Vectors:
    """A list of vectors, also for one input."""
    return floats(result).tolist()


def to_similarity_request(body: SimilarityBody, _: Served) -> EmbedRequest:
    """The source first, then those it is compared with. Raises EmptyInputError."""
    given = body.parameters or SimilarityParameters()
    if not body.inputs.sentences:
        raise EmptyInputError("`inputs.sentences` cannot be empty", param="inputs")
    texts: list[TextInput] = [body.inputs.source_sentence, *body.inputs.sentences]
    truncate = _truncate(given.truncate, given.truncation_direction)
    return EmbedRequest(texts=texts, truncate=truncate, prompt_name=given.prompt_name)


def to_similarities(result: EmbedResult, _: SimilarityBody, __: Served) -> list[float]:
    """Cosines with the first text."""
    vectors = floats(result)
    return (vectors[1:] @ vectors[0]).tolist()


def to_root_request(body: RootBody, served: Served) -> EmbedRequest:
    """By what ``inputs`` is."""
    if isinstance(body.inputs, Similar):
        return to_similarity_request(SimilarityBody(inputs=body.inputs, parameters=body.parameters), served)
    return to_request(body, served)


def to_root_response(result: EmbedResult, body: RootBody, served: Served) -> Vectors | list[float]:
    """By what ``inputs`` was."""
    if isinstance(body.inputs, Similar):
        return to_similarities(result, SimilarityBody(inputs=body.inputs), served)
    return to_response(result, body, served)


def tokenize(body: TokenizeBody, served: Served) -> list[list[Token]]:
    """The tokens of each text."""
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    if not texts:
        raise EmptyInputError("`inputs` cannot be empty", param="inputs")
    prompt = served.encoder.prompt(EmbedRequest(texts=texts, prompt_name=body.prompt_name))
    return [
        [
            Token(
                id=one.id,
                text=one.text,
                special=one.special,
                start=None if one.special else one.start,
                stop=None if one.special else one.stop,
            )
            for one in tokens
        ]
        for tokens in served.encoder.tokens(texts, prompt, special=body.add_special_tokens is not False)
    ]


def decode(body: DecodeBody, served: Served) -> list[str]:
    """Text of token ids. Raises InputError for ids that are none of the model's."""
    lists, numbers = [one for one in body.ids if isinstance(one, list)], [one for one in body.ids if isinstance(one, int)]
    if lists and numbers:
        raise InputError("`ids` mixes ids with lists of ids", param="ids")
    lists = lists or [numbers]
    return [served.encoder.decode(ids, skip_special=body.skip_special_tokens is not False) for ids in lists]


def info(shelf: Shelf, _: str) -> Info:
    """The first model and the limits clients split by."""
    spec, settings, names = shelf.default.spec, shelf.settings, shelf.default.names
    pooling = {"cls": "cls", "mean": "mean", "lasttoken": "last_token"}.get(str(spec.pooling), str(spec.pooling))
    return Info(
        model_id=spec.name,
        model_sha=spec.fingerprint,
        model_dtype={"fp32": "float32", "fp16": "float16", "int8": "int8"}[spec.precision],
        served_model_name=names[0] if names else spec.name,
        model_type={"embedding": {"pooling": pooling}},
        max_concurrent_requests=settings.max_queue_items,
        max_input_length=spec.max_length,
        max_batch_tokens=settings.max_queue_tokens,
        max_batch_requests=None,
        max_client_batch_size=settings.max_client_batch,
        auto_truncate=True,
        tokenization_workers=1,
        version=__version__,
    )


def to_error(error: NpuProxyError, status: int) -> Error:
    """The error types its clients know."""
    kinds = {"empty": "Empty", "overloaded": "Overloaded", "unsupported": "Backend", "device": "Backend"}
    kind = kinds.get(error.kind) or ("Unhealthy" if status in (503, 504) else "Tokenizer" if error.param == "ids" else "Validation")
    return Error(error=str(error), error_type=kind)


def headers(result: EmbedResult, request: EmbedRequest) -> dict[str, str]:
    """What its load balancers read; whole milliseconds."""
    timings = result.timings
    return {
        "x-compute-type": header_text(result.device),
        "x-compute-characters": str(sum(len(text) for text in request.texts if isinstance(text, str))),
        "x-compute-time": str(round(1000 * timings.total)),
        "x-compute-tokens": str(sum(result.tokens)),
        "x-total-time": str(round(1000 * timings.total)),
        "x-tokenization-time": str(round(1000 * timings.tokenized)),
        "x-queue-time": str(round(1000 * timings.queued)),
        "x-inference-time": str(round(1000 * timings.infer)),
    }


def _truncate(wanted: bool | None, direction: Direction | None) -> Truncate:
    if wanted is False:
        return Truncate.ERROR
    return Truncate.START if (direction or "right").lower() == "left" else Truncate.END


def _root(path: str) -> Endpoint:
    return Endpoint(
        path=path,
        summary="Embed texts, or compare sentences",
        body=RootBody,
        response=list[list[float] | float],
        to_request=to_root_request,
        to_response=to_root_response,
        sides=2,
    )


DIALECT = Dialect(
    name="text-embeddings-inference",
    routes=[
        Endpoint(
            path="/embed",
            summary="Embed texts",
            body=EmbedBody,
            response=Vectors,
            to_request=to_request,
            to_response=to_response,
        ),
        _root("/"),
        _root("/invocations"),
        Endpoint(
            path="/similarity",
            summary="Cosines of one sentence with others",
            body=SimilarityBody,
            response=list[float],
            to_request=to_similarity_request,
            to_response=to_similarities,
            sides=2,
        ),
        Action(
            path="/tokenize",
            summary="Tokens of texts",
            body=TokenizeBody,
            response=list[list[Token]],
            answer=tokenize,
            when=lambda fields: not fields.has("prompt") and not fields.has("text"),
        ),
        Action(path="/decode", summary="Text of token ids", body=DecodeBody, response=list[str], answer=decode),
        *(
            Action(path=path, summary="For models with another head", body=AllBody, response=None, answer=no_head)
            for path in ("/embed_sparse", "/embed_all")
        ),
        Action(path="/predict", summary="Classify (needs a classifier)", body=PredictBody, response=None, answer=no_head),
        Action(
            path="/rerank",
            summary="Rank texts (needs a reranker)",
            body=RerankBody,
            response=None,
            answer=no_head,
            when=lambda fields: fields.has("texts") or not fields.has("documents"),
        ),
        Query(path="/info", summary="Model and limits", response=Info, answer=info),
    ],
    error=Error,
    to_error=to_error,
    status={"invalid": 422, "too_long": 422, "too_large": 413, "overloaded": 429, "unsupported": 424, "device": 424},
    headers=headers,
)
