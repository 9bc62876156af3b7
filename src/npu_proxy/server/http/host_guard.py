"""Checks before routing: the URL prefix, and Host and Origin, against web pages that rebind a name to this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from npu_proxy.server.http.auth import is_allowed


class HostGuard:
    """Passes on requests whose Host is in ``hosts`` (`*` allows any), and strips the prefix that a proxy added to the path."""

    def __init__(self, app: ASGIApp, *, hosts: Sequence[str], origins: Sequence[str], prefix: str) -> None:
        self._app = app
        self._origins = origins
        self._hosts = None if "*" in hosts else tuple(host.lower() for host in hosts)
        self._prefix = "/" + prefix.strip("/") if prefix.strip("/") else ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond 421 to a wrong Host, 403 to a wrong Origin, 404 to a path without the prefix; otherwise call the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        host, origin = "", ""
        for name, value in scope["headers"]:
            if name == b"host":
                host = f"{host},{value.decode('latin-1')}" if host else value.decode("latin-1")  # two headers never match
            elif name == b"origin":
                origin = value.decode("latin-1")
        if self._hosts is not None and not is_allowed(host, self._hosts):
            await _refusal("this server does not accept that Host; see `allowed_hosts`", 421)(scope, receive, send)
            return
        if origin and not self._is_allowed_origin(origin, host):
            await _refusal("web pages of that origin may not use this server; see `cors_allow_origin`", 403)(scope, receive, send)
            return
        if self._prefix:
            path: str = scope["path"]
            if path != self._prefix and not path.startswith(self._prefix + "/"):
                await _refusal(f"every path on this server begins with {self._prefix}", 404)(scope, receive, send)
                return
            scope = {**scope, "path": path[len(self._prefix) :] or "/", "root_path": ""}
        await self._app(scope, receive, send)

    def _is_allowed_origin(self, origin: str, host: str) -> bool:
        """Whether a web page of that origin may send requests.

        Allows the origins in the setting, the server's own origin, and origins on an allowed host unless every host is allowed.

        A page can send a request without being able to read the response, and downloading a model needs no response. Programs
        send no origin, or one that is not a web address.
        """
        if origin in self._origins or "*" in self._origins:
            return True
        scheme, _, site = origin.partition("://")
        if scheme not in ("http", "https"):
            return origin != "null"
        return site == host or (self._hosts is not None and is_allowed(site, self._hosts))


class ExactRouter:
    """Looks up routes without path parameters in a table, and passes everything else to ``rest``.

    Starlette tries its routes one after another, which takes longer for all these routes than returning a cached result.
    """

    def __init__(self, routes: Sequence[Route], rest: ASGIApp) -> None:
        for route in routes:  # `$` would also match before a trailing line feed
            route.path_regex = re.compile(route.path_regex.pattern.removesuffix("$") + r"\Z")
        exact = (route for route in routes if "{" not in route.path)
        self._table = {(method, route.path): route.endpoint for route in exact for method in route.methods or ()}
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the route in the table, or else ``rest``."""
        endpoint = self._table.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if endpoint is None:
            await self._rest(scope, receive, send)
            return
        response: Response = await endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


def _refusal(message: str, status: int) -> Response:
    """Return an error response that the clients of most APIs can read."""
    content = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}, "message": message}
    return Response(msgspec.json.encode(content), status, media_type="application/json")
