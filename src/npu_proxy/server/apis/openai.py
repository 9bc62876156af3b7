"""The OpenAI API: POST /v1/embeddings, GET /v1/models. Source: the API reference and openai-python."""

from __future__ import annotations

from typing import Literal

import msgspec

from npu_proxy.errors import NpuProxyError
from npu_proxy.server.apis.common import error_type, named_models
from npu_proxy.server.apis.contract import Dialect, ModelInfo, ModelListing, ModelQuery, kind_of
from npu_proxy.server.apis.embeddings import embeddings_route


class Model(msgspec.Struct, kw_only=True):
    """One of the server's models: OpenAI's fields, and those without which other clients fail.

    vLLM: `max_model_len` and `root`. Mistral: `type` and `capabilities`. Gemini and Cohere: `name`. Xinference: `model_type`.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    max_model_len: int
    type: Literal["base"] = "base"
    capabilities: dict[str, bool]
    name: str
    model_type: str


class Models(msgspec.Struct, kw_only=True):
    """Reply of GET /v1/models. The clients of Cohere and Gemini read `models`."""

    object: Literal["list"] = "list"
    data: list[Model]
    models: list[Model]


class ErrorDetail(msgspec.Struct, kw_only=True):
    """What went wrong; `param` names the field."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(msgspec.Struct, kw_only=True):
    """Error format of this API; `detail` repeats the message for the clients of Jina and Voyage."""

    error: ErrorDetail
    detail: str


_MODEL_TYPES = {"embedding": "embedding", "sparse": "embedding", "reranker": "rerank", "classifier": "classify"}


def to_error(error: NpuProxyError, status: int) -> Error:
    """Return OpenAI's nested error; `code` is set if clients branch on it."""
    codes = {"unauthorized": "invalid_api_key", "model_not_found": "model_not_found", "too_long": "context_length_exceeded"}
    detail = ErrorDetail(message=str(error), type=error_type(status), param=error.param, code=codes.get(error.kind))
    return Error(error=detail, detail=detail.message)


def models(listing: ModelListing, _: str) -> Models:
    """List every model by its own name, then by the further names in the server's settings."""
    listed = [_model(info, name) for info, name in named_models(listing)]
    return Models(data=listed, models=listed)


def model(listing: ModelListing, name: str) -> Model:
    """Return the model with that name. Raises ModelNotFoundError."""
    return _model(listing.find(name), name)


def _model(info: ModelInfo, name: str) -> Model:
    return Model(
        id=name,
        created=info.since,
        owned_by=info.spec.name.partition("/")[0],
        root=info.spec.name,
        max_model_len=info.spec.max_length,
        capabilities={"completion_chat": False, "classification": kind_of(info.spec) == "classifier"},
        name=name,
        model_type=_MODEL_TYPES[kind_of(info.spec)],
    )


DIALECT = Dialect(
    name="OpenAI",
    base="openai",
    routes=[
        *map(embeddings_route, ("/v1/embeddings", "/embeddings", "/v3/embeddings", "/v1/embedding")),
        *(ModelQuery(path=path, summary="List the models", reply=Models, answer=models) for path in ("/v1/models", "/v3/models")),
        *(
            ModelQuery(path=f"{path}/{{id:path}}", summary="Show a model", reply=Model, answer=model)
            for path in ("/v1/models", "/models", "/v3/models")
        ),
    ],
    error=Error,
    to_error=to_error,
)
