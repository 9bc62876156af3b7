"""The application is a value: dialects, operations, one handler, one way for errors."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Lifespan

from npu_proxy.engine.async_engine import AsyncEngine
from npu_proxy.errors import (
    DeadlineError,
    DeviceError,
    InputError,
    NpuProxyError,
    OverloadedError,
    StoppedError,
    UnavailableError,
)
from npu_proxy.server import auth, cohere, ollama, openai, ops, tei
from npu_proxy.server.dialect import STATUS, Action, Dialect, Endpoint, NoBodyError, Query, Served
from npu_proxy.server.metrics import Metrics
from npu_proxy.server.openapi import document
from npu_proxy.settings import Settings
from npu_proxy.types import EmbedRequest, EmbedResult

DIALECTS: tuple[Dialect, ...] = (openai.DIALECT, ollama.DIALECT, tei.DIALECT, cohere.DIALECT)
"""The APIs on the port; a further one is one file and its name here."""

log = logging.getLogger("npu_proxy.server")

_HEADER = "x-npu-proxy-"
Handler = Callable[[Request], Awaitable[Response]]


class TooLargeError(InputError):
    """The body is larger than the setting `max_body_mb`."""

    kind = "too_large"


@dataclass(kw_only=True)
class State:
    """What handlers share: the engine, whether it has loaded, and the metrics."""

    engine: AsyncEngine
    settings: Settings
    metrics: Metrics
    keys: Sequence[bytes] = ()
    since: int = field(default_factory=lambda: int(time.time()))
    failure: str | None = None

    def served(self) -> Served:
        """The model. Raises StoppedError while it loads or after it failed to."""
        state = self.engine.engine.state
        if state != "running":
            words = {"new": "the model is loading; try again in a moment", "stopping": "the server is stopping"}
            raise StoppedError(self.failure or words.get(state, "the engine has stopped"))
        engine = self.engine.engine
        return Served(spec=engine.spec, encoder=engine.encoder, settings=self.settings, since=self.since)


def create_app(engine: AsyncEngine, settings: Settings, lifespan: Lifespan[Starlette] | None = None) -> Starlette:
    """Everything on one port, over an engine that somebody else starts and stops."""
    state = State(engine=engine, settings=settings, metrics=Metrics(engine.engine), keys=auth.read_keys(settings))
    openapi = msgspec.json.encode(document(DIALECTS))
    routes = [
        Route("/health", ops.health(state), methods=["GET"]),
        Route("/health/live", ops.live(state), methods=["GET"]),
        Route("/health/ready", ops.health(state), methods=["GET"]),
        Route("/metrics", ops.metrics(state), methods=["GET"]),
        Route(
            "/openapi.json", _guarded(state, DIALECTS[0], "/openapi.json", ops.static(openapi, "application/json")), methods=["GET"]
        ),
        Route("/docs", _guarded(state, DIALECTS[0], "/docs", ops.docs), methods=["GET"]),
        Route("/", ops.static(b"Ollama is running", "text/plain"), methods=["GET"]),
        Route("/ping", ops.health(state), methods=["GET"]),
    ]
    for dialect in DIALECTS:
        for endpoint in dialect.endpoints:
            routes += _routes(endpoint.path, _embedding(state, dialect, endpoint), "POST")
        for action in dialect.actions:
            routes += _routes(action.path, _acting(state, dialect, action), action.method)
        for query in dialect.queries:
            routes += _routes(query.path, _answering(state, dialect, query), "GET")
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={404: _not_found, 405: _not_found})
    app.router.redirect_slashes = False
    app.state.npu_proxy = state
    return app


def _routes(path: str, handler: Handler, method: str) -> Sequence[Route]:
    """A path with and without a trailing slash; clients send either, and a redirect loses the body of some."""
    paths = [path] if path.endswith(":path}") else [path, path + "/"]
    return [Route(path, handler, methods=[method]) for path in paths]


def _embedding(state: State, dialect: Dialect, endpoint: Endpoint) -> Handler:
    decoder = msgspec.json.Decoder(endpoint.body)

    async def handle(request: Request) -> Response:
        served = state.served()
        seconds = _timeout(request, state.settings.timeout)
        deadline = time.monotonic() + seconds
        content = await _body_in_time(request, state.settings, seconds)
        body = _decode(decoder, content)
        ask = endpoint.to_request(body, served)
        if not isinstance(ask, EmbedRequest):
            return _json(ask)
        if len(ask.texts) > state.settings.max_client_batch:
            most = state.settings.max_client_batch
            raise InputError(f"the request has {len(ask.texts)} texts; at most {most} are allowed (`max_client_batch`)")
        result = (await _unless_gone(request, state.engine.submit(replace(ask, deadline=deadline)))).raise_first()
        state.metrics.embedded(result)
        response = _json(endpoint.to_response(result, body, served))
        response.headers.update({**dialect.headers(result), **_headers(result)})
        return response

    return _guarded(state, dialect, endpoint.path, handle)


def _acting(state: State, dialect: Dialect, action: Action) -> Handler:
    decoder = msgspec.json.Decoder(action.body)

    async def handle(request: Request) -> Response:
        served = state.served()
        content = await _body_in_time(request, state.settings, _timeout(request, state.settings.timeout))
        return _json(action.answer(_decode(decoder, content), served))

    return _guarded(state, dialect, action.path, handle)


def _json(answer: object) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")


def _answering(state: State, dialect: Dialect, query: Query) -> Handler:
    async def handle(request: Request) -> Response:
        return _json(query.answer(state.served(), request.path_params.get("id", "").rstrip("/")))

    return _guarded(state, dialect, query.path, handle)


def _guarded(state: State, dialect: Dialect, path: str, handle: Handler) -> Handler:
    """Request id, metrics, and every error in the dialect's own shape."""

    async def guarded(request: Request) -> Response:
        start = time.perf_counter()
        try:
            auth.check(state.keys, request.headers)
            response = await handle(request)
        except NpuProxyError as error:
            status = dialect.status.get(error.kind, STATUS.get(error.kind, 500))
            response = Response(
                msgspec.json.encode(dialect.to_error(error, status)), status, media_type="application/json", headers=_advice(error)
            )
            state.metrics.failed(error.kind)
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody is there to read it
        except Exception:  # a fault of ours, in the dialect's shape; the log has the rest
            log.exception("%s: unexpected error", path)
            fault = NpuProxyError("internal error; the server's log has more")
            response = Response(msgspec.json.encode(dialect.to_error(fault, 500)), 500, media_type="application/json")
            state.metrics.failed(fault.kind)
        response.headers["x-request-id"] = _request_id(request)
        state.metrics.answered(path, response.status_code, time.perf_counter() - start)
        return response

    return guarded


def _decode(decoder: msgspec.json.Decoder[msgspec.Struct], body: bytes) -> msgspec.Struct:
    if not body:
        raise NoBodyError("the request has no body; send a JSON object")
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$.")
        raise InputError(f"{what} (at `{where.rstrip('`')}`)" if where else what, param=where.rstrip("`") or None) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"the body is no valid JSON: {error}") from error


async def _body_in_time(request: Request, settings: Settings, seconds: float) -> bytes:
    try:
        async with asyncio.timeout(seconds):
            return await _read_body(request, settings.max_body_mb * 1_000_000)
    except TimeoutError:
        raise DeadlineError(f"the request's body did not arrive within {seconds:g} seconds") from None


async def _read_body(request: Request, limit: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise TooLargeError(f"the body is larger than {limit / 1e6:g} MB; send fewer texts at once, or raise `max_body_mb`")
        chunks.append(chunk)
    return b"".join(chunks)


def _timeout(request: Request, default: float) -> float:
    """Seconds from header X-Request-Timeout or query `timeout`."""
    given = request.headers.get("x-request-timeout") or request.query_params.get("timeout")
    if given is None:
        return default
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= 3600:
        raise InputError(f"timeout must be a number of seconds above 0 and up to 3600, not `{given}`", param="timeout")
    return seconds


async def _unless_gone(request: Request, work: Awaitable[EmbedResult]) -> EmbedResult:
    """The result, unless the client hangs up first: then the work is cancelled before it costs inference."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise DeadlineError("the client has gone")
        return await task
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _headers(result: EmbedResult) -> dict[str, str]:
    headers = {f"{_HEADER}device": result.device, f"{_HEADER}fingerprint": result.fingerprint}
    if result.fallback:
        headers[f"{_HEADER}fallback"] = header_text(result.fallback)
    if any(result.truncated):
        headers[f"{_HEADER}truncated"] = str(sum(result.truncated))
    return headers


def header_text(text: str) -> str:
    """Text as a header's value can be: one line of printable ASCII, not too long."""
    return "".join(character if " " <= character <= "~" else "?" for character in text)[:400]


def _advice(error: NpuProxyError) -> dict[str, str]:
    """Headers that tell a client what to do next."""
    if isinstance(error, auth.UnauthorizedError):
        return {"www-authenticate": "Bearer"}
    if isinstance(error, OverloadedError):
        return {"retry-after": str(max(1, round(error.retry_after)))}
    return {"retry-after": "1"} if isinstance(error, UnavailableError | DeviceError) else {}


def _request_id(request: Request) -> str:
    """The client's own id where it is printable and short, else a new one."""
    given = request.headers.get("x-request-id", "")
    return given if 0 < len(given) <= 128 and given.isprintable() and given.isascii() else uuid.uuid4().hex


async def _not_found(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    words = "there is nothing here; /docs shows what there is" if status == 404 else f"{request.method} is not allowed here"
    shown = DIALECTS[0].to_error(InputError(words), status)
    headers = dict(getattr(error, "headers", None) or {})
    return Response(msgspec.json.encode(shown), status, media_type="application/json", headers=headers)
