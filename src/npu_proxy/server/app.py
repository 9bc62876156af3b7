"""The application is a value: dialects, operations, one handler a kind of route, one way for errors."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route as Path
from starlette.types import ASGIApp, Lifespan

from npu_proxy.errors import DeadlineError, InputError, NpuProxyError
from npu_proxy.server import auth, cohere, infinity, ollama, openai, ops, tei, vllm
from npu_proxy.server.dialect import (
    Action,
    Dialect,
    Endpoint,
    NotAllowedError,
    NothingHereError,
    Order,
    Query,
    Route,
    model_of,
)
from npu_proxy.server.door import Door, Exact
from npu_proxy.server.exchange import (
    Answer,
    Bodies,
    Exchange,
    GoneError,
    advice,
    decode,
    fields_of,
    headers_of,
    request_id,
    timeout_of,
    unless_gone,
)
from npu_proxy.server.logs import log_access
from npu_proxy.server.metrics import Metrics
from npu_proxy.server.openapi import document
from npu_proxy.server.registry import Registry
from npu_proxy.server.shelf import ModelShelf
from npu_proxy.server.tracing import Tracer, open_tracer
from npu_proxy.settings import Settings
from npu_proxy.types import EmbedRequest, EmbedResult

DIALECTS: tuple[Dialect, ...] = (openai.DIALECT, ollama.DIALECT, tei.DIALECT, infinity.DIALECT, cohere.DIALECT, vllm.DIALECT)
"""The APIs on the port; a further one is one file and its name here. A body on a path of several goes to the first that wants it"""

log = logging.getLogger("npu_proxy.server")

_ACTION_BYTES = 250_000
Handler = Callable[[Exchange], Awaitable[Response]]
Pair = tuple[Dialect, Route]


@dataclass(kw_only=True)
class State:
    """What handlers share: the models, the limits of bodies, the metrics, the keys."""

    registry: Registry
    settings: Settings
    metrics: Metrics
    bodies: Bodies
    keys: Sequence[bytes]
    tracer: Tracer | None
    acting: asyncio.Semaphore


def create_app(
    registry: Registry, settings: Settings, lifespan: Lifespan[Starlette] | None = None, keys: Sequence[bytes] | None = None
) -> ASGIApp:
    """Everything on one port, over models that somebody else starts and stops. keys: of clients; None reads the settings'."""
    state = State(
        registry=registry,
        settings=settings,
        metrics=Metrics(registry),
        bodies=Bodies(settings),
        keys=auth.read_keys(settings) if keys is None else keys,
        tracer=open_tracer(settings),
        acting=asyncio.Semaphore(2),
    )
    openapi = msgspec.json.encode(document(DIALECTS))
    first = DIALECTS[0]
    plain: list[tuple[str, Callable[[Request], Awaitable[Response]]]] = [
        ("/health", ops.health(registry)),
        ("/health/live", ops.live(registry)),
        ("/health/ready", ops.health(registry)),
        ("/ping", ops.health(registry)),
        ("/metrics", ops.metrics(state.metrics)),
        ("/openapi.json", _guarded(state, first, "/openapi.json", _static(openapi, "application/json"))),
        ("/docs", _guarded(state, first, "/docs", _static(ops.docs(), "text/html"))),
    ]
    routes = [Path(spelling, handle, methods=["GET"]) for path, handle in plain for spelling in (path, path + "/")]
    routes.append(Path("/", ops.static(b"Ollama is running", "text/plain"), methods=["GET"]))
    pairs = [(dialect, route) for dialect in DIALECTS for route in dialect.routes]
    by_path = sorted(pairs, key=lambda pair: (pair[1].path, pair[1].method))
    owners: dict[str, Dialect] = {}
    for (path, method), group in groupby(by_path, key=lambda pair: (pair[1].path, pair[1].method)):
        same = list(group)
        owners.setdefault(path, same[0][0])
        # Clients send a trailing slash or none, and a redirect loses the body of some.
        spellings = [path] if path.endswith(":path}") else [path, path + "/"]
        routes += [_route(one, method, state, same[0][0], _choosing(state, same)) for one in spellings]
    missing = _missing(state, owners)
    rest = Starlette(routes=routes, lifespan=lifespan, exception_handlers={404: missing, 405: missing})
    rest.router.redirect_slashes = False
    rest.state.npu_proxy = state
    app: ASGIApp = Exact(routes, rest)
    if settings.cors_allow_origin:
        app = CORSMiddleware(app, allow_origins=settings.cors_allow_origin, allow_methods=["*"], allow_headers=["*"])
    hosts, origins = auth.allowed_hosts(settings), settings.cors_allow_origin
    return Door(app, hosts=hosts, origins=origins, prefix=settings.url_prefix)


def _route(path: str, method: str, state: State, dialect: Dialect, handle: Handler) -> Path:
    return Path(path, _guarded(state, dialect, path, handle), methods=[method])


def _static(content: bytes, media_type: str) -> Handler:
    async def handle(_: Exchange) -> Response:
        return Response(content, media_type=media_type)

    return handle


def _choosing(state: State, pairs: Sequence[Pair]) -> Handler:
    """The handler of a path; where several dialects have it, the body decides, and the errors are in that one's shape."""
    handlers = [_handler(state, dialect, route) for dialect, route in pairs]
    if len(handlers) == 1:
        return handlers[0]

    async def handle(exchange: Exchange) -> Response:
        fields = fields_of(await state.bodies.read(exchange))
        wants = (
            number for number, (_, route) in enumerate(pairs) if isinstance(route, Query) or route.when(fields, state.settings)
        )
        number = next(wants, 0)
        exchange.dialect = pairs[number][0]
        return await handlers[number](exchange)

    return handle


def _handler(state: State, dialect: Dialect, route: Route) -> Handler:
    match route:
        case Endpoint():
            return _embedding(state, dialect, route)
        case Action():
            return _acting(state, route)
        case Query():
            return _answering(state, route)
        case Order():
            return _ordering(state, route)


def _embedding(state: State, dialect: Dialect, endpoint: Endpoint) -> Handler:
    decoder, settings = msgspec.json.Decoder(endpoint.body), state.settings

    async def handle(exchange: Exchange) -> Response:
        start = time.monotonic()
        body = decode(decoder, await state.bodies.read(exchange))
        with await state.registry.acquire(model_of(body), exchange.seconds, endpoint.fits) as use:
            use.keep_alive = endpoint.keep_alive(body)
            served, exchange.model = use.served, use.served.spec.name
            ask = endpoint.to_request(body, served)
            if not isinstance(ask, EmbedRequest | list):
                return Answer(ask)
            asks: list[EmbedRequest] = [ask] if isinstance(ask, EmbedRequest) else ask
            most = settings.max_client_batch
            for one in asks:
                if len(one.texts) > endpoint.sides * most:
                    raise InputError(f"the request has {len(one.texts)} texts; at most {most} are allowed (`max_client_batch`)")
            futures: list[Future[EmbedResult]] = []
            try:
                futures.extend(use.loaded.engine.submit(one, start + exchange.seconds) for one in asks)
                # What the cache knows is there at once.
                results = [
                    one.result() if one.done() else await unless_gone(exchange.request, asyncio.wrap_future(one)) for one in futures
                ]
            finally:
                for one in futures:  # where one failed, or the client has gone, nobody waits for the others
                    one.cancel()
            exchange.result = result = results[-1]
            for one in results:
                one.raise_first()
            content = endpoint.to_response(results if asks is ask else result, body, served)
        return Answer(
            content,
            headers={**dialect.headers(result, asks[-1]), **headers_of(result)},
            seconds=settings.header_timeout,
            bodies=state.bodies,
        )

    return handle


def _acting(state: State, action: Action) -> Handler:
    """Tokenizing and the like: every token becomes an object, so bodies are small, and two at a time are enough."""
    decoder = msgspec.json.Decoder(action.body)

    async def handle(exchange: Exchange) -> Response:
        content = await state.bodies.read(exchange)
        if len(content) > _ACTION_BYTES:
            raise InputError(f"the body has {len(content)} bytes; this route takes {_ACTION_BYTES}, send less at once")
        body = decode(decoder, content)
        with await state.registry.acquire(model_of(body), exchange.seconds) as use:
            exchange.model = use.served.spec.name
            try:
                async with asyncio.timeout(exchange.seconds), state.acting:
                    return await asyncio.to_thread(lambda: Answer(action.answer(body, use.served)))
            except TimeoutError:
                raise DeadlineError(f"no answer within {exchange.seconds:g} seconds; send less at once") from None

    return handle


def _answering(state: State, query: Query) -> Handler:
    async def handle(exchange: Exchange) -> Response:
        shelf = ModelShelf(state.registry, asyncio.get_running_loop())
        name = exchange.request.path_params.get("id", "").rstrip("/")
        return Answer(await asyncio.to_thread(query.answer, shelf, name))

    return handle


def _ordering(state: State, order: Order) -> Handler:
    decoder = msgspec.json.Decoder(order.body)

    async def handle(exchange: Exchange) -> Response:
        body = decode(decoder, await state.bodies.read(exchange))
        shelf = ModelShelf(state.registry, asyncio.get_running_loop())
        answer = await state.registry.in_thread(order.answer, body, shelf)
        if isinstance(answer, Iterator):
            return StreamingResponse(map(_line, answer), media_type="application/x-ndjson")
        return Answer(answer)

    return handle


def _line(item: Any) -> bytes:
    return msgspec.json.encode(item) + b"\n"


def _guarded(state: State, dialect: Dialect, path: str, handle: Handler) -> Callable[[Request], Awaitable[Response]]:
    """Key, request id, metrics, log, trace, and every error in the dialect's own shape."""

    async def guarded(request: Request) -> Response:
        exchange = Exchange(request, request_id(request))
        response: Response | None = None
        try:
            auth.check(state.keys, request.headers)
            exchange.seconds = timeout_of(request, state.settings.timeout)
            response = await handle(exchange)
        except NpuProxyError as error:
            exchange.error = error
        except ClientDisconnect:
            exchange.error = GoneError("the client has gone")  # nobody is there to read it
        except Exception:  # a fault of ours, in the dialect's shape; the log has the rest
            log.exception("%s: unexpected error in request %s", path, exchange.id)
            exchange.error = NpuProxyError("internal error; the server's log has more")
        finally:
            state.bodies.release(exchange)
        if response is None:
            own, found = exchange.dialect or dialect, exchange.error or NpuProxyError("no answer")
            status = own.status_of(found)
            response = Answer(own.to_error(found, status), status, headers=advice(found))
        response.headers["x-request-id"] = exchange.id
        seconds = time.perf_counter() - exchange.start
        state.metrics.answered(path, response.status_code, seconds, exchange)
        log_access(exchange, response.status_code, seconds)
        if state.tracer is not None:
            state.tracer.record(path, exchange, response.status_code, seconds)
        return response

    return guarded


def _missing(state: State, owners: dict[str, Dialect]) -> Callable[[Request, Exception], Awaitable[Response]]:
    """404 and 405 in the shape of the dialect that has the path, or one like it."""

    async def handle(request: Request, error: Exception) -> Response:
        path = request.url.path.rstrip("/") or "/"
        own = owners.get(path, ollama.DIALECT if path.startswith("/api/") else DIALECTS[0])
        found: NpuProxyError = NothingHereError("there is nothing here; /docs shows what there is")
        if getattr(error, "status_code", 404) == 405:
            found = NotAllowedError(f"{request.method} is not allowed here")
        status = own.status_of(found)
        exchange = Exchange(request, request_id(request), error=found)
        state.metrics.answered("other", status, 0.0, exchange)
        log_access(exchange, status, 0.0)
        headers = {**dict(getattr(error, "headers", None) or {}), "x-request-id": exchange.id}
        return Answer(own.to_error(found, status), status, headers=headers)

    return handle
