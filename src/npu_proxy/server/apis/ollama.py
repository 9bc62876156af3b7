"""The Ollama API: /api/embed, /api/embeddings, and the model routes that its clients use. Source: Ollama, ollama-python.

Longer than most files here, because one API is one file and each of its bodies is a type.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar

import msgspec

from npu_proxy.errors import EmptyInputError, InputError, NpuProxyError
from npu_proxy.models import card
from npu_proxy.models.catalog import alias
from npu_proxy.server.apis.common import float_rows, float_vectors, tokens_used
from npu_proxy.server.apis.contract import (
    Dialect,
    InferenceRoute,
    ModelCommand,
    ModelInfo,
    ModelListing,
    ModelQuery,
    RequestBody,
    ServedModel,
    kind_of,
)
from npu_proxy.server.errors import NoBodyError, UnknownModelError
from npu_proxy.types import EmbedRequest, EmbedResult, Truncate
from npu_proxy.version import __version__

_log = logging.getLogger("npu_proxy.server")

_API_VERSION = "0.13.5"
"""The version of Ollama whose API this is; clients such as VS Code refuse older ones."""
_EVER = "2318-01-01T00:00:00+00:00"
"""Expiry time of a model that is never unloaded; Ollama reports it for keep_alive -1."""


class Options(msgspec.Struct, kw_only=True):
    """Model options; all except `num_ctx` are for other kinds of models and have no effect."""

    num_ctx: int | float | None = None


_HARMLESS: Mapping[str, str] = {
    "options.*": "all options except `num_ctx` are for models that write text",
    "stream": "a reply of vectors is never streamed",
}


class EmbedBody(RequestBody, kw_only=True):
    """Body of POST /api/embed."""

    model: str | None = None
    input: Any = None
    truncate: bool | None = None
    dimensions: int | None = None
    keep_alive: float | str | None = None
    options: Options | None = None

    harmless: ClassVar[Mapping[str, str]] = _HARMLESS


class Embeddings(msgspec.Struct, kw_only=True):
    """Reply of POST /api/embed; durations are in nanoseconds, the count includes special tokens."""

    model: str
    embeddings: list[list[float] | None]
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0


class PromptBody(RequestBody, kw_only=True):
    """Body of POST /api/embeddings, the older route: one text, not normalized. `input` is taken for `prompt`."""

    model: str | None = None
    prompt: str | None = None
    input: str | None = None
    keep_alive: float | str | None = None
    options: Options | None = None

    harmless: ClassVar[Mapping[str, str]] = _HARMLESS


class Embedding(msgspec.Struct, kw_only=True):
    """Reply of POST /api/embeddings."""

    embedding: list[float]


class NameBody(RequestBody, kw_only=True):
    """Body of the routes for one model; older clients send `name` instead of `model`."""

    model: str | None = None
    name: str | None = None
    stream: bool | None = None

    harmless: ClassVar[Mapping[str, str]] = {
        "verbose": "asks for tables of the tokenizer, which are left out",
        "insecure": "would allow http; the server's mirrors are used",
        "system": "is for models that write text",
        "template": "is for models that write text",
        "options": "is for models that write text",
    }


class Details(msgspec.Struct, kw_only=True):
    """The kind of a model."""

    parent_model: str = ""
    format: str = "safetensors"
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class Model(msgspec.Struct, kw_only=True):
    """A model that clients may request."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class Models(msgspec.Struct, kw_only=True):
    """Reply of GET /api/tags."""

    models: list[Model]


class Running(Model, kw_only=True):
    """A model that is loaded."""

    expires_at: str
    size_vram: int
    context_length: int


class AllRunning(msgspec.Struct, kw_only=True):
    """Reply of GET /api/ps."""

    models: list[Running]


class Shown(msgspec.Struct, kw_only=True):
    """Reply of POST /api/show."""

    details: Details
    model_info: dict[str, str | int]
    capabilities: list[str]
    modelfile: str
    parameters: str
    template: str
    license: str
    modified_at: str


class Progress(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A line of the reply of POST /api/pull: its progress, or the error that ended it."""

    status: str = ""
    error: str = ""


class Nothing(msgspec.Struct):
    """Empty reply of DELETE /api/delete."""


class Version(msgspec.Struct, kw_only=True):
    """Reply of GET /api/version."""

    version: str
    npu_proxy: str


class Error(msgspec.Struct, kw_only=True):
    """Error format of this API."""

    error: str


def to_requests(body: EmbedBody, served: ServedModel) -> list[EmbedRequest]:
    """Return the request, or none for empty input, which is not an error in this API. Raises InputError."""
    if body.input is None or body.input in ("", []):
        return []
    texts = [body.input] if isinstance(body.input, str) else body.input
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):  # type: ignore[reportUnknownVariableType]
        raise InputError("invalid input type", param="input")
    narrower = body.dimensions is not None and 0 < body.dimensions < served.spec.width
    request = EmbedRequest(
        texts=texts,  # type: ignore[reportUnknownArgumentType]
        dimensions=body.dimensions if narrower else None,
        truncate=Truncate.ERROR if body.truncate is False else Truncate.END,
        max_tokens=_limit(body.options),
        on_empty=None if served.settings.on_empty == "placeholder" else "embed",
    )
    return [request]


def to_reply(results: Sequence[EmbedResult], _: EmbedBody, served: ServedModel) -> Embeddings:
    """Return vectors of length 1, and the model's name as the client wrote it."""
    if not results:
        return Embeddings(model=served.requested_name, embeddings=[])
    (result,) = results
    return Embeddings(
        model=served.requested_name,
        embeddings=float_rows(result),
        total_duration=round(1e9 * (result.timings.total + served.load_seconds)),
        load_duration=round(1e9 * served.load_seconds),
        prompt_eval_count=tokens_used(results),
    )


def prompt_requests(body: PromptBody, _: ServedModel) -> list[EmbedRequest]:
    """Return the request of the older route: one text, or no request if the prompt is empty."""
    prompt = body.prompt or body.input
    return [EmbedRequest(texts=[prompt], normalize=False, max_tokens=_limit(body.options), on_empty="embed")] if prompt else []


def prompt_reply(results: Sequence[EmbedResult], _: PromptBody, __: ServedModel) -> Embedding:
    """Return one vector, not normalized; an empty one for an empty prompt."""
    return Embedding(embedding=float_vectors(results[0])[0].tolist() if results else [])


def to_error(error: NpuProxyError, status: int) -> Error:
    """Return an error, with Ollama's own message if its clients look for it."""
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


def cannot_write(verb: str) -> Callable[[NameBody, ModelListing], Nothing]:
    """Return what refuses to write text, in the words by which clients tell such a model from a server that is not there."""

    def refuse(body: NameBody, listing: ModelListing) -> Nothing:
        name = body.model or body.name or ""
        listing.find(name)
        raise InputError(f'"{name}" does not support {verb}', param="model")

    return refuse


def show(body: NameBody, listing: ModelListing) -> Shown:
    """Describe a model; `model_info` is always present because ollama-python needs it."""
    info = listing.find(body.model or body.name)
    spec = info.spec
    return Shown(
        details=_details(info),
        model_info={
            "general.architecture": spec.family,
            "general.parameter_count": info.parameters,
            f"{spec.family}.context_length": spec.max_length,
            f"{spec.family}.embedding_length": _hidden_size(info),
            f"{spec.family}.pooling_type": str(spec.pooling),
        },
        capabilities=[_CAPABILITIES.get(kind_of(spec), "embedding")],
        modelfile=f"FROM {spec.name}\n",
        parameters=f"num_ctx {spec.max_length}",
        template="{{ .Prompt }}",
        license=card.licence(spec),
        modified_at=_time(info.since),
    )


def pull(body: NameBody, listing: ModelListing) -> Iterator[Progress] | Progress:
    """Download a model and report each step in a line; if `stream` is false, reply only when it is complete."""
    name = body.model or body.name or ""
    lines: queue.SimpleQueue[Progress | NpuProxyError | None] = queue.SimpleQueue()
    if body.stream is False or not listing.settings.allow_pull:  # a refusal is an error response, not a line
        listing.pull(name, lambda _: None)
        return Progress(status="success")

    def work() -> None:
        try:
            listing.pull(name, lambda line: lines.put(Progress(status=line)))
            lines.put(Progress(status="success"))
        except Exception as error:  # the response has begun, so the error is its last line
            known = isinstance(error, NpuProxyError)
            lines.put(Progress(error=str(error) if known else "internal error; see the server's log for details"))
            _log.log(logging.INFO if known else logging.ERROR, "pulling %s failed", name[:200], exc_info=not known)
        lines.put(None)

    def report() -> Iterator[Progress]:
        threading.Thread(target=work, name="npu-proxy-pull", daemon=True).start()
        yield Progress(status=f"pulling {name}")
        while isinstance(line := lines.get(timeout=_PULL_SECONDS), Progress):
            yield line

    return report()


def delete(body: NameBody, listing: ModelListing) -> Nothing:
    """Remove a model from the store."""
    listing.delete(body.model or body.name or "")
    return Nothing()


def keep_alive(body: EmbedBody | PromptBody) -> float | None:
    """Return keep_alive in seconds, from a number or a Go duration such as `1h30m`; negative means forever. Raises InputError."""
    given = body.keep_alive
    if not isinstance(given, str):
        return None if given is None else _bounded(given)
    if len(given) > _LONGEST_DURATION:
        raise InputError("`keep_alive` must be a duration such as `5m`", param="keep_alive")
    if re.fullmatch(r"-?\d+(\.\d+)?", given):
        return _bounded(float(given))
    parts = re.fullmatch(r"([+-]?)((?:\d+(?:\.\d+)?(?:ns|us|µs|ms|s|m|h))+)", given)
    if parts is None:
        raise InputError(f'time: invalid duration "{given[:40]}"', param="keep_alive")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+)(ns|us|µs|ms|s|m|h)", parts[2]))
    return _bounded(-seconds if parts[1] == "-" else seconds)


def _bounded(seconds: float) -> float:
    """Return the seconds, or -1.0 (forever) for ten years or more."""
    return seconds if seconds < _TEN_YEARS else -1.0


_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_LONGEST_DURATION = 60
_TEN_YEARS = 10 * 365 * 86400.0
_PULL_SECONDS = 3600.0
"""Seconds without progress after which a pull has failed."""


def _models(info: ModelInfo) -> list[dict[str, Any]]:
    """Describe a model under its shortest name, and under each further name in the server's settings."""
    common = {
        "modified_at": _time(info.since),
        "size": info.size,
        "digest": info.spec.fingerprint * 4,
        "details": _details(info),
    }
    names = [name if ":" in name else f"{name}:latest" for name in (alias(info.spec.name), *info.names)]
    return [{"name": name, "model": name, **common} for name in names]


def tags(listing: ModelListing, _: str) -> Models:
    """List every model that clients may request."""
    return Models(models=[Model(**entry) for info in listing.all() for entry in _models(info)])


def ps(listing: ModelListing, _: str) -> AllRunning:
    """List the models in memory."""
    return AllRunning(
        models=[
            Running(
                **_models(info)[0],
                expires_at=_EVER if info.expires is None else _time(info.expires),
                size_vram=0,
                context_length=info.spec.max_length,
            )
            for info in listing.all()
            if info.loaded
        ]
    )


def _details(info: ModelInfo) -> Details:
    spec, millions = info.spec, info.parameters / 1e6
    level = {"fp32": "F32", "fp16": "F16", "int8": "Q8_0"}[spec.precision]
    return Details(family=spec.family, families=[spec.family], parameter_size=f"{millions:.1f}M", quantization_level=level)


_CAPABILITIES = {"reranker": "rerank", "classifier": "classify"}


def _hidden_size(info: ModelInfo) -> int:
    """Return the width of a model's token vectors; that of its output would be 1 for a reranker."""
    width = info.spec.config.get("hidden_size")
    return width if isinstance(width, int) else info.spec.width


def _limit(options: Options | None) -> int | None:
    """Return `num_ctx`, None if it is negative, which means the model's own. Raises InputError for 0."""
    given = options.num_ctx if options else None
    if given is not None and 0 <= given < 1:
        raise InputError("input exceeds maximum context length and cannot be truncated further", param="options.num_ctx")
    return int(given) if given is not None and 1 <= given < 1e9 else None


def _time(unix: float) -> str:
    return datetime.fromtimestamp(unix, UTC).isoformat()


DIALECT = Dialect(
    name="Ollama",
    base="ollama",
    routes=[
        *(
            InferenceRoute(
                path=path,
                summary="Embed texts",
                body=EmbedBody,
                vectors=True,
                reply=Embeddings,
                to_requests=to_requests,
                to_reply=to_reply,
                keep_alive=keep_alive,
                applies=lambda fields, _: fields.has("input") and not fields.has("inputs"),
            )
            for path in ("/api/embed", "/embed")  # some clients are given a base URL without /api
        ),
        InferenceRoute(
            path="/api/embeddings",
            summary="Embed one text, not normalized",
            body=PromptBody,
            reply=Embedding,
            to_requests=prompt_requests,
            to_reply=prompt_reply,
            keep_alive=keep_alive,
        ),
        ModelCommand(path="/api/show", summary="Show a model", body=NameBody, reply=Shown, answer=show),
        *(
            ModelCommand(
                path=f"/api/{verb}",
                summary="Refused: no model here writes text",
                body=NameBody,
                reply=Nothing,
                answer=cannot_write(verb),
            )
            for verb in ("generate", "chat")
        ),
        ModelCommand(
            path="/api/pull", summary="Download a model (setting `allow_pull`)", body=NameBody, reply=Progress, answer=pull
        ),
        ModelCommand(
            path="/api/delete",
            summary="Remove a model (setting `allow_pull`)",
            body=NameBody,
            reply=Nothing,
            answer=delete,
            method="DELETE",
        ),
        ModelQuery(path="/api/tags", summary="List the models", reply=Models, answer=tags),
        ModelQuery(path="/api/ps", summary="List the loaded models", reply=AllRunning, answer=ps),
        ModelQuery(
            path="/api/version",
            summary="Show the server's version",
            reply=Version,
            answer=lambda _, __: Version(version=_API_VERSION, npu_proxy=__version__),
        ),
    ],
    error=Error,
    to_error=to_error,
)
