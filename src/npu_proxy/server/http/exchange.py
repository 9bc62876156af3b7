"""One request and its response as bytes: body limits, JSON, deadlines, disconnects, headers, large responses."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from npu_proxy.engine.encode_options import has_prompt
from npu_proxy.engine.validation import cuts_untrained
from npu_proxy.errors import DeadlineError, DeviceError, InputError, NpuProxyError, OverloadedError, UnavailableError
from npu_proxy.server.apis.common import header_text
from npu_proxy.server.apis.contract import BodyFields, Dialect
from npu_proxy.server.errors import BodyTooLargeError, ClientGoneError, NoBodyError, UnauthorizedError
from npu_proxy.server.http.budgets import MemoryBudget
from npu_proxy.server.http.clients import ApiKey
from npu_proxy.settings import Settings
from npu_proxy.spec import ModelSpec
from npu_proxy.system import give_back_memory
from npu_proxy.types import NO_CLIENT, Client, EmbedRequest, EmbedResult

Made = TypeVar("Made")

_HEADER = "x-npu-proxy-"
_SMALL = 64 * 1024
"""Bytes up to which a body or an answer is small: it is handled in the event loop, and has a reserve of memory."""
_LARGE, _GIVE_BACK_SECONDS = 256 * 1024, 1.0
"""Bytes of a body or an answer after which memory is given back, and how much later."""
_PIECE = 256 * 1024
"""Bytes of a response sent at once; the next piece is sent when the client has read most of the previous one."""
ABORT = "npu_proxy.abort"
"""Key in a scope of the function that closes the connection at once (protocol.py)."""
_LEAST_RATE = 100_000
"""Average bytes per second at which a client must read a large response."""
_FIELDS = msgspec.json.Decoder(BodyFields)


@dataclass(slots=True)
class Exchange:
    """A request and the data for its log line, its trace and its metrics."""

    request: Request
    id: str
    start: float = field(default_factory=time.perf_counter)
    started_at: int = field(default_factory=time.time_ns)
    seconds: float = 0.0
    """Seconds that the request may take."""
    body: bytes | None = None
    held: int = 0
    """Bytes of the body, which count towards `max_bodies_mb` until ``RequestBodies.release``."""
    model: str = ""
    result: EmbedResult | None = None
    """The result of the last of its requests."""
    texts: int = 0
    """Number of texts of all of its requests that have a result."""
    tokens: int = 0
    error: NpuProxyError | None = None
    dialect: Dialect | None = None
    """The API that the body belongs to, on a path that several APIs share."""
    client: Client = NO_CLIENT
    key: ApiKey | None = None

    def identify(self, sender: ApiKey | Client) -> None:
        """Note who sent the request."""
        self.client, self.key = (sender.client, sender) if isinstance(sender, ApiKey) else (sender, None)

    @property
    def owner(self) -> str:
        """Who holds the memory of its body and its answer: a key, or an address, since a user agent can be changed at will."""
        if self.key is not None:
            return self.client.name
        return self.request.client.host if self.request.client else ""


class RequestBodies:
    """Reads request bodies and limits the memory they take together, however slowly clients send them."""

    def __init__(self, settings: Settings) -> None:
        self._budget = MemoryBudget("requests", "max_bodies_mb", 0)
        self.answers: MemoryBudget = MemoryBudget("answers", "max_bodies_mb", 0)
        """The answers, which have as much again, so that those that nobody reads leave room for bodies."""
        self._giving_back: asyncio.TimerHandle | None = None
        self.limit(settings)

    @property
    def held(self) -> int:
        """Bytes of all bodies."""
        return self._budget.held

    def limit(self, settings: Settings) -> None:
        """Use the limits of these settings from now on."""
        self._each = settings.max_body_mb * 1_000_000
        self._budget.limit = self.answers.limit = settings.max_bodies_mb * 1_000_000
        self._seconds = settings.timeout

    async def read(self, exchange: Exchange) -> bytes:
        """Return the whole body, read once; ``release`` frees it. Raises BodyTooLargeError, OverloadedError, DeadlineError."""
        if exchange.body is None:
            seconds = min(exchange.seconds, self._seconds)  # a long request timeout gives no more time for sending
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
        """Free the body after its request has been handled; a while later, give the memory of large ones back."""
        self._give_back_soon(exchange.held)
        self._budget.release(exchange.owner, exchange.held)
        exchange.held, exchange.body = 0, None

    def hold_answer(self, response: JsonResponse, owner: str) -> JsonResponse:
        """Let a large answer count towards the budget until it is sent. Raises OverloadedError, ClientLimitError."""
        size = len(response.body)
        if size > _SMALL:
            self.answers.hold(owner, size)
            response.on_sent = partial(self._answered, owner, size)
        return response

    def _answered(self, owner: str, size: int) -> None:
        self._give_back_soon(size)
        self.answers.release(owner, size)

    def _give_back_soon(self, size: int) -> None:
        """Give memory back a while after something large was released."""
        if size > _LARGE and self._giving_back is None:
            loop = asyncio.get_running_loop()
            self._giving_back = loop.call_later(_GIVE_BACK_SECONDS, lambda: loop.run_in_executor(None, self._give_back))

    def _give_back(self) -> None:
        self._giving_back = None
        give_back_memory()

    async def _read(self, exchange: Exchange) -> bytes:
        chunks: list[bytes] = []
        async for chunk in exchange.request.stream():
            if exchange.held + len(chunk) > self._each:
                raise self._too_large()
            # Small bodies have a reserve, so that a few slow senders do not lock out everyone.
            small = exchange.held + len(chunk) <= _SMALL
            self._budget.hold(exchange.owner, len(chunk), reserve=2.0 if small else 1.0)
            exchange.held += len(chunk)
            chunks.append(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(
            f"the body is larger than {self._each / 1e6:g} MB; send fewer texts at once, or raise `max_body_mb`"
        )


def decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    """Decode a body to the decoder's type. Raises NoBodyError, or InputError naming the field."""
    if not body:
        raise NoBodyError("the request has no body; send a JSON object")
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$.")
        raise InputError(f"{problem} (at `{path.rstrip('`')}`)" if path else problem, param=path.rstrip("`") or None) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"the body is not valid JSON: {error}") from error


async def off_loop(size: int, call: Callable[[], Made]) -> Made:
    """Return what ``call`` returns. If it handles more than a few bytes (``size``), it runs in a thread, not in the event loop."""
    if size <= _SMALL:
        return call()
    made: list[Made] = []  # not the future's result: futures refer to themselves, and would keep it for a while
    await asyncio.to_thread(lambda: made.append(call()))
    return made.pop()


def fields_of(body: bytes) -> BodyFields:
    """Return the fields that distinguish the APIs; empty if the body is not an object, which ``decode`` reports later."""
    try:
        return _FIELDS.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return BodyFields()


def timeout_of(request: Request, default: float) -> float:
    """Return the seconds in header X-Request-Timeout or query parameter `timeout`, or ``default``. Raises InputError."""
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


async def unless_disconnected(request: Request, work: Awaitable[EmbedResult]) -> EmbedResult:
    """Await the result. If the client disconnects first, cancel the work to save inference, and raise ClientGoneError."""
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError("the client has disconnected")
        return await task
    finally:
        disconnect.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def to_json(content: object) -> bytes:
    """Encode a reply. Its arrays, and the items of lists, are encoded one by one, so that other threads get their turn."""
    if isinstance(content, list):
        return b"[" + b",".join(map(to_json, cast("list[object]", content))) + b"]"
    return _ENCODER.encode(content)


def _array_json(value: object) -> object:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"a reply contains a {type(value).__name__}, which is no JSON value")
    return msgspec.Raw(msgspec.json.encode(value.tolist())) if value.ndim == 1 else list(value)


_ENCODER = msgspec.json.Encoder(enc_hook=_array_json)


class JsonResponse(Response):
    """A JSON response. Large content is sent in pieces, so that only one piece is buffered for a client that does not read.

    seconds: time limit per piece; a client that is too slow is disconnected.
    """

    media_type = "application/json"

    def __init__(
        self,
        content: object,
        status: int = 200,
        *,
        headers: dict[str, str] | None = None,
        seconds: float = 30.0,
    ) -> None:
        super().__init__(to_json(content), status, headers)
        self._seconds = seconds
        self.on_sent: Callable[[], None] = lambda: None
        """Called when large content was sent, or the client is gone."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        if len(self.body) <= _SMALL:
            await super().__call__(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._seconds + len(self.body) / _LEAST_RATE):
                await self._in_pieces(send)
        except TimeoutError:
            scope.get(ABORT, lambda: None)()
            await asyncio.sleep(0)  # let the connection notice
        finally:
            self.on_sent()

    async def _in_pieces(self, send: Send) -> None:
        body = bytes(self.body)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, len(body), _PIECE):
            async with asyncio.timeout(self._seconds):
                piece, more = body[start : start + _PIECE], start + _PIECE < len(body)
                await send({"type": "http.response.body", "body": piece, "more_body": more})


def headers_of(result: EmbedResult, request: EmbedRequest, spec: ModelSpec) -> dict[str, str]:
    """Return headers with the device, the model's fingerprint, cache hits, the fallback, and the number of truncated texts.

    Also what the request asked for without effect: an input type without an instruction, dimensions without training for them.
    """
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
    if request.input_type is not None and not has_prompt(spec, request.input_type):
        headers[f"{_HEADER}input-type"] = f"{header_text(request.input_type)}; this model has no instruction for it"
    if cuts_untrained(spec, request):
        headers[f"{_HEADER}dimensions"] = f"{request.dimensions}; this model was not trained for fewer dimensions than {spec.width}"
    return headers


def retry_headers(error: NpuProxyError) -> dict[str, str]:
    """Return the headers that tell a client how to proceed after an error."""
    if isinstance(error, UnauthorizedError):
        return {"www-authenticate": "Bearer"}
    if isinstance(error, OverloadedError):
        return {"retry-after": str(max(1, round(error.retry_after)))}
    return {"retry-after": "1"} if isinstance(error, UnavailableError | DeviceError) else {}


def request_id(request: Request) -> str:
    """Return the client's own id if it is printable ASCII and short, otherwise a new one."""
    given = request.headers.get("x-request-id", "")
    return given if 0 < len(given) <= 128 and given.isprintable() and given.isascii() else f"{_PROCESS}{next(_NUMBERS):08x}"


_PROCESS = uuid.uuid4().hex[:24]
_NUMBERS = itertools.count()
"""A request id is a random prefix per process and a number: as unique as a random id, and cheaper."""
