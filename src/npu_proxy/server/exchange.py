"""One request and its answer as bytes: a body within its limits, JSON, deadlines, clients that go, headers, large answers."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from npu_proxy.errors import DeadlineError, DeviceError, InputError, NpuProxyError, OverloadedError, UnavailableError
from npu_proxy.server.auth import UnauthorizedError
from npu_proxy.server.dialect import Dialect, Fields, NoBodyError, header_text
from npu_proxy.settings import Settings
from npu_proxy.types import EmbedResult

_HEADER = "x-npu-proxy-"
_SMALL = 64 * 1024
"""Bytes of a body that hardly count."""
_PIECE = 256 * 1024
"""Bytes of an answer that are sent at once; the next piece waits until the client has taken most of it."""
ABORT = "npu_proxy.abort"
"""Where a scope has the function that ends its connection at once (server/protocol.py)."""
_LEAST_RATE = 100_000
"""Bytes a second that a client must take of a large answer on the whole."""
_FIELDS = msgspec.json.Decoder(Fields)


class TooLargeError(InputError):
    """The body is larger than the setting `max_body_mb`."""

    kind = "too_large"


class GoneError(NpuProxyError):
    """The client has hung up; what it asked for is dropped."""

    kind = "gone"


@dataclass(slots=True)
class Exchange:
    """What is known of a request, for its log line, its trace and its metrics."""

    request: Request
    id: str
    start: float = field(default_factory=time.perf_counter)
    started_at: int = field(default_factory=time.time_ns)
    seconds: float = 0.0
    """How long it may take."""
    body: bytes | None = None
    held: int = 0
    """Bytes of the body, which count against `max_bodies_mb` until the answer."""
    model: str = ""
    result: EmbedResult | None = None
    error: NpuProxyError | None = None
    dialect: Dialect | None = None
    """Whose the body was, on a path of several dialects."""


class Bodies:
    """Reads bodies; together they take a limited amount of memory, however slowly clients send them."""

    def __init__(self, settings: Settings) -> None:
        self._each = settings.max_body_mb * 1_000_000
        self._all = settings.max_bodies_mb * 1_000_000
        self._seconds = settings.timeout
        self.held = 0

    async def read(self, exchange: Exchange) -> bytes:
        """The whole body, read once; ``release`` gives its room back. Raises TooLargeError, OverloadedError, DeadlineError."""
        if exchange.body is None:
            seconds = min(exchange.seconds, self._seconds)  # sending has no more time than usual, however patient the client is
            declared = exchange.request.headers.get("content-length", "")
            if declared.isdigit() and int(declared[:20]) > self._each:
                raise self._too_large()
            try:
                async with asyncio.timeout(seconds):
                    exchange.body = await self._read(exchange)
            except TimeoutError:
                raise DeadlineError(f"the request's body did not arrive within {seconds:g} seconds") from None
        return exchange.body

    def release(self, exchange: Exchange) -> None:
        """The request is answered."""
        self.held -= exchange.held
        exchange.held, exchange.body = 0, None

    async def _read(self, exchange: Exchange) -> bytes:
        chunks: list[bytes] = []
        async for chunk in exchange.request.stream():
            exchange.held += len(chunk)
            self.held += len(chunk)
            if exchange.held > self._each:
                raise self._too_large()
            # What is small has some room of its own, so that a few who send slowly do not lock out all.
            if self.held > (self._all if exchange.held > _SMALL else 2 * self._all):
                raise OverloadedError("too many large requests at once (`max_bodies_mb`); try again later")
            chunks.append(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _too_large(self) -> TooLargeError:
        return TooLargeError(f"the body is larger than {self._each / 1e6:g} MB; send fewer texts at once, or raise `max_body_mb`")


def decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    """A body as its type. Raises NoBodyError, InputError naming the field."""
    if not body:
        raise NoBodyError("the request has no body; send a JSON object")
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$.")
        raise InputError(f"{what} (at `{where.rstrip('`')}`)" if where else what, param=where.rstrip("`") or None) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"the body is no valid JSON: {error}") from error


def fields_of(body: bytes) -> Fields:
    """The fields that tell dialects apart; none where it is no object, which decoding then says."""
    try:
        return _FIELDS.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Fields()


def timeout_of(request: Request, default: float) -> float:
    """Seconds from header X-Request-Timeout or query `timeout`. Raises InputError."""
    given = request.headers.get("x-request-timeout")
    if not given and b"timeout" in request.scope["query_string"]:
        given = request.query_params.get("timeout")
    if not given:
        return default
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= 3600:
        raise InputError(f"timeout must be a number of seconds above 0 and up to 3600, not `{given[:40]}`", param="timeout")
    return seconds


async def unless_gone(request: Request, work: Awaitable[EmbedResult]) -> EmbedResult:
    """The result, unless the client hangs up first: then the work is cancelled before it costs inference."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GoneError("the client has gone")
        return await task
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Answer(Response):
    """JSON. A large one goes in pieces, each within the time limit, so that a client that does not read holds one piece.

    bodies: counts it as held until it is sent. A client that is too slow is cut off.
    """

    media_type = "application/json"

    def __init__(
        self,
        content: object,
        status: int = 200,
        *,
        headers: dict[str, str] | None = None,
        seconds: float = 30.0,
        bodies: Bodies | None = None,
    ) -> None:
        super().__init__(msgspec.json.encode(content), status, headers)
        self._seconds = seconds
        self._bodies = bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        if len(self.body) <= _PIECE:
            await super().__call__(scope, receive, send)
            return
        if self._bodies is not None:
            self._bodies.held += len(self.body)
        try:
            async with asyncio.timeout(self._seconds + len(self.body) / _LEAST_RATE):
                await self._in_pieces(send)
        except TimeoutError:
            scope.get(ABORT, lambda: None)()
            await asyncio.sleep(0)  # until the connection has heard of it
        finally:
            if self._bodies is not None:
                self._bodies.held -= len(self.body)

    async def _in_pieces(self, send: Send) -> None:
        body = bytes(self.body)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, len(body), _PIECE):
            async with asyncio.timeout(self._seconds):
                piece, more = body[start : start + _PIECE], start + _PIECE < len(body)
                await send({"type": "http.response.body", "body": piece, "more_body": more})


def headers_of(result: EmbedResult) -> dict[str, str]:
    """Who answered, with which model, from where, and what was cut."""
    count = len(result.tokens)
    headers = {
        f"{_HEADER}device": header_text(result.device),
        f"{_HEADER}fingerprint": result.fingerprint,
        f"{_HEADER}cache": "hit" if result.cached == count else f"{result.cached}/{count}" if result.cached else "miss",
    }
    if result.fallback:
        headers[f"{_HEADER}fallback"] = header_text(result.fallback)
    if any(result.truncated):
        headers[f"{_HEADER}truncated"] = str(sum(result.truncated))
    return headers


def advice(error: NpuProxyError) -> dict[str, str]:
    """Headers that tell a client what to do next."""
    if isinstance(error, UnauthorizedError):
        return {"www-authenticate": "Bearer"}
    if isinstance(error, OverloadedError):
        return {"retry-after": str(max(1, round(error.retry_after)))}
    return {"retry-after": "1"} if isinstance(error, UnavailableError | DeviceError) else {}


def request_id(request: Request) -> str:
    """The client's own id where it is printable and short, else a new one."""
    given = request.headers.get("x-request-id", "")
    return given if 0 < len(given) <= 128 and given.isprintable() and given.isascii() else f"{_PROCESS}{next(_NUMBERS):08x}"


_PROCESS = uuid.uuid4().hex[:24]
_NUMBERS = itertools.count()
"""An id of a request is the process's and a number, as unique as a random one and cheaper."""
