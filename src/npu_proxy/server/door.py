"""Before the routes: the Host header, against web pages that rebind a name of theirs to this machine, and the URL prefix."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from npu_proxy.server.auth import is_allowed


class Door:
    """Lets requests through whose Host is one of ``hosts`` (`*` is any), without the prefix that a proxy put before the path."""

    def __init__(self, app: ASGIApp, *, hosts: Sequence[str], origins: Sequence[str], prefix: str) -> None:
        self._app = app
        self._origins = origins
        self._hosts = None if "*" in hosts else tuple(host.lower() for host in hosts)
        self._prefix = "/" + prefix.strip("/") if prefix.strip("/") else ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """421 for a foreign Host, 404 for a path without the prefix, else what the application says."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        host, origin = "", ""
        for name, value in scope["headers"]:
            if name == b"host":
                host = f"{host},{value.decode('latin-1')}" if host else value.decode("latin-1")  # two are none that is known
            elif name == b"origin":
                origin = value.decode("latin-1")
        if self._hosts is not None and not is_allowed(host, self._hosts):
            await _refusal("this server is not asked by that Host; see `allowed_hosts`", 421)(scope, receive, send)
            return
        if origin and not self._may_ask(origin, host):
            await _refusal("pages of that origin may not ask this server; see `cors_allow_origin`", 403)(scope, receive, send)
            return
        if self._prefix:
            path: str = scope["path"]
            if path != self._prefix and not path.startswith(self._prefix + "/"):
                await _refusal(f"every path here begins with {self._prefix}", 404)(scope, receive, send)
                return
            scope = {**scope, "path": path[len(self._prefix) :] or "/", "root_path": ""}
        await self._app(scope, receive, send)

    def _may_ask(self, origin: str, host: str) -> bool:
        """Whether a web page of that origin may: of this server, of this machine while only it is asked, or of the setting.

        A page can send a request without reading the answer, and pulling a model needs no answer. Programs have no origin, or
        one that is no web address.
        """
        if origin in self._origins or "*" in self._origins:
            return True
        scheme, _, site = origin.partition("://")
        if scheme not in ("http", "https"):
            return origin != "null"
        return site == host or (self._hosts is not None and is_allowed(site, self._hosts))


class Exact:
    """Routes whose path has no parameters are found in a table; for everything else ``rest`` is asked.

    Starlette tries its routes one after another, which for the routes of six dialects costs more than a cached answer.
    """

    def __init__(self, routes: Sequence[Route], rest: ASGIApp) -> None:
        for route in routes:  # a pattern's `$` also matches before a line feed at the end
            route.path_regex = re.compile(route.path_regex.pattern.removesuffix("$") + r"\Z")
        exact = (route for route in routes if "{" not in route.path)
        self._table = {(method, route.path): route.endpoint for route in exact for method in route.methods or ()}
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand over to the route, or to the rest."""
        endpoint = self._table.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if endpoint is None:
            await self._rest(scope, receive, send)
            return
        response: Response = await endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


def _refusal(words: str, status: int) -> Response:
    """An error that the clients of most dialects can read."""
    shown = {"error": {"message": words, "type": "invalid_request_error", "param": None, "code": None}, "message": words}
    return Response(msgspec.json.encode(shown), status, media_type="application/json")
