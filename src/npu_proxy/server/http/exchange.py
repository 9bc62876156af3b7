"""One request and its response as bytes: body limits, JSON, deadlines, disconnects, headers, large responses."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np
from starlette.requests import Request

from npu_proxy.engine.encode_options import has_prompt
from npu_proxy.engine.finish import cast
from npu_proxy.engine.validation import cuts_untrained
from npu_proxy.errors import DeadlineError, DeviceError, InputError, NpuProxyError, OverloadedError, UnavailableError
from npu_proxy.server.apis.common import header_text
from npu_proxy.server.apis.contract import BodyFields, Dialect
from npu_proxy.server.errors import (
    BodyTooLargeError,
    ClientGoneError,
    UnauthorizedError,
    UnsupportedEncodingError,
)
from npu_proxy.server.http.budgets import SMALL, MemoryBudget
from npu_proxy.server.http.clients import ApiKey
from npu_proxy.server.http.decoding import as_utf8, decode, decompressed, with_replacements
from npu_proxy.server.http.paths import MODEL
from npu_proxy.server.http.responses import JsonResponse
from npu_proxy.settings import Settings
from npu_proxy.spec import ModelSpec
from npu_proxy.system import give_back_memory
from npu_proxy.types import NO_CLIENT, Client, EmbedRequest, EmbedResult

Made = TypeVar("Made")

_HEADER = "x-npu-proxy-"
_LARGE, _GIVE_BACK_SECONDS = 256 * 1024, 1.0
"""Bytes of a body or an answer after which memory is given back, and how much later."""
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
    replaced: int = 0
    """Number of characters of the body that were no Unicode, and are U+FFFD now."""
    timed: bool = False
    """Whether the request sets a time limit of its own."""

    @property
    def named(self) -> str | None:
        """The model that the path names, if any."""
        return self.request.scope.get(MODEL) or None

    def decode(self, decoder: msgspec.json.Decoder[Made]) -> Made:
        """Decode the body, in which what is no Unicode becomes U+FFFD. Raises NoBodyError, or InputError naming the field."""
        body = self.body or b""
        try:
            return decode(decoder, body)
        except InputError:
            repaired, count = with_replacements(body)
            if not count and repaired == body:
                raise
        self.body, self.replaced = repaired, count
        return decode(decoder, repaired)

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
        # A client may always have one body and one answer of the largest size.
        self._budget.limit = 1_000_000 * max(settings.max_bodies_mb, 2 * settings.max_body_mb)
        self.answers.limit = 1_000_000 * max(settings.max_bodies_mb, 2 * settings.max_answer_mb)
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
                    body = await self._decompressed(exchange, await self._read(exchange))
                    content_type = exchange.request.headers.get("content-type", "")
                    exchange.body = self._held(exchange, await off_loop(len(body), lambda: as_utf8(body, content_type)))
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
        if size > SMALL:
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
            small = exchange.held + len(chunk) <= SMALL
            self._budget.hold(exchange.owner, len(chunk), reserve=2.0 if small else 1.0)
            exchange.held += len(chunk)
            chunks.append(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def _decompressed(self, exchange: Exchange, body: bytes) -> bytes:
        """Return a body without its Content-Encoding. Raises UnsupportedEncodingError, BodyTooLargeError or InputError."""
        encoding = exchange.request.headers.get("content-encoding", "").strip().lower()
        if encoding in ("", "identity"):
            return body
        if encoding not in ("gzip", "x-gzip", "deflate"):
            raise UnsupportedEncodingError(f"the Content-Encoding `{encoding[:40]}` is not supported; send gzip, deflate or none")
        try:
            whole = await off_loop(self._each, lambda: decompressed(body, self._each))
        except zlib.error as error:
            raise InputError(f"the body is not valid {encoding}: {error}") from None
        if whole is None:
            raise self._too_large()
        return self._held(exchange, whole)

    def _held(self, exchange: Exchange, body: bytes) -> bytes:
        """Count a body that has become larger. Raises BodyTooLargeError, OverloadedError or ClientLimitError."""
        if len(body) > self._each:
            raise self._too_large()
        if (growth := len(body) - exchange.held) > 0:
            self._budget.hold(exchange.owner, growth)
            exchange.held += growth
        return body

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(
            f"the body is larger than {self._each / 1e6:g} MB; send fewer texts at once, or raise `max_body_mb`"
        )


async def off_loop(size: int, call: Callable[[], Made]) -> Made:
    """Return what ``call`` returns. If it handles more than a few bytes (``size``), it runs in a thread, not in the event loop."""
    if size <= SMALL:
        return call()
    made: list[Made] = []  # not the future's result: futures refer to themselves, and would keep it for a while
    await asyncio.to_thread(lambda: made.append(call()))
    return made.pop()


def fields_of(exchange: Exchange) -> BodyFields:
    """Return the fields that distinguish the APIs; empty if the body is not an object, which is reported later."""
    try:
        return exchange.decode(_FIELDS)
    except InputError:
        return BodyFields()


def timeout_of(request: Request) -> float | None:
    """Return the seconds in header X-Request-Timeout or query parameter `timeout`, or None. Raises InputError."""
    given = request.headers.get("x-request-timeout")
    if not given and b"timeout" in request.scope["query_string"]:
        given = request.query_params.get("timeout")
    if not given:
        return None
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


def with_errors(
    results: Sequence[EmbedResult], requests: Sequence[EmbedRequest], how: Literal["fail", "null", "zero"], width: int
) -> Sequence[EmbedResult]:
    """Return results of vectors as ``how`` says (the setting `on_error`): the vectors of failed texts are zero, in their type.

    For `null` their errors stay, from which the APIs make null. Raises the first error for `fail`, or if it is not a text's fault,
    or one of texts that were read together.
    """
    kept: list[EmbedResult] = []
    for result, request in zip(results, requests, strict=True):
        wrong = [error is not None for error in result.errors]
        other = next((error for error in result.errors if error is not None and not isinstance(error, InputError)), None)
        if how == "fail" or request.chunking.spans:
            result.raise_first()
        if other is not None:
            raise other
        if any(wrong):
            errors = [None] * len(wrong) if how == "zero" else result.errors
            kept.append(replace(result, embeddings=_zeroed(result.embeddings, wrong, request, width), errors=errors))
        else:
            kept.append(result)
    return kept


def _zeroed(embeddings: Any, wrong: Sequence[bool], request: EmbedRequest, width: int) -> Any:
    """Vectors in which the failed ones are zero vectors in the type that the request asks for."""
    (zero,) = cast(np.zeros((1, request.dimensions or width), np.float32), request.dtype)
    rows = [zero if failed else vector for vector, failed in zip(embeddings, wrong, strict=True)]
    return np.stack(rows) if isinstance(embeddings, np.ndarray) else rows


def together(results: Sequence[EmbedResult]) -> EmbedResult:
    """Return the last of several results, with the counts of all of them."""
    if len(results) == 1:
        return results[0]
    return replace(
        results[-1],
        tokens=[count for result in results for count in result.tokens],
        truncated=[cut for result in results for cut in result.truncated],
        cached=sum(result.cached for result in results),
    )


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
