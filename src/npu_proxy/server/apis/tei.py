"""The API of text-embeddings-inference: /embed, /similarity, /rerank, /tokenize, /info and others. Source: its router, 1.9.

Bodies may name a `model`, an extension by npu-proxy; without it, the first model that supports the route is used.

Longer than most files here, to keep one API in one file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import msgspec

from npu_proxy.engine.encode_options import find_prompt
from npu_proxy.engine.scoring import sparse_vectors, token_vectors
from npu_proxy.engine.validation import can_classify, can_rerank
from npu_proxy.errors import EmptyInputError, InputError, NpuProxyError
from npu_proxy.server.apis.common import float_rows, float_vectors, header_text
from npu_proxy.server.apis.contract import (
    Applies,
    BodyFields,
    Dialect,
    InferenceRoute,
    ModelInfo,
    ModelListing,
    ModelQuery,
    RequestBody,
    ServedModel,
    TokenizerRoute,
)
from npu_proxy.server.apis.inputs import TextPart, cut_of, text_of
from npu_proxy.server.apis.scoring import classified, reranked, to_classify, to_rerank
from npu_proxy.settings import Settings
from npu_proxy.spec import ModelSpec
from npu_proxy.types import EmbedRequest, EmbedResult, OutputType, Pair, TextInput
from npu_proxy.version import __version__

Direction = Literal["left", "right", "Left", "Right"]
Vectors = list[list[float]]
VectorsOrNull = list[list[float] | None]
_LEAST_OFFER = 32
"""Texts per request that are offered before the speed is known; the default of text-embeddings-inference."""
_ACTIVATIONS = {"softmax": "softmax", "sigmoid": "sigmoid", "identity": "none"}
_HARMLESS = {"options": "Hugging Face's `use_cache` and `wait_for_model`"}


class EmbedParameters(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Options in the place where Hugging Face's hosted models have them; those of other tasks are refused."""

    normalize: bool | None = None
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None
    dimensions: int | None = None


class EmbedBody(RequestBody, kw_only=True):
    """Body of POST /embed. truncate: null means the server's default, which is true."""

    inputs: str | list[str | int | list[int] | TextPart]
    normalize: bool | None = None
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None
    dimensions: int | None = None
    parameters: EmbedParameters | None = None
    model: str | None = None

    harmless: ClassVar[Mapping[str, str]] = _HARMLESS


class ComparedSentences(msgspec.Struct, kw_only=True):
    """One sentence, and the sentences it is compared with."""

    source_sentence: str
    sentences: list[str]


class SimilarityParameters(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Options for embedding the sentences."""

    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None


class SimilarityBody(RequestBody, kw_only=True):
    """Body of POST /similarity."""

    inputs: ComparedSentences
    parameters: SimilarityParameters | None = None
    model: str | None = None

    harmless: ClassVar[Mapping[str, str]] = _HARMLESS


class TokenizeBody(RequestBody, kw_only=True):
    """Body of POST /tokenize."""

    inputs: str | list[str]
    add_special_tokens: bool | None = None
    prompt_name: str | None = None
    model: str | None = None


class Token(msgspec.Struct, kw_only=True):
    """A token and its position in the text, in characters; special tokens have no position."""

    id: int
    text: str
    special: bool
    start: int | None = None
    stop: int | None = None


class DecodeBody(RequestBody, kw_only=True):
    """Body of POST /decode."""

    ids: list[int | list[int]]
    skip_special_tokens: bool | None = None
    model: str | None = None


class AllBody(RequestBody, kw_only=True):
    """Body of POST /embed_all and /embed_sparse."""

    inputs: str | list[str | int | list[int] | TextPart]
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None
    model: str | None = None

    harmless: ClassVar[Mapping[str, str]] = {
        **_HARMLESS,
        "normalize": "the original has no such field here: vectors of tokens and weights stay as the model computes them",
    }


class PredictParameters(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Options of Hugging Face's text classification. top_k: number of labels."""

    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None
    top_k: int | None = None


class PredictBody(RequestBody, kw_only=True):
    """Body of POST /predict: a text or a pair, also as a list of one or two texts, or a list of such lists."""

    inputs: str | list[str | list[str]]
    parameters: PredictParameters | None = None
    raw_scores: bool | None = None
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    model: str | None = None

    harmless: ClassVar[Mapping[str, str]] = _HARMLESS


class RerankBody(RequestBody, kw_only=True):
    """Body of POST /rerank."""

    query: str
    texts: list[str]
    raw_scores: bool | None = None
    return_text: bool | None = None
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    model: str | None = None


class Entry(msgspec.Struct, kw_only=True):
    """A vocabulary entry and its weight."""

    index: int
    value: float


class Prediction(msgspec.Struct, kw_only=True):
    """A label and its score."""

    score: float
    label: str


class Rank(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A text's index in the request, and its score."""

    index: int
    score: float
    text: str | None = None


class Pooled(msgspec.Struct, kw_only=True):
    """The pooling of an embedding model."""

    pooling: str


class Labels(msgspec.Struct, kw_only=True):
    """Labels by number and numbers by label."""

    id2label: dict[str, str]
    label2id: dict[str, int]


class ModelType(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The kind of model, from which clients tell which routes to call; only one field is set."""

    embedding: Pooled | None = None
    reranker: Labels | None = None
    classifier: Labels | None = None


class Info(msgspec.Struct, kw_only=True):
    """Reply of GET /info."""

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
    """Error format of this API."""

    error: str
    error_type: str


def to_requests(body: EmbedBody, served: ServedModel) -> list[EmbedRequest]:
    """Return the request to embed texts or token ids. A text of spaces alone is embedded; an empty one is an error."""
    texts, more = _inputs(body.inputs, served), body.parameters or EmbedParameters()
    request = EmbedRequest(
        texts=texts,
        normalize=(body.normalize if more.normalize is None else more.normalize) is not False,
        truncate=cut_of(
            body.truncate if more.truncate is None else more.truncate, more.truncation_direction or body.truncation_direction
        ),
        prompt_name=more.prompt_name or body.prompt_name,
        dimensions=more.dimensions or body.dimensions,
        on_empty=None if "" in texts else "embed",
    )
    return [request]


def _inputs(given: str | list[str | int | list[int] | TextPart], served: ServedModel) -> list[TextInput]:
    """Return a text, token ids of the model's own vocabulary, or a list of texts and lists of token ids."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise EmptyInputError("`inputs` cannot be empty", param="inputs")
    numbers = [item for item in given if isinstance(item, int)]
    if numbers and len(numbers) < len(given):
        raise InputError("`inputs` mixes token ids with texts; send the token ids of each text as a list", param="inputs")
    items = (text_of(item, "inputs") if isinstance(item, TextPart) else item for item in given)
    texts: list[TextInput] = [numbers] if numbers else [item for item in items if not isinstance(item, int)]
    if served.settings.token_ids == "reject" and not all(isinstance(text, str) for text in texts):
        raise InputError("this server does not accept token ids (setting `token_ids`); send text", param="inputs")
    return texts


def to_reply(results: Sequence[EmbedResult], _: EmbedBody, __: ServedModel) -> VectorsOrNull:
    """Return a list of vectors, even for one input."""
    return float_rows(results[0])


def similarity_requests(body: SimilarityBody, _: ServedModel) -> list[EmbedRequest]:
    """Return a request with the source sentence first, then the others. Raises EmptyInputError."""
    parameters = body.parameters or SimilarityParameters()
    if not body.inputs.sentences:
        raise EmptyInputError("`inputs.sentences` cannot be empty", param="inputs")
    texts: list[TextInput] = [body.inputs.source_sentence, *body.inputs.sentences]
    truncate = cut_of(parameters.truncate, parameters.truncation_direction)
    return [EmbedRequest(texts=texts, truncate=truncate, prompt_name=parameters.prompt_name)]


def similarity_reply(results: Sequence[EmbedResult], _: SimilarityBody, __: ServedModel) -> list[float]:
    """Return the cosines with the first text."""
    vectors = float_vectors(results[0])
    return (vectors[1:] @ vectors[0]).tolist()


def tokenize(body: TokenizeBody, served: ServedModel) -> list[list[Token]]:
    """Return the tokens of each text."""
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    if not texts:
        raise EmptyInputError("`inputs` cannot be empty", param="inputs")
    prompt = find_prompt(served.spec, EmbedRequest(texts=texts, prompt_name=body.prompt_name))
    return [
        [
            Token(
                id=token.id,
                text=token.text,
                special=token.special,
                start=None if token.special else token.start,
                stop=None if token.special else token.stop,
            )
            for token in tokens
        ]
        for tokens in served.tokenizer.tokens(texts, prompt, special=body.add_special_tokens is not False)
    ]


def decode(body: DecodeBody, served: ServedModel) -> list[str]:
    """Return the text of token ids. Raises InputError for ids outside the model's vocabulary."""
    lists, numbers = [item for item in body.ids if isinstance(item, list)], [item for item in body.ids if isinstance(item, int)]
    if lists and numbers:
        raise InputError("`ids` mixes ids with lists of ids; send one or the other", param="ids")
    lists = lists or [numbers]
    return [served.tokenizer.decode(ids, skip_special=body.skip_special_tokens is not False) for ids in lists]


def info(listing: ModelListing, _: str) -> Info:
    """Return the first model, and the limits by which clients split their requests."""
    spec, settings, names = listing.default.spec, listing.settings, listing.default.names
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
        max_client_batch_size=offered_batch(listing.default, settings),
        auto_truncate=True,
        tokenization_workers=1,
        version=__version__,
    )


def offered_batch(info: ModelInfo, settings: Settings) -> int:
    """Return how many texts clients should send at once: as many of the longest as take a third of `timeout`, at least 32.

    They take the number at its word, with time limits of their own. Larger requests are accepted up to `max_client_batch`.
    """
    fitting = int(settings.timeout / 3 * info.tokens_per_second / info.spec.max_length)
    return min(settings.max_client_batch, max(_LEAST_OFFER, fitting))


def _model_type(spec: ModelSpec, pooling: str) -> ModelType:
    """Return the kind of model, from which clients tell which routes to call."""
    if spec.output_type is not OutputType.SCORES:
        return ModelType(embedding=Pooled(pooling=pooling))
    names = {str(number): label for number, label in enumerate(spec.labels)}
    numbers = {label: number for number, label in enumerate(spec.labels)}
    labels = Labels(id2label=names, label2id=numbers)
    return ModelType(reranker=labels) if len(spec.labels) == 1 else ModelType(classifier=labels)


def sparse_requests(body: AllBody, served: ServedModel) -> list[EmbedRequest]:
    """Return the request for the vocabulary weights of texts or token ids."""
    return _all(body, served, OutputType.SPARSE)


def sparse_reply(results: Sequence[EmbedResult], _: AllBody, __: ServedModel) -> list[list[Entry]]:
    """Return the nonzero weights of each text."""
    return [
        [Entry(index=int(index), value=float(value)) for index, value in zip(*vector, strict=True)]
        for vector in sparse_vectors(results[0])
    ]


def all_requests(body: AllBody, served: ServedModel) -> list[EmbedRequest]:
    """Return the request for one vector per token of texts or token ids."""
    return _all(body, served, OutputType.TOKENS)


def all_reply(results: Sequence[EmbedResult], _: AllBody, __: ServedModel) -> list[Vectors]:
    """Return the token vectors of each text."""
    vectors: list[Any] = list(token_vectors(results[0]))
    return vectors


def _all(body: AllBody, served: ServedModel, output_type: OutputType) -> list[EmbedRequest]:
    request = EmbedRequest(
        texts=_inputs(body.inputs, served),
        output_type=output_type,
        truncate=cut_of(body.truncate, body.truncation_direction),
        prompt_name=body.prompt_name,
        normalize=False,
    )
    return [request]


def predict_requests(body: PredictBody, served: ServedModel) -> list[EmbedRequest]:
    """Return the request to classify texts or pairs. Raises InputError for a list that is neither."""
    parameters = body.parameters or PredictParameters()
    if parameters.top_k is not None and parameters.top_k < 1:
        raise InputError(f"top_k must be at least 1, not {parameters.top_k}", param="parameters.top_k")
    if parameters.function_to_apply not in (None, "none", _ACTIVATIONS[served.spec.activation]):
        message = f"this model's scores are made by {served.spec.activation}, not by {parameters.function_to_apply}"
        raise InputError(f"`function_to_apply`: {message}", param="parameters.function_to_apply")
    return to_classify(served, _predicted(body)[0], cut_of(body.truncate, body.truncation_direction))


def predict_reply(
    results: Sequence[EmbedResult], body: PredictBody, served: ServedModel
) -> list[Prediction] | list[list[Prediction]]:
    """Return the labels by descending score: one list per text, or a single list for a single text, unless there are `parameters`.

    Those come from Hugging Face's clients, which expect a list per text.
    """
    parameters = body.parameters or PredictParameters()
    texts = classified(served, results, raw=bool(body.raw_scores) or parameters.function_to_apply == "none")
    predictions = [[Prediction(score=label.score, label=label.label) for label in labels[: parameters.top_k]] for labels in texts]
    return predictions[0] if _predicted(body)[1] and body.parameters is None else predictions


def _predicted(body: PredictBody) -> tuple[list[TextInput], bool]:
    """Return the texts to classify, and whether the body had a single one. `["a", "b"]` is one pair."""
    given = body.inputs
    if isinstance(given, str):
        return [given], True
    if len(given) == 1 and isinstance(given[0], str):
        return [given[0]], True
    if len(given) == 2 and isinstance(given[0], str) and isinstance(given[1], str):
        return [Pair(given[0], given[1])], True
    texts: list[TextInput] = []
    for item in given:
        if not isinstance(item, list) or len(item) not in (1, 2):
            raise InputError("`inputs` must be a text, a pair, or a list of lists of one or two texts", param="inputs")
        texts.append(item[0] if len(item) == 1 else Pair(item[0], item[1]))
    if not texts:
        raise EmptyInputError("`inputs` cannot be empty", param="inputs")
    return texts, False


def rerank_requests(body: RerankBody, served: ServedModel) -> list[EmbedRequest]:
    """Return the requests to score the query with each text."""
    truncate = cut_of(body.truncate, body.truncation_direction)
    return to_rerank(served, body.query, body.texts, None, truncate=truncate, empty_query=True)


def rerank_reply(results: Sequence[EmbedResult], body: RerankBody, served: ServedModel) -> list[Rank]:
    """Return the texts by descending score."""
    return [
        Rank(index=result.index, score=result.score, text=body.texts[result.index] if body.return_text else None)
        for result in reranked(served, results, raw=bool(body.raw_scores))
    ]


def to_error(error: NpuProxyError, status: int) -> Error:
    """Return an error with one of text-embeddings-inference's error types."""
    kinds = {"empty": "Empty", "overloaded": "Overloaded", "unsupported": "Backend", "device": "Backend"}
    kind = kinds.get(error.kind) or ("Unhealthy" if status in (503, 504) else "Tokenizer" if error.param == "ids" else "Validation")
    return Error(error=str(error), error_type=kind)


def headers(result: EmbedResult, request: EmbedRequest) -> dict[str, str]:
    """Return the headers that text-embeddings-inference's load balancers read; times in whole milliseconds."""
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


def _has_texts(fields: BodyFields, _: Settings) -> bool:
    return fields.has("texts") or not fields.has("documents")


def _compares(fields: BodyFields, _: Settings) -> bool:
    return bytes(fields.inputs).lstrip().startswith(b"{")


def _ranks(fields: BodyFields, _: Settings) -> bool:
    return fields.has("query") and fields.has("texts")


def _embed(path: str) -> InferenceRoute[EmbedBody, VectorsOrNull]:
    return InferenceRoute(
        path=path,
        summary="Embed texts",
        body=EmbedBody,
        vectors=True,
        reply=VectorsOrNull,
        to_requests=to_requests,
        to_reply=to_reply,
        # `input` is Ollama's, and what can only be ranked is not embedded.
        applies=lambda fields, settings: fields.has("inputs") or not (fields.has("input") or _ranks(fields, settings)),
    )


def _similarity(path: str, applies: Applies) -> InferenceRoute[SimilarityBody, list[float]]:
    return InferenceRoute(
        path=path,
        summary="Compare one sentence with others by cosine",
        body=SimilarityBody,
        reply=list[float],
        to_requests=similarity_requests,
        to_reply=similarity_reply,
        texts_per_item=2,
        applies=applies,
    )


def _predict(path: str) -> InferenceRoute[PredictBody, list[Prediction] | list[list[Prediction]]]:
    return InferenceRoute(
        path=path,
        summary="Classify texts (needs a classifier)",
        suits=can_classify,
        body=PredictBody,
        reply=list[Prediction | list[Prediction]],
        to_requests=predict_requests,
        to_reply=predict_reply,
    )


def _rerank(path: str, applies: Applies) -> InferenceRoute[RerankBody, list[Rank]]:
    return InferenceRoute(
        path=path,
        summary="Rank texts (needs a reranker)",
        suits=can_rerank,
        bytes_per_number=4,
        body=RerankBody,
        reply=list[Rank],
        to_requests=rerank_requests,
        to_reply=rerank_reply,
        applies=applies,
    )


def _sparse(path: str) -> InferenceRoute[AllBody, list[list[Entry]]]:
    return InferenceRoute(
        path=path,
        summary="Compute weights of vocabulary entries (needs a sparse model)",
        suits=lambda spec: OutputType.SPARSE in spec.output_types,
        body=AllBody,
        reply=list[list[Entry]],
        to_requests=sparse_requests,
        to_reply=sparse_reply,
    )


def _root(path: str) -> list[InferenceRoute[Any, Any]]:
    """Return the routes of hosted models, where the body and the kind of the model decide."""
    return [_rerank(path, _ranks), _similarity(path, _compares), _embed(path), _predict(path), _sparse(path)]


DIALECT = Dialect(
    name="text-embeddings-inference",
    base="tei",
    routes=[
        *_root("/"),
        *_root("/invocations"),
        *_root("/pipeline/feature-extraction"),
        _embed("/embed"),
        _similarity("/similarity", lambda _, __: True),
        TokenizerRoute(
            path="/tokenize",
            summary="Tokenize texts",
            body=TokenizeBody,
            reply=list[list[Token]],
            answer=tokenize,
            applies=lambda fields, _: not any(map(fields.has, ("prompt", "text", "content"))),
        ),
        TokenizerRoute(path="/decode", summary="Decode token ids", body=DecodeBody, reply=list[str], answer=decode),
        _sparse("/embed_sparse"),
        InferenceRoute(
            path="/embed_all",
            summary="Embed each token (needs a late-interaction model, or pooling none)",
            suits=lambda spec: OutputType.TOKENS in spec.output_types,
            body=AllBody,
            reply=list[Vectors],
            to_requests=all_requests,
            to_reply=all_reply,
        ),
        _predict("/predict"),
        _rerank("/rerank", _has_texts),
        ModelQuery(path="/info", summary="Show the model and the limits", reply=Info, answer=info),
    ],
    error=Error,
    to_error=to_error,
    status={"invalid": 422, "too_long": 422, "too_large": 413, "overloaded": 429, "unsupported": 424, "device": 424},
    headers=headers,
)
