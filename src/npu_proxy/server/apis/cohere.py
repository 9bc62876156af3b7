"""The Cohere API: /v1/embed, /v2/embed, and rerank in the format of Cohere, Jina and vLLM. Source: its API reference."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from npu_proxy.engine.finish import cast
from npu_proxy.errors import EmptyInputError, InputError, NpuProxyError
from npu_proxy.server.apis.common import float_rows, float_vectors, tokens_used
from npu_proxy.server.apis.contract import Dialect, InferenceRoute, ServedModel
from npu_proxy.server.apis.scoring import ApiVersion, rerank_route
from npu_proxy.types import DType, EmbedRequest, EmbedResult, Truncate

EmbeddingType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]
InputType = Literal["search_document", "search_query", "classification", "clustering", "image"]
CohereTruncate = Literal["NONE", "START", "END"]

_TRUNCATE = {"NONE": Truncate.ERROR, "START": Truncate.START, "END": Truncate.END}
_INPUT_TYPE = {
    "search_document": "document",
    "search_query": "query",
    "classification": "classification",
    "clustering": "clustering",
}


class Content(msgspec.Struct, kw_only=True):
    """A part of an input; only parts of type `text` are supported."""

    type: str
    text: str | None = None


class Input(msgspec.Struct, kw_only=True):
    """An input of several parts, joined by spaces."""

    content: list[Content]


class BodyV1(msgspec.Struct, kw_only=True):
    """Body of POST /v1/embed."""

    texts: list[str] | None = None
    model: str | None = None
    input_type: InputType | None = None
    embedding_types: list[EmbeddingType] | None = None
    truncate: CohereTruncate | None = None


class BodyV2(BodyV1, kw_only=True):
    """Body of POST /v2/embed."""

    inputs: list[Input] | None = None
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

    floats: list[list[float]] | None = msgspec.field(default=None, name="float")
    int8: list[list[int]] | None = None
    uint8: list[list[int]] | None = None
    binary: list[list[int]] | None = None
    ubinary: list[list[int]] | None = None
    base64: list[str] | None = None


class ReplyV1(msgspec.Struct, kw_only=True):
    """Reply of /v1/embed: vectors by type if `embedding_types` was given, otherwise a list."""

    response_type: Literal["embeddings_floats", "embeddings_by_type"]
    id: str
    embeddings: list[list[float]] | ByType
    texts: list[str]
    meta: Meta


class ReplyV2(msgspec.Struct, kw_only=True):
    """Reply of /v2/embed."""

    id: str
    embeddings: ByType
    texts: list[str]
    meta: Meta


class Error(msgspec.Struct, kw_only=True):
    """Error format of this API."""

    message: str


def to_requests(body: BodyV1, served: ServedModel) -> list[EmbedRequest]:
    """Return a request for float vectors, from which the other types are made. Raises InputError."""
    if body.input_type == "image":
        raise InputError("input_type `image` needs an image model; this server embeds only text", param="input_type")
    newer = body if isinstance(body, BodyV2) else BodyV2()
    dimensions = newer.output_dimension
    if (dimensions or served.spec.width) % 8 and {"binary", "ubinary"} & set(body.embedding_types or ()):
        raise InputError("binary types need a number of dimensions divisible by 8", param="output_dimension")
    if newer.max_tokens is not None and newer.max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, not {newer.max_tokens}", param="max_tokens")
    request = EmbedRequest(
        texts=_texts(body),
        input_type=_INPUT_TYPE.get(body.input_type or ""),
        dimensions=dimensions,
        truncate=_TRUNCATE[body.truncate or "END"],
        max_tokens=newer.max_tokens,
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


def to_error(error: NpuProxyError, _: int) -> Error:
    """Return the error's message."""
    return Error(message=str(error))


def _texts(body: BodyV1) -> list[Any]:
    if isinstance(body, BodyV2) and body.inputs:
        parts = [part for given in body.inputs for part in given.content]
        if any(part.type != "text" or part.text is None for part in parts):
            raise InputError("`inputs` may contain only parts of type `text`", param="inputs")
        return [" ".join(part.text or "" for part in given.content) for given in body.inputs]
    if not body.texts:
        raise EmptyInputError("`texts` is empty; send at least one text", param="texts")
    return list(body.texts)


def _by_type(result: EmbedResult, types: list[EmbeddingType]) -> ByType:
    floats = float_vectors(result)
    cast_to = {name: cast(floats, DType.FLOAT32 if name == "float" else DType(name)) for name in dict.fromkeys(types)}
    lists: dict[str, Any] = {name: list(vectors) for name, vectors in cast_to.items()}
    return ByType(floats=lists.pop("float", None), **lists)


def _common(results: Sequence[EmbedResult], body: BodyV1, version: str) -> dict[str, Any]:
    meta = Meta(api_version=ApiVersion(version=version), billed_units=Units(input_tokens=tokens_used(results)))
    return {"id": str(uuid.uuid4()), "texts": [str(text) for text in _texts(body)], "meta": meta}


DIALECT = Dialect(
    name="Cohere",
    routes=[
        InferenceRoute(
            path="/v1/embed",
            summary="Embed texts",
            body=BodyV1,
            reply=ReplyV1,
            to_requests=to_requests,
            to_reply=to_v1,
        ),
        InferenceRoute(
            path="/v2/embed",
            summary="Embed texts",
            body=BodyV2,
            reply=ReplyV2,
            to_requests=to_requests,
            to_reply=to_v2,
        ),
        rerank_route("/v1/rerank"),
        rerank_route("/v2/rerank"),
    ],
    error=Error,
    to_error=to_error,
    status={"overloaded": 429},
)
