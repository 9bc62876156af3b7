"""The dialect of text-embeddings-inference: /embed, /similarity, /tokenize, /decode, /info. Source: its router, 1.9.

Bodies may name a `model`, an addition of npu-proxy; without one the first that can answer does.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from npu_proxy.engine.manner import prompt_of
from npu_proxy.engine.verbs import classifies, ranks_with, sparse_of, tokens_of
from npu_proxy.errors import EmptyInputError, InputError, NpuProxyError
from npu_proxy.server.dialect import Action, Dialect, Endpoint, Query, Served, Shelf, floats, header_text
from npu_proxy.server.ranks import classes, ranks, to_classes, to_rank
from npu_proxy.types import EmbedRequest, EmbedResult, Kind, ModelSpec, Pair, TextInput, Truncate
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
    model: str | None = None


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
    model: str | None = None


class RootBody(EmbedBody, kw_only=True):
    """Body of POST /, by which hosted models are asked: what there is to embed, or sentences to compare."""

    inputs: str | list[str | int | list[int]] | Similar  # type: ignore[reportIncompatibleVariableOverride]
    parameters: SimilarityParameters | None = None


class TokenizeBody(msgspec.Struct, kw_only=True):
    """Body of POST /tokenize."""

    inputs: str | list[str]
    add_special_tokens: bool | None = None
    prompt_name: str | None = None
    model: str | None = None


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
    model: str | None = None


class AllBody(msgspec.Struct, kw_only=True):
    """Body of POST /embed_all and /embed_sparse."""

    inputs: str | list[str | int | list[int]]
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None
    model: str | None = None


class PredictBody(msgspec.Struct, kw_only=True):
    """Body of POST /predict: a text, a pair, or a list of either."""

    inputs: str | list[str | list[str]]
    raw_scores: bool | None = None
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    model: str | None = None


class RerankBody(msgspec.Struct, kw_only=True):
    """Body of POST /rerank."""

    query: str
    texts: list[str]
    raw_scores: bool | None = None
    return_text: bool | None = None
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    model: str | None = None


class Entry(msgspec.Struct, kw_only=True):
    """An entry of the vocabulary and its weight."""

    index: int
    value: float


class Prediction(msgspec.Struct, kw_only=True):
    """A label and its score."""

    score: float
    label: str


class Rank(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A text's place among those of the request, and its score."""

    index: int
    score: float
    text: str | None = None


class Pooled(msgspec.Struct, kw_only=True):
    """How a model embeds."""

    pooling: str


class Labels(msgspec.Struct, kw_only=True):
    """Labels by number and numbers by label."""

    id2label: dict[str, str]
    label2id: dict[str, int]


class ModelType(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One of them: what the model is, by which clients know the routes to call."""

    embedding: Pooled | None = None
    reranker: Labels | None = None
    classifier: Labels | None = None


class Info(msgspec.Struct, kw_only=True):
    """Answer of GET /info."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    served_model_name: str
    model_type: ModelType
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
    prompt = prompt_of(served.spec, EmbedRequest(texts=texts, prompt_name=body.prompt_name))
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
        model_type=_model_type(spec, pooling),
        max_concurrent_requests=settings.max_queue_items,
        max_input_length=spec.max_length,
        max_batch_tokens=settings.max_queue_tokens,
        max_batch_requests=None,
        max_client_batch_size=settings.max_client_batch,
        auto_truncate=True,
        tokenization_workers=1,
        version=__version__,
    )


def _model_type(spec: ModelSpec, pooling: str) -> ModelType:
    """What clients look at to know which routes to call."""
    if spec.kind is not Kind.SCORES:
        return ModelType(embedding=Pooled(pooling=pooling))
    names = {str(number): label for number, label in enumerate(spec.labels)}
    numbers = {label: number for number, label in enumerate(spec.labels)}
    labels = Labels(id2label=names, label2id=numbers)
    return ModelType(reranker=labels) if len(spec.labels) == 1 else ModelType(classifier=labels)


def to_sparse_request(body: AllBody, served: Served) -> EmbedRequest:
    """Texts or token ids, for weights of the vocabulary."""
    return _all(body, served, Kind.SPARSE)


def to_sparse(result: EmbedResult, _: AllBody, __: Served) -> list[list[Entry]]:
    """The weights that are not 0, of each text."""
    return [[Entry(index=int(index), value=float(value)) for index, value in zip(*one, strict=True)] for one in sparse_of(result)]


def to_all_request(body: AllBody, served: Served) -> EmbedRequest:
    """Texts or token ids, for a vector a token."""
    return _all(body, served, Kind.TOKENS)


def to_all(result: EmbedResult, _: AllBody, __: Served) -> list[Vectors]:
    """The vectors of each text's tokens."""
    return [one.tolist() for one in tokens_of(result)]


def _all(body: AllBody, served: Served, want: Kind) -> EmbedRequest:
    truncate = _truncate(body.truncate, body.truncation_direction)
    texts = _inputs(body.inputs, served)
    return EmbedRequest(texts=texts, want=want, truncate=truncate, prompt_name=body.prompt_name, normalize=False)


def to_predict_request(body: PredictBody, served: Served) -> EmbedRequest:
    """Texts and pairs. Raises InputError for a list that is neither."""
    truncate = _truncate(body.truncate, body.truncation_direction)
    return to_classes(served, _predicted(body)[0], truncate)


def to_predictions(result: EmbedResult, body: PredictBody, served: Served) -> list[Prediction] | list[list[Prediction]]:
    """Labels by falling score; a list of them where the body had a list."""
    found = classes(served, result, raw=bool(body.raw_scores))
    shown = [[Prediction(score=one.score, label=one.label) for one in text] for text in found]
    return shown[0] if _predicted(body)[1] else shown


def _predicted(body: PredictBody) -> tuple[list[TextInput], bool]:
    """What is predicted, and whether it is a single one. `["a", "b"]` is one pair."""
    given = body.inputs
    if isinstance(given, str):
        return [given], True
    if len(given) == 2 and isinstance(given[0], str) and isinstance(given[1], str):
        return [Pair(given[0], given[1])], True
    texts: list[TextInput] = []
    for one in given:
        if not isinstance(one, list) or len(one) not in (1, 2):
            raise InputError("`inputs` is a text, a pair, or a list of lists of one or two texts", param="inputs")
        texts.append(one[0] if len(one) == 1 else Pair(one[0], one[1]))
    if not texts:
        raise EmptyInputError("`inputs` cannot be empty", param="inputs")
    return texts, False


def to_ranks_request(body: RerankBody, served: Served) -> list[EmbedRequest]:
    """The query with each text."""
    return to_rank(served, body.query, body.texts, None, truncate=_truncate(body.truncate, body.truncation_direction))


def to_ranks(results: list[EmbedResult], body: RerankBody, served: Served) -> list[Rank]:
    """By falling score."""
    found = ranks(served, results, raw=bool(body.raw_scores))
    return [Rank(index=one.index, score=one.score, text=body.texts[one.index] if body.return_text else None) for one in found]


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
            when=lambda fields, _: not fields.has("prompt") and not fields.has("text"),
        ),
        Action(path="/decode", summary="Text of token ids", body=DecodeBody, response=list[str], answer=decode),
        Endpoint(
            path="/embed_sparse",
            summary="Weights of vocabulary entries (needs a sparse model)",
            fits=lambda spec: Kind.SPARSE in spec.kind.gives,
            body=AllBody,
            response=list[list[Entry]],
            to_request=to_sparse_request,
            to_response=to_sparse,
        ),
        Endpoint(
            path="/embed_all",
            summary="A vector a token (needs late interaction, or pooling none)",
            fits=lambda spec: Kind.TOKENS in spec.kind.gives,
            body=AllBody,
            response=list[Vectors],
            to_request=to_all_request,
            to_response=to_all,
        ),
        Endpoint(
            path="/predict",
            summary="Classify (needs a classifier)",
            fits=classifies,
            body=PredictBody,
            response=list[Prediction | list[Prediction]],
            to_request=to_predict_request,
            to_response=to_predictions,
        ),
        Endpoint(
            path="/rerank",
            summary="Rank texts (needs a reranker)",
            fits=ranks_with,
            body=RerankBody,
            response=list[Rank],
            to_request=to_ranks_request,
            to_response=to_ranks,
            when=lambda fields, _: fields.has("texts") or not fields.has("documents"),
        ),
        Query(path="/info", summary="Model and limits", response=Info, answer=info),
    ],
    error=Error,
    to_error=to_error,
    status={"invalid": 422, "too_long": 422, "too_large": 413, "overloaded": 429, "unsupported": 424, "device": 424},
    headers=headers,
)
