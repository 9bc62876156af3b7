"""The OpenAI dialect: POST /v1/embeddings, GET /v1/models, with Jina's fields. Source: the API reference and openai-python."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from npu_proxy.errors import NpuProxyError
from npu_proxy.server.dialect import Card, Dialect, Endpoint, Query, Served, Shelf, text_inputs
from npu_proxy.types import DType, EmbedRequest, EmbedResult, Truncate


class EmbeddingsBody(msgspec.Struct, kw_only=True):
    """Body of POST /v1/embeddings; `input_type`, `prompt_name`, `truncate` and `normalize` are additions of npu-proxy.

    `task`, `embedding_type` and `normalized` are Jina's, in which `truncate` is yes or no.
    """

    input: str | list[str | int | list[int]]
    model: str | None = None
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None
    input_type: Literal["query", "document"] | None = None
    prompt_name: str | None = None
    truncate: bool | Literal["error", "end", "start", "chunk"] | None = None
    normalize: bool | None = None
    task: str | None = None
    embedding_type: Literal["float", "base64", "binary", "ubinary"] | None = None
    normalized: bool | None = None


class Embedding(msgspec.Struct, kw_only=True):
    """One vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float | int] | str


class Usage(msgspec.Struct, kw_only=True):
    """Tokens embedded, special tokens included."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(msgspec.Struct, kw_only=True):
    """Answer of POST /v1/embeddings."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class Model(msgspec.Struct, kw_only=True):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class Models(msgspec.Struct, kw_only=True):
    """Answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(msgspec.Struct, kw_only=True):
    """What went wrong; `param` names the field."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(msgspec.Struct, kw_only=True):
    """Every error of this dialect."""

    error: ErrorDetail


_TASKS = {"retrieval.query": "query", "retrieval.passage": "document"}
"""Jina's tasks that have a counterpart among the prompts of models."""
_TRUNCATE = {"false": Truncate.ERROR, "error": Truncate.ERROR, "start": Truncate.START, "chunk": Truncate.CHUNK}


def to_request(body: EmbeddingsBody, served: Served) -> EmbedRequest:
    """Check what OpenAI checks and hand over the rest. Raises InputError."""
    kind = body.encoding_format or body.embedding_type or "float"
    return EmbedRequest(
        texts=text_inputs(body.input, served, "input"),
        input_type=body.input_type or _TASKS.get(body.task or ""),
        prompt_name=body.prompt_name,
        dimensions=body.dimensions,
        normalize=body.normalize is not False and body.normalized is not False,
        truncate=_TRUNCATE.get(str(body.truncate).lower(), Truncate.END),
        dtype=DType.FLOAT32 if kind == "float" else DType(kind),
    )


def to_response(result: EmbedResult, body: EmbeddingsBody, served: Served) -> Embeddings:
    """The vectors in their order. ``encoding_format`` is honoured exactly."""
    tokens = sum(result.tokens)
    vectors: list[Any] = result.embeddings if isinstance(result.embeddings, list) else result.embeddings.tolist()
    return Embeddings(
        data=[Embedding(index=index, embedding=vector) for index, vector in enumerate(vectors)],
        model=served.asked,
        usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
    )


def to_error(error: NpuProxyError, status: int) -> Error:
    """OpenAI's nested error; `code` is set where clients branch on it."""
    kind = "invalid_request_error" if 400 <= status < 499 else "server_error"
    codes = {"unauthorized": "invalid_api_key", "model_not_found": "model_not_found", "too_long": "context_length_exceeded"}
    return Error(error=ErrorDetail(message=str(error), type=kind, param=error.param, code=codes.get(error.kind)))


def models(shelf: Shelf, _: str) -> Models:
    """Every model by its own name, then by the names that the server's settings give it."""
    cards = shelf.cards()
    more = [_model(card, name) for card in cards for name in card.names]
    return Models(data=[_model(card, card.spec.name) for card in cards] + more)


def model(shelf: Shelf, name: str) -> Model:
    """The model of that name. Raises ModelNotFoundError."""
    return _model(shelf.find(name), name)


def _model(card: Card, name: str) -> Model:
    return Model(id=name, created=card.since, owned_by=card.spec.name.partition("/")[0])


def _embeddings(path: str) -> Endpoint:
    return Endpoint(
        path=path,
        summary="Embed texts",
        body=EmbeddingsBody,
        response=Embeddings,
        to_request=to_request,
        to_response=to_response,
    )


DIALECT = Dialect(
    name="OpenAI",
    routes=[
        *(_embeddings(path) for path in ("/v1/embeddings", "/embeddings", "/v3/embeddings")),
        *(
            Query(path=path, summary="List the models", response=Models, answer=models)
            for path in ("/v1/models", "/models", "/v3/models")
        ),
        *(
            Query(path=f"{path}/{{id:path}}", summary="One model", response=Model, answer=model)
            for path in ("/v1/models", "/models", "/v3/models")
        ),
    ],
    error=Error,
    to_error=to_error,
)
