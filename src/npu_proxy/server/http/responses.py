"""Responses: JSON whose encoding gives other threads their turn, and large content in pieces."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import msgspec
import numpy as np
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from npu_proxy.server.http.budgets import SMALL

_PIECE = 256 * 1024
"""Bytes of a response sent at once; the next piece is sent when the client has read most of the previous one."""
ABORT = "npu_proxy.abort"
"""Key in a scope of the function that closes the connection at once (protocol.py)."""
_LEAST_RATE = 100_000
"""Average bytes per second at which a client must read a large response."""


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
        if len(self.body) <= SMALL:
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
