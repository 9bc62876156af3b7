"""The application: the routes of all APIs, one handler per kind of route, and one place for errors.

Longer than most files here, so that the path of a request can be read from top to bottom.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import msgspec
import numpy as np
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route as StarletteRoute
from starlette.types import ASGIApp, Lifespan

from npu_proxy.errors import AnswerTooLargeError, DeadlineError, InputError, NpuProxyError
from npu_proxy.server.apis import (
    cohere,
    gemini,
    infinity,
    llama_cpp,
    mistral,
    model_server,
    nvidia,
    ollama,
    openai,
    tei,
    vllm,
    voyage,
    weaviate,
)
from npu_proxy.server.apis.common import tokens_used
from npu_proxy.server.apis.contract import (
    BodyFields,
    Dialect,
    InferenceRoute,
    ModelCommand,
    ModelQuery,
    Route,
    TokenizerRoute,
    model_of,
)
from npu_proxy.server.errors import ClientGoneError, MethodNotAllowedError, RouteNotFoundError
from npu_proxy.server.http.clients import ApiKey, identify, read_keys, wishes_of
from npu_proxy.server.http.decoding import check_refused
from npu_proxy.server.http.exchange import (
    Exchange,
    RequestBodies,
    fields_of,
    headers_of,
    off_loop,
    request_id,
    retry_headers,
    timeout_of,
    together,
    unless_disconnected,
    with_errors,
)
from npu_proxy.server.http.host_guard import ExactRouter, HostGuard
from npu_proxy.server.http.hosts import allowed_hosts
from npu_proxy.server.http.json_scan import check_values
from npu_proxy.server.http.paths import DIALECT
from npu_proxy.server.http.responses import JsonResponse
from npu_proxy.server.models.listing import ServerListing
from npu_proxy.server.models.loaded import LoadedModels
from npu_proxy.server.ops import health
from npu_proxy.server.ops.logs import log_access
from npu_proxy.server.ops.metrics import Metrics
from npu_proxy.server.ops.openapi import document
from npu_proxy.server.ops.tracing import Tracer, open_tracer
from npu_proxy.settings import Settings
from npu_proxy.spec import ModelSpec
from npu_proxy.types import EmbedRequest, EmbedResult, Lane, OutputType

DIALECTS: tuple[Dialect, ...] = (
    openai.DIALECT,
    tei.DIALECT,
    ollama.DIALECT,
    infinity.DIALECT,
    cohere.DIALECT,
    voyage.DIALECT,
    llama_cpp.DIALECT,
    vllm.DIALECT,
    model_server.DIALECT,
    mistral.DIALECT,
    gemini.DIALECT,
    nvidia.DIALECT,
    weaviate.DIALECT,
)
"""The APIs on the port; a new API is one file and its name here. On a path that several share, the first one whose route applies
to the body, and to the kind of the model, handles the request; below the API's own base path, that API does."""

_log = logging.getLogger("npu_proxy.server")

_TOKENIZER_BODY_BYTES = 250_000
Handler = Callable[[Exchange], Awaitable[Response]]


@dataclass(kw_only=True)
class AppState:
    """State that the handlers share. tokenizing: the threads of the tokenizer routes, which return one object per token."""

    models: LoadedModels
    settings: Settings
    metrics: Metrics
    bodies: RequestBodies
    keys: Sequence[ApiKey]
    tracer: Tracer | None
    tokenizing: ThreadPoolExecutor


def create_app(
    models: LoadedModels, settings: Settings, lifespan: Lifespan[Starlette] | None = None, keys: Sequence[ApiKey] | None = None
) -> ASGIApp:
    """Build the application. The caller starts and stops ``models``. keys: API keys; None reads those of the settings."""
    state = AppState(
        models=models,
        settings=settings,
        metrics=Metrics(models),
        bodies=RequestBodies(settings),
        keys=read_keys(settings) if keys is None else keys,
        tracer=open_tracer(settings),
        tokenizing=ThreadPoolExecutor(2, "npu-proxy-tokens"),
    )
    api_routes, owners = _api_routes(state)
    routes = [*_operations_routes(state), *api_routes]
    missing = _missing(state, owners)
    router = Starlette(routes=routes, lifespan=lifespan, exception_handlers={404: missing, 405: missing})
    router.router.redirect_slashes = False
    router.state.npu_proxy = state
    app = ExactRouter(routes, router, [dialect.base for dialect in DIALECTS])
    return HostGuard(
        app,
        hosts=allowed_hosts(settings),
        origins=settings.cors_allow_origin,
        prefix=settings.url_prefix,
        probed=health.HEALTH_PATHS,
    )


def _operations_routes(state: AppState) -> list[StarletteRoute]:
    """Return the routes for health, metrics and the API description, with and without a trailing slash."""
    openapi = msgspec.json.encode(document(DIALECTS))
    first = openai.DIALECT
    handlers: list[tuple[str, Callable[[Request], Awaitable[Response]]]] = [
        *health.health_handlers(state.models),
        ("/metrics", health.metrics(state.metrics)),
        ("/openapi.json", _guarded(state, first, "/openapi.json", _static(openapi, "application/json"))),
        ("/docs", _guarded(state, first, "/docs", _static(health.docs(), "text/html"))),
    ]
    routes = [StarletteRoute(spelling, handle, methods=["GET"]) for path, handle in handlers for spelling in (path, path + "/")]
    return [*routes, StarletteRoute("/", health.static(b"Ollama is running", "text/plain"), methods=["GET"])]


def _api_routes(state: AppState) -> tuple[list[StarletteRoute], dict[str, Dialect]]:
    """Return the routes of all APIs, and for each path the API it belongs to (the first, if several share it)."""
    pairs = [(dialect, route) for dialect in DIALECTS for route in dialect.routes]
    by_path = sorted(pairs, key=lambda pair: (pair[1].path, pair[1].method))
    routes: list[StarletteRoute] = []
    owners: dict[str, Dialect] = {}
    for (path, method), group in groupby(by_path, key=lambda pair: (pair[1].path, pair[1].method)):
        shared = list(group)
        owner = shared[0][0]
        owners.setdefault(path, owner)
        # Some clients add a trailing slash, and some lose the body in a redirect.
        for spelling in [path] if path.endswith(":path}") else [path, path + "/"]:
            handle = _guarded(state, owner, spelling, _dispatching(state, shared))
            routes.append(StarletteRoute(spelling, handle, methods=[method]))
    return routes, owners


def _static(content: bytes, media_type: str) -> Handler:
    async def handle(_: Exchange) -> Response:
        return Response(content, media_type=media_type)

    return handle


def _dispatching(state: AppState, shared: Sequence[tuple[Dialect, Route]]) -> Handler:
    """Return the handler of a path. If several APIs share it, the body decides which one handles it and formats its errors."""
    handlers = [_handler(state, dialect, route) for dialect, route in shared]
    if len(handlers) == 1:
        return handlers[0]
    by_base = {dialect.base: [number for number, (other, _) in enumerate(shared) if other is dialect] for dialect, _ in shared}
    open_to_all = [number for number, (_, route) in enumerate(shared) if not _below_base(route)]
    suits = [_suits(route) for _, route in shared]

    async def handle(exchange: Exchange) -> Response:
        content = await state.bodies.read(exchange)
        fields = await off_loop(len(content), lambda: fields_of(exchange))
        candidates = by_base.get(exchange.request.scope.get(DIALECT, ""), open_to_all)
        numbers = [number for number in candidates if _applies(shared[number][1], fields, state.settings)] or candidates
        choices = [suits[number] for number in numbers]
        chosen = 0
        if len(set(choices)) > 1:
            chosen = await state.models.first_suiting(exchange.named or model_of(fields), choices)
        number = numbers[chosen]
        exchange.dialect = shared[number][0]
        return await handlers[number](exchange)

    return handle


def _applies(route: Route, fields: BodyFields, settings: Settings) -> bool:
    return isinstance(route, ModelQuery) or route.applies(fields, settings)


def _below_base(route: Route) -> bool:
    """Whether a route answers only below the base path of its API."""
    return isinstance(route, InferenceRoute) and route.below_base


def _suits(route: Route) -> Callable[[ModelSpec], bool]:
    """Whether a route can use a model."""
    return route.suits if isinstance(route, InferenceRoute) else _any_model


def _any_model(_: ModelSpec) -> bool:
    return True


def _model_of(exchange: Exchange, route: InferenceRoute[Any, Any] | TokenizerRoute[Any, Any], body: object) -> str | None:
    """The model that the path names, or else the body."""
    in_path = exchange.request.path_params.get("id", "").removeprefix("models/") if route.model_in_path else ""
    return in_path or exchange.named or model_of(body)


def _handler(state: AppState, dialect: Dialect, route: Route) -> Handler:
    match route:
        case InferenceRoute():
            return _inference(state, dialect, route)
        case TokenizerRoute():
            return _tokenizer(state, route)
        case ModelQuery():
            return _query(state, route)
        case ModelCommand():
            return _command(state, route)


async def _decoded(state: AppState, decoder: msgspec.json.Decoder[Any], exchange: Exchange) -> Any:
    """Decode a body, unless it would create too much, or has fields that are refused. Raises NoBodyError or InputError."""
    content = await state.bodies.read(exchange)

    def checked() -> Any:
        check_values(content, state.settings.max_client_batch)
        try:
            return exchange.decode(decoder)
        finally:  # what is refused by name comes before what is missing
            check_refused(exchange.body or b"", decoder.type)

    return await off_loop(len(content), checked)


def _numbers(result: EmbedResult) -> int:
    """How many numbers a result has; a string counts as one per four bytes of it."""
    if isinstance(result.embeddings, np.ndarray):
        return int(result.embeddings.size)
    sizes = ((len(item) // 4 if isinstance(item, str) else sum(map(np.size, item))) for item in result.embeddings)
    return sum(sizes)


def _inference(state: AppState, dialect: Dialect, route: InferenceRoute[Any, Any]) -> Handler:
    decoder = msgspec.json.Decoder(route.body, strict=False)  # "true" and 256.0 are taken for true and 256

    async def handle(exchange: Exchange) -> Response:
        start, settings = time.monotonic(), state.settings
        body = await _decoded(state, decoder, exchange)
        content = exchange.body or b""
        size = len(content)
        wishes = await off_loop(size, lambda: wishes_of(exchange.request, content, exchange.key))
        on_error = wishes.on_error or settings.on_error
        with await state.models.acquire(_model_of(exchange, route, body), exchange.seconds, route.suits) as use:
            use.keep_alive = route.keep_alive(body)
            served, exchange.model = use.served, use.served.spec.name
            futures: list[Future[EmbedResult]] = []

            def submit() -> Sequence[EmbedRequest]:
                made = [_completed(request, exchange, wishes.lane, served.role) for request in route.to_requests(body, served)]
                made = _bounded(made, route, settings, served.spec.width)
                deadline = start + exchange.seconds if exchange.timed else None  # else by the size of the request
                if len(made) > 2 and sum(len(request.texts) for request in made) > settings.interactive_texts:
                    # Many small requests of one body are one large one.
                    made = [replace(request, lane=request.lane or Lane.BULK) for request in made]
                    deadline = deadline or start + settings.bulk_timeout
                futures.extend(use.model.engine.submit(request, deadline) for request in made)
                return made

            try:
                requests = await off_loop(size, submit)
                # Cached results are done at once.
                results = [
                    future.result() if future.done() else await unless_disconnected(exchange.request, asyncio.wrap_future(future))
                    for future in futures
                ]
            finally:
                for future in futures:  # after a failure or a disconnect, the others are not needed
                    future.cancel()
            headers: dict[str, str] = {}
            if results:
                exchange.result = results[-1]
                exchange.texts = sum(len(result.tokens) for result in results)
                exchange.tokens = tokens_used(results)
                whole = together(results)
                headers = {**dialect.headers(whole, requests[-1]), **headers_of(whole, requests[-1], served.spec)}
            if route.vectors and results:
                failed = sum(error is not None for result in results for error in result.errors)
                results = with_errors(results, requests, on_error, served.spec.width)
                headers |= {"x-npu-proxy-failed": str(failed)} if failed else {}
            else:
                for result in results:
                    result.raise_first()
            if exchange.replaced:
                headers["x-npu-proxy-replaced"] = str(exchange.replaced)
            numbers = sum(map(_numbers, results))

            def respond() -> JsonResponse:
                return JsonResponse(route.to_reply(results, body, served), headers=headers, seconds=settings.header_timeout)

            response = await off_loop(max(size, route.bytes_per_number * numbers), respond)
        return state.bodies.hold_answer(response, exchange.owner)

    return handle


def _completed(request: EmbedRequest, exchange: Exchange, lane: Lane | None, role: str | None) -> EmbedRequest:
    """A request with what does not come from its body."""
    chosen = (request.input_type, request.prompt, request.prompt_name, request.instruction)
    return replace(
        request,
        client=exchange.client,
        lane=lane or request.lane,
        input_type=role if all(value is None for value in chosen) else request.input_type,
        expect_fingerprint=exchange.request.headers.get("x-npu-proxy-expect-fingerprint"),
    )


def _bounded(
    requests: Sequence[EmbedRequest], route: InferenceRoute[Any, Any], settings: Settings, width: int
) -> list[EmbedRequest]:
    """The requests of a body, each with a limit of numbers. Raises InputError for too many texts, or AnswerTooLargeError."""
    most = int(settings.max_answer_mb * 1e6 / route.bytes_per_number)
    _check_size(requests, route.texts_per_item * settings.max_client_batch, settings.max_client_batch)
    _check_numbers(requests, width, most)
    return [replace(request, most_numbers=min(most, request.most_numbers or most)) for request in requests]


def _check_size(requests: Sequence[EmbedRequest], limit: int, setting: int) -> None:
    """Raise InputError if a request has more texts than ``max_client_batch`` allows."""
    several = len(requests) > 2  # a query and its documents are counted as the documents
    counts = [len(request.texts) + len(request.chunking.boundaries) for request in requests]
    count = sum(counts) if several else max(counts, default=0)
    if count > limit:
        raise InputError(f"the request has {count} texts; at most {setting} are allowed (`max_client_batch`)")


def _check_numbers(requests: Sequence[EmbedRequest], width: int, most: int) -> None:
    """Raise AnswerTooLargeError if several requests for vectors would together have more numbers than allowed."""
    dense = [request for request in requests if request.output_type is OutputType.DENSE]
    counts = (len(request.texts) + len(request.chunking.boundaries) for request in dense)
    if sum(count * (request.dimensions or width) for count, request in zip(counts, dense, strict=True)) > most:
        raise AnswerTooLargeError(most)


def _tokenizer(state: AppState, route: TokenizerRoute[Any, Any]) -> Handler:
    """Return the handler of a tokenizer route. Every token becomes an object, so the bodies and the concurrency are limited."""
    decoder = msgspec.json.Decoder(route.body, strict=False)

    async def handle(exchange: Exchange) -> Response:
        content = await state.bodies.read(exchange)
        if len(content) > _TOKENIZER_BODY_BYTES:
            message = f"the body has {len(content)} bytes; this route accepts up to {_TOKENIZER_BODY_BYTES}; send less at once"
            raise InputError(message)
        body = await _decoded(state, decoder, exchange)
        with await state.models.acquire(_model_of(exchange, route, body), exchange.seconds, route.suits) as use:
            exchange.model = use.served.spec.name
            try:
                async with asyncio.timeout(exchange.seconds):
                    work = state.tokenizing.submit(lambda: JsonResponse(route.answer(body, use.served)))
                    response = await asyncio.wrap_future(work)
            except TimeoutError:
                raise DeadlineError(f"not done within {exchange.seconds:g} seconds; send less at once") from None
        return state.bodies.hold_answer(response, exchange.owner)

    return handle


def _query(state: AppState, route: ModelQuery[Any]) -> Handler:
    async def handle(exchange: Exchange) -> Response:
        listing = ServerListing(state.models, asyncio.get_running_loop(), only=exchange.named)
        name = exchange.request.path_params.get("id", "").rstrip("/")
        return JsonResponse(await asyncio.to_thread(route.answer, listing, name))

    return handle


def _command(state: AppState, route: ModelCommand[Any, Any]) -> Handler:
    decoder = msgspec.json.Decoder(route.body, strict=False)

    async def handle(exchange: Exchange) -> Response:
        body = await _decoded(state, decoder, exchange)
        listing = ServerListing(state.models, asyncio.get_running_loop(), only=exchange.named)
        answer = await state.models.in_thread(route.answer, body, listing)
        if isinstance(answer, Iterator):
            return StreamingResponse(map(_line, answer), media_type="application/x-ndjson")
        return JsonResponse(answer)

    return handle


def _line(item: Any) -> bytes:
    return msgspec.json.encode(item) + b"\n"


def _guarded(state: AppState, dialect: Dialect, path: str, handle: Handler) -> Callable[[Request], Awaitable[Response]]:
    """Wrap a handler: API key, request id, metrics, log, trace, and every error in the API's own form."""

    async def guarded(request: Request) -> Response:
        exchange = Exchange(request, request_id(request))
        response: Response | None = None
        try:
            exchange.identify(identify(state.keys, request))
            seconds = timeout_of(request)
            exchange.timed, exchange.seconds = seconds is not None, seconds or state.settings.timeout
            response = await handle(exchange)
        except NpuProxyError as error:
            exchange.error = error
        except ClientDisconnect:
            exchange.error = ClientGoneError("the client has disconnected")  # for the log and the metrics
        except Exception:  # a bug; the client does not see the details
            _log.exception("%s: unexpected error in request %s", path, exchange.id)
            exchange.error = NpuProxyError("internal error; see the server's log for details")
        finally:
            state.bodies.release(exchange)
        if response is None:
            api, failure = exchange.dialect or dialect, exchange.error or NpuProxyError("no response")
            status = api.status_of(failure)
            response = JsonResponse(api.to_error(failure, status), status, headers=retry_headers(failure))
        response.headers["x-request-id"] = exchange.id
        seconds = time.perf_counter() - exchange.start
        state.metrics.answered(path, response.status_code, seconds, exchange)
        log_access(exchange, response.status_code, seconds)
        if state.tracer is not None:
            state.tracer.record(path, exchange, response.status_code, seconds)
        return response

    return guarded


def _missing(state: AppState, owners: dict[str, Dialect]) -> Callable[[Request, Exception], Awaitable[Response]]:
    """Return a handler for 404 and 405, in the form of the API that the path belongs to or resembles."""

    async def handle(request: Request, error: Exception) -> Response:
        path = request.url.path.rstrip("/") or "/"
        owner = owners.get(path, ollama.DIALECT if path.startswith("/api/") else openai.DIALECT)
        failure: NpuProxyError = RouteNotFoundError("there is no such route; /docs lists all routes")
        if getattr(error, "status_code", 404) == 405:
            failure = MethodNotAllowedError(f"this route does not allow {request.method}")
        status = owner.status_of(failure)
        exchange = Exchange(request, request_id(request), error=failure)
        state.metrics.answered("other", status, 0.0, exchange)
        log_access(exchange, status, 0.0)
        headers = {**dict(getattr(error, "headers", None) or {}), "x-request-id": exchange.id}
        return JsonResponse(owner.to_error(failure, status), status, headers=headers)

    return handle
