"""The Cohere API: /v1/embed, /v2/embed, /v2/rerank, /v1/tokenize. Source: its API reference and cohere-python."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import msgspec

from npu_proxy.engine.finish import cast
from npu_proxy.errors import EmptyInputError, InputError, NpuProxyError
from npu_proxy.server.apis.common import float_rows, float_vectors, tokens_used, with_failures
from npu_proxy.server.apis.contract import Dialect, InferenceRoute, Refused, RequestBody, ServedModel, TokenizerRoute
from npu_proxy.server.apis.embeddings import most_numbers
from npu_proxy.server.apis.inputs import TextPart, cut_of, input_type, texts_of
from npu_proxy.server.apis.scoring import ApiVersion, rerank_route
from npu_proxy.types import DType, EmbedRequest, EmbedResult

EmbeddingType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]


class BodyV1(RequestBody, kw_only=True):
    """Body of POST /v1/embed."""

    texts: list[str] | None = None
    model: str | None = None
    input_type: str | None = None
    embedding_types: list[EmbeddingType] | None = None
    truncate: str | None = None

    refused: ClassVar[Mapping[str, Refused]] = {"images": Refused("are not supported; this server embeds texts", neutral=([],))}
    harmless: ClassVar[Mapping[str, str]] = {"priority": "the lane of the request, for all routes"}


class BodyV2(BodyV1, kw_only=True):
    """Body of POST /v2/embed."""

    inputs: list[TextPart] | None = None
    output_dimension: int | None = None
    max_tokens: int | None = None


class Units(msgspec.Struct, kw_only=True):
    """Number of tokens embedded."""

    input_tokens: int


class Meta(msgspec.Struct, kw_only=True):
    """Fields added to every reply."""

    api_version: ApiVersion
    billed_units: Units


class ByType(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Vectors by the requested types."""

    floats: list[list[float] | None] | None = msgspec.field(default=None, name="float")
    int8: list[list[int] | None] | None = None
    uint8: list[list[int] | None] | None = None
    binary: list[list[int] | None] | None = None
    ubinary: list[list[int] | None] | None = None
    base64: list[str | None] | None = None


class ReplyV1(msgspec.Struct, kw_only=True):
    """Reply of /v1/embed: vectors by type if `embedding_types` was given, otherwise a list."""

    response_type: Literal["embeddings_floats", "embeddings_by_type"]
    id: str
    embeddings: list[list[float] | None] | ByType
    texts: list[str]
    meta: Meta


class ReplyV2(msgspec.Struct, kw_only=True):
    """Reply of /v2/embed."""

    id: str
    embeddings: ByType
    texts: list[str]
    meta: Meta


class TokenizeBody(RequestBody, kw_only=True):
    """Body of POST /v1/tokenize."""

    text: str
    model: str | None = None


class Tokenized(msgspec.Struct, kw_only=True):
    """Reply of POST /v1/tokenize: ids and texts of the tokens, without special ones."""

    tokens: list[int]
    token_strings: list[str]


class Error(msgspec.Struct, kw_only=True):
    """Error format of this API."""

    message: str


def to_requests(body: BodyV1, served: ServedModel) -> list[EmbedRequest]:
    """Return a request for float vectors, from which the other types are made. Raises InputError."""
    if (body.input_type or "").lower() == "image":
        raise InputError("input_type `image` needs an image model; this server embeds only text", param="input_type")
    newer = body if isinstance(body, BodyV2) else BodyV2()
    dimensions, types = newer.output_dimension or None, len(set(body.embedding_types or ()))
    if (dimensions or served.spec.width) % 8 and {"binary", "ubinary"} & set(body.embedding_types or ()):
        raise InputError("binary types need a number of dimensions divisible by 8", param="output_dimension")
    if newer.max_tokens is not None and newer.max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, not {newer.max_tokens}", param="max_tokens")
    request = EmbedRequest(
        texts=_texts(body),
        input_type=input_type(body.input_type),
        dimensions=dimensions,
        truncate=cut_of(body.truncate),
        max_tokens=newer.max_tokens,
        most_numbers=most_numbers(served, types) if types > 1 else None,
    )
    return [request]


def to_v1(results: Sequence[EmbedResult], body: BodyV1, _: ServedModel) -> ReplyV1:
    """Return a list of vectors, or vectors by type; cohere-python distinguishes them by `response_type`."""
    (result,) = results
    common = _common(results, body, "1")
    if body.embedding_types is None:
        return ReplyV1(response_type="embeddings_floats", embeddings=float_rows(result), **common)
    return ReplyV1(response_type="embeddings_by_type", embeddings=_by_type(result, body.embedding_types), **common)


def to_v2(results: Sequence[EmbedResult], body: BodyV2, _: ServedModel) -> ReplyV2:
    """Return only the requested types, or float if none is requested."""
    (result,) = results
    return ReplyV2(embeddings=_by_type(result, body.embedding_types or ["float"]), **_common(results, body, "2"))


def tokenize(body: TokenizeBody, served: ServedModel) -> Tokenized:
    """Return the tokens of a text."""
    (tokens,) = served.tokenizer.tokens([body.text], "", special=False)
    return Tokenized(tokens=[token.id for token in tokens], token_strings=[token.text for token in tokens])


def to_error(error: NpuProxyError, _: int) -> Error:
    """Return the error's message."""
    return Error(message=str(error))


def _texts(body: BodyV1) -> list[Any]:
    if isinstance(body, BodyV2) and body.inputs:
        return [*texts_of(body.inputs, "inputs")]
    if not body.texts:
        raise EmptyInputError("`texts` is empty; send at least one text", param="texts")
    return list(body.texts)


def _by_type(result: EmbedResult, types: list[EmbeddingType]) -> ByType:
    floats = float_vectors(result)
    cast_to = {name: cast(floats, DType.FLOAT32 if name == "float" else DType(name)) for name in dict.fromkeys(types)}
    lists: dict[str, Any] = {name: with_failures(list(vectors), result) for name, vectors in cast_to.items()}
    return ByType(floats=lists.pop("float", None), **lists)


def _common(results: Sequence[EmbedResult], body: BodyV1, version: str) -> dict[str, Any]:
    meta = Meta(api_version=ApiVersion(version=version), billed_units=Units(input_tokens=tokens_used(results)))
    return {"id": str(uuid.uuid4()), "texts": [str(text) for text in _texts(body)], "meta": meta}


DIALECT = Dialect(
    name="Cohere",
    base="cohere",
    routes=[
        InferenceRoute(
            path="/v1/embed",
            summary="Embed texts",
            body=BodyV1,
            vectors=True,
            reply=ReplyV1,
            to_requests=to_requests,
            to_reply=to_v1,
        ),
        InferenceRoute(
            path="/v2/embed",
            summary="Embed texts",
            body=BodyV2,
            vectors=True,
            reply=ReplyV2,
            to_requests=to_requests,
            to_reply=to_v2,
        ),
        rerank_route("/v2/rerank", documents=False),
        rerank_route("/v1/rerank", documents=False, below_base=True),  # which others share
        TokenizerRoute(
            path="/v1/tokenize",
            summary="Tokenize a text",
            body=TokenizeBody,
            reply=Tokenized,
            answer=tokenize,
            applies=lambda fields, _: fields.has("text"),
        ),
    ],
    error=Error,
    to_error=to_error,
    status={"overloaded": 429},
)
