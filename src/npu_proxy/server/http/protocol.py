"""uvicorn's HTTP protocol with additional limits: on headers, trailers, framing, silent peers and the number of connections."""

from __future__ import annotations

import asyncio
import socket

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from npu_proxy.server.http.responses import ABORT
from npu_proxy.settings import Settings

_HEADER_BYTES = 64 * 1024
_FRAMING = 8
"""Bytes of framing allowed per byte of a body; a chunk of one byte has five."""
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class Protocol(HttpToolsProtocol):
    """One connection, with a time limit on headers, counted from the connection or from the first byte of a later request."""

    header_seconds: float = 30.0
    most_connections = 8192

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time limit on headers, or refuse the connection if there are too many."""
        self._head_open = True
        self._began_here = True
        self._head_bytes = 0
        self._framing = 0
        self._bodies = self._bodies_before = 0
        self._receiving = False
        self._head_timer: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            self._refuse(_FULL)
            return
        self._head_timer = self.loop.call_later(self.header_seconds, self._too_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse the data; close the connection if there are too many bytes of headers or of framing."""
        if self.transport.is_closing():
            return
        self._receiving, self._began_here, bodies = True, False, self._bodies
        try:
            self._parse(data)
        finally:
            self._receiving = False
        if self._head_open:
            self._head_bytes += 0 if self._began_here else len(data)
        else:
            self._framing += len(data) - (self._bodies - bodies)
        allowed = 2 * _HEADER_BYTES + _FRAMING * (self._bodies - self._bodies_before)
        if self._head_bytes > _HEADER_BYTES or self._framing > allowed:
            self._refuse(_LARGE)

    def _parse(self, data: bytes) -> None:
        """Parse the data as if no request asked for an upgrade, such as that of Java's client to h2c, which a server may ignore."""
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                if not self._asks_for_upgrade():  # a tunnel, which would be asked for again
                    self.send_400_response("Invalid HTTP request received.")
                    return
                # The parser has stopped after the head, and takes no body: a new one reads the same request without the upgrade.
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
                self.parser: httptools.HttpRequestParser = httptools.HttpRequestParser(self)
            except httptools.HttpParserError:
                self.send_400_response("Invalid HTTP request received.")
                return
            else:
                return

    def _head_without_upgrade(self) -> bytes:
        head = [self.parser.get_method() + b" " + self.url + b" HTTP/" + self.parser.get_http_version().encode()]
        head += [name + b": " + value for name, value in self.headers if name not in (b"upgrade", b"http2-settings")]
        return b"\r\n".join([*head, b"", b""])

    def on_message_begin(self) -> None:
        """Start the time limit on the headers of a request."""
        super().on_message_begin()
        self.scope[ABORT] = self.transport.abort  # type: ignore[typeddict-unknown-key]
        self._head_open = self._began_here = True
        self._head_bytes = self._framing = 0
        self._bodies_before = self._bodies
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.header_seconds, self._too_late)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep the header, unless it is a trailer, since nothing reads trailers."""
        if self._head_open:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """End the time limit; the rest of the request has its own limits."""
        if self._asks_for_upgrade():
            return
        self._head_open = False
        self._stop_timer()
        self._receiving = False
        self._unset_keepalive_if_required()
        self._receiving = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Count a piece of the body."""
        self._bodies += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note the end of the body."""
        if not self._asks_for_upgrade():
            super().on_message_complete()

    def _asks_for_upgrade(self) -> bool:
        """Whether the head that was just read asks for another protocol; CONNECT, which asks for a tunnel, is refused as usual."""
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def _unset_keepalive_if_required(self) -> None:
        """Stop the idle timeout only for a request whose headers are complete, not for any byte."""
        if not self._receiving:
            super()._unset_keepalive_if_required()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_late(self) -> None:
        self._head_timer = None
        self.transport.close()

    def _refuse(self, response: bytes) -> None:
        self.transport.write(response)
        self.transport.close()


def protocol_of(settings: Settings) -> type[Protocol]:
    """Return a Protocol class with the limits from the settings."""
    limits = {"header_seconds": settings.header_timeout, "most_connections": settings.max_connections}
    return type("LimitedProtocol", (Protocol,), limits)


def drop_silent_peers(listener: socket.socket, seconds: float) -> None:
    """Let the kernel close connections whose peers have not acknowledged sent data for ``seconds`` (Linux only)."""
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is not None and listener.family in (socket.AF_INET, socket.AF_INET6):
        listener.setsockopt(socket.IPPROTO_TCP, option, round(1000 * seconds))
