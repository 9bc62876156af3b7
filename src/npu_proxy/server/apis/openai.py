"""The OpenAI API: POST /v1/embeddings, GET /v1/models, with Jina's fields. Source: the API reference and openai-python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from npu_proxy.errors import NpuProxyError
from npu_proxy.server.apis.common import Usage, error_type, json_vectors, usage
from npu_proxy.server.apis.contract import Dialect, InferenceRoute, ModelInfo, ModelListing, ModelQuery, ServedModel
from npu_proxy.server.apis.inputs import text_inputs
from npu_proxy.types import DType, EmbedRequest, EmbedResult, Truncate


class EmbeddingsBody(msgspec.Struct, kw_only=True):
    """Body of POST /v1/embeddings; `input_type`, `prompt_name`, `prompt`, `truncate` and `normalize` are extensions by npu-proxy.

    `task`, `embedding_type` and `normalized` come from Jina's API, in which `truncate` is a boolean.
    """

    input: str | list[str | int | list[int]]
    model: str | None = None
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None
    input_type: Literal["query", "document"] | None = None
    prompt_name: str | None = None
    prompt: str | None = None
    truncate: bool | Literal["error", "end", "start", "chunk"] | None = None
    normalize: bool | None = None
    task: str | None = None
    embedding_type: Literal["float", "base64", "binary", "ubinary"] | None = None
    normalized: bool | None = None


class Embedding(msgspec.Struct, kw_only=True):
    """One vector: a list of numbers, or little-endian float32 in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float | int] | str


class Embeddings(msgspec.Struct, kw_only=True):
    """Reply of POST /v1/embeddings."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class Model(msgspec.Struct, kw_only=True):
    """One of the server's models."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class Models(msgspec.Struct, kw_only=True):
    """Reply of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(msgspec.Struct, kw_only=True):
    """What went wrong; `param` names the field."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(msgspec.Struct, kw_only=True):
    """Error format of this API."""

    error: ErrorDetail


_TASKS = {"retrieval.query": "query", "retrieval.passage": "document"}
"""Jina's tasks that have a counterpart among the prompts of models."""
_TRUNCATE = {"false": Truncate.ERROR, "error": Truncate.ERROR, "start": Truncate.START, "chunk": Truncate.CHUNK}


def to_requests(body: EmbeddingsBody, served: ServedModel) -> list[EmbedRequest]:
    """Build the request, after the checks that OpenAI makes. Raises InputError."""
    encoding = body.encoding_format or body.embedding_type or "float"
    request = EmbedRequest(
        texts=text_inputs(body.input, served, "input"),
        input_type=body.input_type or _TASKS.get(body.task or ""),
        prompt_name=body.prompt_name,
        prompt=body.prompt,
        dimensions=body.dimensions,
        normalize=body.normalize is not False and body.normalized is not False,
        truncate=_TRUNCATE.get(str(body.truncate).lower(), Truncate.END),
        dtype=DType.FLOAT32 if encoding == "float" else DType(encoding),
    )
    return [request]


def to_reply(results: Sequence[EmbedResult], body: EmbeddingsBody, served: ServedModel) -> Embeddings:
    """Return the vectors in the order of the texts, in exactly the requested ``encoding_format``."""
    (result,) = results
    return Embeddings(
        data=[Embedding(index=index, embedding=vector) for index, vector in enumerate(json_vectors(result))],
        model=served.requested_name,
        usage=usage(results),
    )


def to_error(error: NpuProxyError, status: int) -> Error:
    """Return OpenAI's nested error; `code` is set if clients branch on it."""
    codes = {"unauthorized": "invalid_api_key", "model_not_found": "model_not_found", "too_long": "context_length_exceeded"}
    detail = ErrorDetail(message=str(error), type=error_type(status), param=error.param, code=codes.get(error.kind))
    return Error(error=detail)


def models(listing: ModelListing, _: str) -> Models:
    """List every model by its own name, then by the further names in the server's settings."""
    models = listing.all()
    further = [_model(model, name) for model in models for name in model.names]
    return Models(data=[_model(model, model.spec.name) for model in models] + further)


def model(listing: ModelListing, name: str) -> Model:
    """Return the model with that name. Raises ModelNotFoundError."""
    return _model(listing.find(name), name)


def _model(info: ModelInfo, name: str) -> Model:
    return Model(id=name, created=info.since, owned_by=info.spec.name.partition("/")[0])


def _embeddings(path: str) -> InferenceRoute[EmbeddingsBody, Embeddings]:
    return InferenceRoute(
        path=path,
        summary="Embed texts",
        body=EmbeddingsBody,
        reply=Embeddings,
        to_requests=to_requests,
        to_reply=to_reply,
    )


DIALECT = Dialect(
    name="OpenAI",
    routes=[
        *(_embeddings(path) for path in ("/v1/embeddings", "/embeddings", "/v3/embeddings")),
        *(
            ModelQuery(path=path, summary="List the models", reply=Models, answer=models)
            for path in ("/v1/models", "/models", "/v3/models")
        ),
        *(
            ModelQuery(path=f"{path}/{{id:path}}", summary="Show a model", reply=Model, answer=model)
            for path in ("/v1/models", "/models", "/v3/models")
        ),
    ],
    error=Error,
    to_error=to_error,
)
