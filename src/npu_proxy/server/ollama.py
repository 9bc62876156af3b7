"""The Ollama dialect: /api/embed, /api/embeddings and what its clients ask besides. Source: Ollama's routes, ollama-python."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec

from npu_proxy.errors import EmptyInputError, InputError, NpuProxyError
from npu_proxy.models.catalog import alias
from npu_proxy.server.dialect import (
    Action,
    Dialect,
    Endpoint,
    ForbiddenError,
    NoBodyError,
    Query,
    Served,
    UnknownModelError,
    floats,
)
from npu_proxy.types import EmbedRequest, EmbedResult, Truncate
from npu_proxy.version import __version__

_EVER = "2318-01-01T00:00:00+00:00"
"""When a model that is never unloaded goes; what Ollama says for keep_alive -1."""


class Options(msgspec.Struct, kw_only=True):
    """Model options; all but `num_ctx` are for other kinds of models and do nothing."""

    num_ctx: int | None = None


class EmbedBody(msgspec.Struct, kw_only=True):
    """Body of POST /api/embed."""

    model: str | None = None
    input: Any = None
    truncate: bool | None = None
    dimensions: int | None = None
    keep_alive: float | str | None = None
    options: Options | None = None


class Embeddings(msgspec.Struct, kw_only=True):
    """Answer of POST /api/embed; durations are nanoseconds, the count includes special tokens."""

    model: str
    embeddings: list[list[float]]
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0


class PromptBody(msgspec.Struct, kw_only=True):
    """Body of POST /api/embeddings, the older route: one text, not normalized."""

    model: str | None = None
    prompt: str | None = None
    keep_alive: float | str | None = None
    options: Options | None = None


class Embedding(msgspec.Struct, kw_only=True):
    """Answer of POST /api/embeddings."""

    embedding: list[float]


class NameBody(msgspec.Struct, kw_only=True):
    """Body of routes about one model; older clients say `name`."""

    model: str | None = None
    name: str | None = None
    verbose: bool | None = None
    insecure: bool | None = None
    stream: bool | None = None


class Details(msgspec.Struct, kw_only=True):
    """What kind of model it is."""

    parent_model: str = ""
    format: str = "safetensors"
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class Model(msgspec.Struct, kw_only=True):
    """A model that can be asked."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class Models(msgspec.Struct, kw_only=True):
    """Answer of GET /api/tags."""

    models: list[Model]


class Running(Model, kw_only=True):
    """A model that is loaded."""

    expires_at: str
    size_vram: int
    context_length: int


class AllRunning(msgspec.Struct, kw_only=True):
    """Answer of GET /api/ps."""

    models: list[Running]


class Shown(msgspec.Struct, kw_only=True):
    """Answer of POST /api/show."""

    details: Details
    model_info: dict[str, str | int]
    capabilities: list[str]
    modelfile: str
    parameters: str
    template: str
    license: str
    modified_at: str


class Version(msgspec.Struct, kw_only=True):
    """Answer of GET /api/version."""

    version: str


class Error(msgspec.Struct, kw_only=True):
    """Every error of this dialect."""

    error: str


def to_request(body: EmbedBody, served: Served) -> EmbedRequest | Embeddings:
    """No input is no error here: it has no vectors."""
    name = served.check(body.model)
    if body.input is None or body.input in ("", []):
        return Embeddings(model=name, embeddings=[])
    texts = [body.input] if isinstance(body.input, str) else body.input
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):  # type: ignore[reportUnknownVariableType]
        raise InputError("invalid input type", param="input")
    narrower = body.dimensions is not None and 0 < body.dimensions < served.spec.width
    return EmbedRequest(
        texts=texts,  # type: ignore[reportUnknownArgumentType]
        dimensions=body.dimensions if narrower else None,
        truncate=Truncate.ERROR if body.truncate is False else Truncate.END,
        max_tokens=_limit(body.options),
    )


def to_response(result: EmbedResult, body: EmbedBody, served: Served) -> Embeddings:
    """Vectors are always of length 1; the model is named as it was asked for."""
    return Embeddings(
        model=served.check(body.model),
        embeddings=floats(result).tolist(),
        total_duration=round(1e9 * result.timings.total),
        prompt_eval_count=sum(result.tokens),
    )


def to_prompt_request(body: PromptBody, served: Served) -> EmbedRequest | Embedding:
    """The older route: an empty prompt has an empty vector."""
    served.check(body.model)
    if not body.prompt:
        return Embedding(embedding=[])
    return EmbedRequest(texts=[body.prompt], normalize=False, max_tokens=_limit(body.options))


def to_prompt_response(result: EmbedResult, _: PromptBody, __: Served) -> Embedding:
    """One vector, as the model gives it."""
    return Embedding(embedding=floats(result)[0].tolist())


def to_error(error: NpuProxyError, status: int) -> Error:
    """Ollama's own words where its clients look for them."""
    match error:
        case NoBodyError():
            return Error(error="missing request body")
        case UnknownModelError():
            return Error(error=f'model "{error.model}" not found, try pulling it first')
        case EmptyInputError():
            return Error(error=f"{error.param}: {error}")
        case _:
            words = {
                "overloaded": "server busy, please try again.  maximum pending requests exceeded",
                "too_long": "the input length exceeds the context length",
                "nothing_left": "input after truncation exceeds maximum context length",
            }
            return Error(error=words.get(error.kind, str(error)) if status != 500 else str(error))


def show(body: NameBody, served: Served) -> Shown:
    """What a model is; `model_info` is always there, ollama-python needs it."""
    served.check(body.model or body.name)
    spec = served.spec
    return Shown(
        details=_details(served),
        model_info={
            "general.architecture": spec.family,
            "general.parameter_count": served.parameters,
            f"{spec.family}.context_length": spec.max_length,
            f"{spec.family}.embedding_length": spec.width,
            f"{spec.family}.pooling_type": str(spec.pooling),
        },
        capabilities=["embedding"],
        modelfile=f"FROM {spec.name}\n",
        parameters=f"num_ctx {spec.max_length}",
        template="{{ .Prompt }}",
        license="",
        modified_at=_time(served.since),
    )


def refuse(_: NameBody, __: Served) -> Shown:
    """Pulling and deleting through the API is off."""
    raise ForbiddenError("models are pulled and removed on the server itself: npu-proxy pull, npu-proxy rm")


def _model(served: Served) -> dict[str, Any]:
    name = alias(served.spec.name)
    name = name if ":" in name else f"{name}:latest"
    return {
        "name": name,
        "model": name,
        "modified_at": _time(served.since),
        "size": served.size,
        "digest": served.spec.fingerprint * 4,
        "details": _details(served),
    }


def _running(served: Served) -> Running:
    return Running(**_model(served), expires_at=_EVER, size_vram=0, context_length=served.spec.max_length)


def _details(served: Served) -> Details:
    spec, millions = served.spec, served.parameters / 1e6
    level = {"fp32": "F32", "fp16": "F16", "int8": "Q8_0"}[spec.precision]
    return Details(family=spec.family, families=[spec.family], parameter_size=f"{millions:.1f}M", quantization_level=level)


def _limit(options: Options | None) -> int | None:
    given = options.num_ctx if options else None
    return given if given is not None and given > 0 else None


def _time(unix: int) -> str:
    return datetime.fromtimestamp(unix, UTC).isoformat()


DIALECT = Dialect(
    name="Ollama",
    endpoints=[
        Endpoint(
            path="/api/embed",
            summary="Embed texts",
            body=EmbedBody,
            response=Embeddings,
            to_request=to_request,
            to_response=to_response,
        ),
        Endpoint(
            path="/api/embeddings",
            summary="Embed one text, not normalized",
            body=PromptBody,
            response=Embedding,
            to_request=to_prompt_request,
            to_response=to_prompt_response,
        ),
    ],
    actions=[
        Action(path="/api/show", summary="What a model is", body=NameBody, response=Shown, answer=show),
        Action(path="/api/pull", summary="Refused: pull on the server", body=NameBody, response=Shown, answer=refuse),
        Action(
            path="/api/delete",
            summary="Refused: remove on the server",
            body=NameBody,
            response=Shown,
            answer=refuse,
            method="DELETE",
        ),
    ],
    queries=[
        Query(
            path="/api/tags",
            summary="List the models",
            response=Models,
            answer=lambda served, _: Models(models=[Model(**_model(served))]),
        ),
        Query(
            path="/api/ps",
            summary="List the loaded models",
            response=AllRunning,
            answer=lambda served, _: AllRunning(models=[_running(served)]),
        ),
        Query(path="/api/version", summary="Version", response=Version, answer=lambda _, __: Version(version=__version__)),
    ],
    error=Error,
    to_error=to_error,
)
