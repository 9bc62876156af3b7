"""The OpenAI dialect: POST /v1/embeddings, GET /v1/models. Source: the OpenAI API reference and openai-python."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from npu_proxy.errors import NpuProxyError
from npu_proxy.server.dialect import Dialect, Endpoint, Query, Served, text_inputs
from npu_proxy.types import DType, EmbedRequest, EmbedResult, Truncate


class EmbeddingsBody(msgspec.Struct, kw_only=True):
    """Body of POST /v1/embeddings; `input_type`, `prompt_name`, `truncate` and `normalize` are additions of npu-proxy."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None
    input_type: Literal["query", "document"] | None = None
    prompt_name: str | None = None
    truncate: Literal["error", "end", "start"] | None = None
    normalize: bool | None = None


class Embedding(msgspec.Struct, kw_only=True):
    """One vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


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


def to_request(body: EmbeddingsBody, served: Served) -> EmbedRequest:
    """Check what OpenAI checks and hand over the rest. Raises InputError."""
    served.check(body.model)
    return EmbedRequest(
        texts=text_inputs(body.input, served, "input"),
        input_type=body.input_type,
        prompt_name=body.prompt_name,
        dimensions=body.dimensions,
        normalize=body.normalize is not False,
        truncate=Truncate(body.truncate or Truncate.END),
        dtype=DType.BASE64 if body.encoding_format == "base64" else DType.FLOAT32,
    )


def to_response(result: EmbedResult, body: EmbeddingsBody, served: Served) -> Embeddings:
    """The vectors in their order. ``encoding_format`` is honoured exactly."""
    tokens = sum(result.tokens)
    vectors: list[Any] = result.embeddings if isinstance(result.embeddings, list) else result.embeddings.tolist()
    return Embeddings(
        data=[Embedding(index=index, embedding=vector) for index, vector in enumerate(vectors)],
        model=body.model or served.spec.name,
        usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
    )


def to_error(error: NpuProxyError, status: int) -> Error:
    """OpenAI's nested error; `code` is set where clients branch on it."""
    kind = {
        400: "invalid_request_error",
        401: "invalid_request_error",
        404: "invalid_request_error",
        413: "invalid_request_error",
    }.get(status, "server_error")
    codes = {"unauthorized": "invalid_api_key", "model_not_found": "model_not_found", "too_long": "context_length_exceeded"}
    return Error(error=ErrorDetail(message=str(error), type=kind, param=error.param, code=codes.get(error.kind)))


def models(served: Served, _: str) -> Models:
    """The one model that is served."""
    return Models(data=[_model(served)])


def model(served: Served, name: str) -> Model:
    """The model of that name. Raises ModelNotFoundError."""
    served.check(name)
    return _model(served)


def _model(served: Served) -> Model:
    return Model(id=served.spec.name, created=served.since, owned_by=served.spec.name.partition("/")[0])


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
    endpoints=[_embeddings(path) for path in ("/v1/embeddings", "/embeddings", "/v3/embeddings")],
    queries=[
        *(
            Query(path=path, summary="List the models", response=Models, answer=models)
            for path in ("/v1/models", "/models", "/v3/models")
        ),
        Query(path="/v1/models/{id:path}", summary="One model", response=Model, answer=model),
    ],
    error=Error,
    to_error=to_error,
)
