"""The Ollama dialect: /api/embed, /api/embeddings and what its clients ask besides. Source: Ollama's routes, ollama-python."""

from __future__ import annotations

import logging
import queue
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec

from npu_proxy.errors import EmptyInputError, InputError, NpuProxyError
from npu_proxy.models.catalog import alias
from npu_proxy.server.dialect import Card, Dialect, Endpoint, NoBodyError, Order, Query, Served, Shelf, UnknownModelError, floats
from npu_proxy.types import EmbedRequest, EmbedResult, Truncate
from npu_proxy.version import __version__

log = logging.getLogger("npu_proxy.server")

_EVER = "2318-01-01T00:00:00+00:00"
"""When a model that is never unloaded goes; what Ollama says for keep_alive -1."""


class Options(msgspec.Struct, kw_only=True):
    """Model options; all but `num_ctx` are for other kinds of models and do nothing."""

    num_ctx: int | float | None = None


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


class Progress(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A line of POST /api/pull: how far it is, or the error that ended it."""

    status: str = ""
    error: str = ""


class Nothing(msgspec.Struct):
    """Answer of DELETE /api/delete."""


class Version(msgspec.Struct, kw_only=True):
    """Answer of GET /api/version."""

    version: str


class Error(msgspec.Struct, kw_only=True):
    """Every error of this dialect."""

    error: str


def to_request(body: EmbedBody, served: Served) -> EmbedRequest | Embeddings:
    """No input is no error here: it has no vectors."""
    if body.input is None or body.input in ("", []):
        return Embeddings(model=served.asked, embeddings=[])
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
        model=served.asked,
        embeddings=floats(result).tolist(),
        total_duration=round(1e9 * (result.timings.total + served.load_seconds)),
        load_duration=round(1e9 * served.load_seconds),
        prompt_eval_count=sum(result.tokens),
    )


def to_prompt_request(body: PromptBody, served: Served) -> EmbedRequest | Embedding:
    """The older route: an empty prompt has an empty vector."""
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


def show(body: NameBody, shelf: Shelf) -> Shown:
    """What a model is; `model_info` is always there, ollama-python needs it."""
    card = shelf.find(body.model or body.name)
    spec = card.spec
    return Shown(
        details=_details(card),
        model_info={
            "general.architecture": spec.family,
            "general.parameter_count": card.parameters,
            f"{spec.family}.context_length": spec.max_length,
            f"{spec.family}.embedding_length": spec.width,
            f"{spec.family}.pooling_type": str(spec.pooling),
        },
        capabilities=["embedding"],
        modelfile=f"FROM {spec.name}\n",
        parameters=f"num_ctx {spec.max_length}",
        template="{{ .Prompt }}",
        license="",
        modified_at=_time(card.since),
    )


def pull(body: NameBody, shelf: Shelf) -> Iterator[Progress] | Progress:
    """Fetch a model, a line for each step; all of it before the answer where `stream` is false."""
    name = body.model or body.name or ""
    lines: queue.SimpleQueue[Progress | NpuProxyError | None] = queue.SimpleQueue()
    if body.stream is False or not shelf.settings.allow_pull:  # a refusal is an error, not a line
        shelf.pull(name, lambda _: None)
        return Progress(status="success")

    def work() -> None:
        try:
            shelf.pull(name, lambda line: lines.put(Progress(status=line)))
            lines.put(Progress(status="success"))
        except Exception as error:  # the answer has begun, so this is its last line
            known = isinstance(error, NpuProxyError)
            lines.put(Progress(error=str(error) if known else "internal error; the server's log has more"))
            log.log(logging.INFO if known else logging.ERROR, "pulling %s failed", name[:200], exc_info=not known)
        lines.put(None)

    def report() -> Iterator[Progress]:
        threading.Thread(target=work, name="npu-proxy-pull", daemon=True).start()
        yield Progress(status=f"pulling {name}")
        while isinstance(line := lines.get(timeout=_PULL_SECONDS), Progress):
            yield line

    return report()


def delete(body: NameBody, shelf: Shelf) -> Nothing:
    """Remove a model from the store."""
    shelf.delete(body.model or body.name or "")
    return Nothing()


def keep_alive(body: EmbedBody | PromptBody) -> float | None:
    """Seconds: a number, or a Go duration such as `5m` or `1h30m`; negative is for ever. Raises InputError."""
    given = body.keep_alive
    if not isinstance(given, str):
        return None if given is None else _bounded(given)
    if len(given) > _LONGEST_DURATION:
        raise InputError("keep_alive is no duration, such as `5m`", param="keep_alive")
    if re.fullmatch(r"-?\d+(\.\d+)?", given):
        return _bounded(float(given))
    parts = re.fullmatch(r"([+-]?)((?:\d+(?:\.\d+)?(?:ns|us|µs|ms|s|m|h))+)", given)
    if parts is None:
        raise InputError(f'time: invalid duration "{given[:40]}"', param="keep_alive")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+)(ns|us|µs|ms|s|m|h)", parts[2]))
    return _bounded(-seconds if parts[1] == "-" else seconds)


def _bounded(seconds: float) -> float:
    """More than ten years is for ever."""
    return seconds if seconds < _TEN_YEARS else -1.0


_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_LONGEST_DURATION = 60
_TEN_YEARS = 10 * 365 * 86400.0
_PULL_SECONDS = 3600.0
"""A pull that says nothing for so long has died."""


def _models(card: Card) -> list[dict[str, Any]]:
    """A model by its shortest name, and by each name that the server's settings give it."""
    common = {
        "modified_at": _time(card.since),
        "size": card.size,
        "digest": card.spec.fingerprint * 4,
        "details": _details(card),
    }
    names = [name if ":" in name else f"{name}:latest" for name in (alias(card.spec.name), *card.names)]
    return [{"name": name, "model": name, **common} for name in names]


def tags(shelf: Shelf, _: str) -> Models:
    """Every model that can be asked."""
    return Models(models=[Model(**one) for card in shelf.cards() for one in _models(card)])


def ps(shelf: Shelf, _: str) -> AllRunning:
    """The models in memory."""
    return AllRunning(
        models=[
            Running(
                **_models(card)[0],
                expires_at=_EVER if card.expires is None else _time(card.expires),
                size_vram=0,
                context_length=card.spec.max_length,
            )
            for card in shelf.cards()
            if card.loaded
        ]
    )


def _details(card: Card) -> Details:
    spec, millions = card.spec, card.parameters / 1e6
    level = {"fp32": "F32", "fp16": "F16", "int8": "Q8_0"}[spec.precision]
    return Details(family=spec.family, families=[spec.family], parameter_size=f"{millions:.1f}M", quantization_level=level)


def _limit(options: Options | None) -> int | None:
    given = options.num_ctx if options else None
    return int(given) if given is not None and 1 <= given < 1e9 else None


def _time(unix: float) -> str:
    return datetime.fromtimestamp(unix, UTC).isoformat()


DIALECT = Dialect(
    name="Ollama",
    routes=[
        Endpoint(
            path="/api/embed",
            summary="Embed texts",
            body=EmbedBody,
            response=Embeddings,
            to_request=to_request,
            to_response=to_response,
            keep_alive=keep_alive,
        ),
        Endpoint(
            path="/api/embeddings",
            summary="Embed one text, not normalized",
            body=PromptBody,
            response=Embedding,
            to_request=to_prompt_request,
            to_response=to_prompt_response,
            keep_alive=keep_alive,
        ),
        Order(path="/api/show", summary="What a model is", body=NameBody, response=Shown, answer=show),
        Order(path="/api/pull", summary="Fetch a model (setting `allow_pull`)", body=NameBody, response=Progress, answer=pull),
        Order(
            path="/api/delete",
            summary="Remove a model (setting `allow_pull`)",
            body=NameBody,
            response=Nothing,
            answer=delete,
            method="DELETE",
        ),
        Query(path="/api/tags", summary="List the models", response=Models, answer=tags),
        Query(path="/api/ps", summary="List the loaded models", response=AllRunning, answer=ps),
        Query(path="/api/version", summary="Version", response=Version, answer=lambda _, __: Version(version=__version__)),
    ],
    error=Error,
    to_error=to_error,
)
