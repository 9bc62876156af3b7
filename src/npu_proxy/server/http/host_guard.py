"""Checks before routing: the URL prefix, and Host and Origin, against web pages that rebind a name to this machine."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from urllib.parse import quote

import msgspec
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from npu_proxy.server.http.hosts import HostNames, is_local_origin, matches_origin
from npu_proxy.server.http.paths import DIALECT, MODEL, Meant, meant

_LONGEST_PATH = 1000
"""Characters of a path that may stand for another."""


class HostGuard:
    """Passes on requests whose Host is in ``hosts``, and strips the prefix that a proxy added to the path.

    origins: the setting `cors_allow_origin`. probed: paths that are answered under any Host, since the programs that probe them use
    whatever name or address they know.
    """

    def __init__(
        self, app: ASGIApp, *, hosts: HostNames, origins: Sequence[str], prefix: str, probed: Collection[str] = ()
    ) -> None:
        self._app = app
        self._for_pages = _Cors(app, origins)
        self._origins = origins
        self._hosts = hosts
        self._probed = frozenset(probed)
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
        path: str = scope["path"]
        if self._prefix:
            if path != self._prefix and not path.startswith(self._prefix + "/"):
                await _refusal(f"every path on this server begins with {self._prefix}", 404)(scope, receive, send)
                return
            path = path[len(self._prefix) :] or "/"
            raw: bytes = scope.get("raw_path") or scope["path"].encode()
            scope = {**scope, "path": path, "raw_path": raw[len(self._prefix) :] or b"/", "root_path": ""}
        if not self._hosts.admits(host) and path.rstrip("/") not in self._probed:
            await _refusal("this server does not accept that Host; see `allowed_hosts`", 421)(scope, receive, send)
            return
        if origin and not self._is_allowed_origin(origin, host):
            await _refusal("web pages of that origin may not use this server; see `cors_allow_origin`", 403)(scope, receive, send)
            return
        await (self._for_pages if origin else self._app)(scope, receive, send)

    def _is_allowed_origin(self, origin: str, host: str) -> bool:
        """Whether a web page of that origin may send requests.

        Allows the origins in the setting, pages of this machine, and the server's own origin. Programs send no origin, or one that
        is not a web address.

        A page can send a request without being able to read the response, and downloading a model needs no response.
        """
        scheme, _, site = origin.partition("://")
        if scheme not in ("http", "https") and origin != "null":
            return True
        named = not self._hosts.any and not self._hosts.addresses and self._hosts.admits(site)
        return site == host or named or is_local_origin(origin) or matches_origin(origin, self._origins)


class _Cors(CORSMiddleware):
    """Starlette's CORS headers for pages of this machine and for those in the setting `cors_allow_origin`."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=["*"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=["*"],
        )

    def is_allowed_origin(self, origin: str) -> bool:
        """Whether pages of that origin may read responses."""
        return is_local_origin(origin) or matches_origin(origin, self.allow_origins)  # type: ignore[arg-type]

    def preflight_response(self, request_headers: Headers) -> Response:
        """Return the answer to a preflight, which has no content if it is allowed."""
        response = super().preflight_response(request_headers)
        if response.status_code != 200:
            return response
        about_content = ("content-length", "content-type")
        return Response(
            status_code=204, headers={name: text for name, text in response.headers.items() if name not in about_content}
        )


class ExactRouter:
    """Looks up routes without path parameters in a table, and passes everything else to ``rest``.

    Starlette tries its routes one after another, which takes longer for all these routes than returning a cached result.
    dialects: the base paths of the APIs. Paths that stand for another (paths.py) are replaced by it.
    """

    def __init__(self, routes: Sequence[Route], rest: ASGIApp, dialects: Collection[str] = ()) -> None:
        for route in routes:  # `$` would also match before a trailing line feed
            route.path_regex = re.compile(route.path_regex.pattern.removesuffix("$") + r"\Z", re.DOTALL)  # any name has a route
        exact = (route for route in routes if "{" not in route.path)
        self._table = {(method, route.path): route.endpoint for route in exact for method in route.methods or ()}
        self._named = [route for route in routes if "{" in route.path]
        self._rest = rest
        self._dialects = frozenset(dialects)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the route in the table, or else ``rest``."""
        endpoint = None
        if scope["type"] == "http":
            endpoint = self._table.get((scope["method"], scope["path"]))
            if endpoint is None and (found := self._meant(scope)) is not None:
                scope = {
                    **scope,
                    "path": found.path,
                    "raw_path": quote(found.path).encode(),
                    MODEL: found.model,
                    DIALECT: found.dialect,
                }
                endpoint = self._table.get((scope["method"], scope["path"]))
        if endpoint is None:
            await self._rest(scope, receive, send)
            return
        response: Response = await endpoint(Request(scope, receive, send))
        await response(scope, receive, send)

    def _meant(self, scope: Scope) -> Meant | None:
        raw: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
        if len(raw) > _LONGEST_PATH:
            return None
        return meant(scope["method"], raw.decode("latin-1"), self._is_known, self._is_named, self._dialects)

    def _is_known(self, method: str, path: str) -> bool:
        return (method, path) in self._table

    def _is_named(self, method: str, path: str) -> bool:
        return any(method in (route.methods or ()) and route.path_regex.match(path) for route in self._named)


def _refusal(message: str, status: int) -> Response:
    """Return an error response that the clients of most APIs can read."""
    content = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}, "message": message}
    return Response(msgspec.json.encode(content), status, media_type="application/json")
