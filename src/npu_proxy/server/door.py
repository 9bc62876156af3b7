"""Before the routes: the Host header, against web pages that rebind a name of theirs to this machine, and the URL prefix."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from npu_proxy.server.auth import is_allowed


class Door:
    """Lets requests through whose Host is one of ``hosts`` (`*` is any), without the prefix that a proxy put before the path."""

    def __init__(self, app: ASGIApp, *, hosts: Sequence[str], prefix: str) -> None:
        self._app = app
        self._hosts = None if "*" in hosts else tuple(host.lower() for host in hosts)
        self._prefix = "/" + prefix.strip("/") if prefix.strip("/") else ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """421 for a foreign Host, 404 for a path without the prefix, else what the application says."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._hosts is not None:
            host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
            if not is_allowed(host, self._hosts):
                await _refusal("this server is not asked by that Host; see `allowed_hosts`", 421)(scope, receive, send)
                return
        if self._prefix:
            path: str = scope["path"]
            if path != self._prefix and not path.startswith(self._prefix + "/"):
                await _refusal(f"every path here begins with {self._prefix}", 404)(scope, receive, send)
                return
            scope = {**scope, "path": path[len(self._prefix) :] or "/", "root_path": ""}
        await self._app(scope, receive, send)


def _refusal(words: str, status: int) -> Response:
    """An error that the clients of most dialects can read."""
    shown = {"error": {"message": words, "type": "invalid_request_error", "param": None, "code": None}, "message": words}
    return Response(msgspec.json.encode(shown), status, media_type="application/json")
