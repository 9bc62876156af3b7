"""Which host names and origins of web pages the server accepts, and whether others can reach it."""

from __future__ import annotations

import fnmatch
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from npu_proxy.settings import Settings

_APP_SCHEMES = ("app", "file", "tauri", "vscode-file", "vscode-webview")
"""Schemes of the pages of desktop applications; Ollama admits the same."""


@dataclass(frozen=True)
class HostNames:
    """Host names that the server accepts in a Host header.

    names: in lower case; `*` is any name, and `*.name` any below it. addresses: whether no name at all is accepted, and addresses
    of this machine and of private networks: a web page that rebinds its name to such an address still sends its name.
    """

    names: Sequence[str]
    addresses: bool = False

    @property
    def any(self) -> bool:
        """Whether every name is accepted."""
        return "*" in self.names

    def admits(self, header: str) -> bool:
        """Whether a Host header, with or without a port, is accepted."""
        if self.any:
            return True
        host = host_of(header)
        if self.addresses and (not header or _is_own_address(host)):
            return True
        return any(host == name or (name.startswith("*.") and host.endswith(name[1:])) for name in self.names)


def allowed_hosts(settings: Settings) -> HostNames:
    """Return the names of the setting `allowed_hosts`, or else this machine's names if only it can reach the server, or any."""
    if settings.allowed_hosts:
        return HostNames([name.lower() for name in settings.allowed_hosts])
    if settings.uds is not None or is_exposed(settings):
        return HostNames(["*"])
    machine = socket.gethostname().lower()
    own = [name for name in (machine, f"{machine.partition('.')[0]}.local") if machine]
    return HostNames(["localhost", "*.localhost", "*.internal", *own, settings.host.lower()], addresses=True)


def host_of(header: str) -> str:
    """Return the host of a Host header or of an origin: in lower case, without the port and the final dot."""
    host = header.lower()
    name, colon, port = host.rpartition(":")
    if colon and port.isascii() and port.isdigit() and not name.endswith(":"):
        host = name
    return host.removesuffix(".")


def is_local_origin(origin: str) -> bool:
    """Whether an origin is a page of this machine, or of a desktop application."""
    scheme, _, site = origin.partition("://")
    if scheme in ("http", "https"):
        host = host_of(site)
        return host == "localhost" or host.endswith(".localhost") or _is_own_address(host, private=False)
    return scheme in _APP_SCHEMES


def matches_origin(origin: str, allowed: Sequence[str]) -> bool:
    """Whether the setting `cors_allow_origin` names an origin; `*` stands for any letters."""
    return any(fnmatch.fnmatchcase(origin, name) for name in allowed)


def is_exposed(settings: Settings) -> bool:
    """Whether other machines can reach the server."""
    return settings.uds is None and not is_loopback(settings.host)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_own_address(host: str, *, private: bool = True) -> bool:
    """Whether a host is an IP address of this machine; private: or of a private network."""
    if host.startswith("[") != host.endswith("]"):
        return False
    try:
        address = ipaddress.ip_address(host[1:-1] if host.startswith("[") else host)
    except ValueError:
        return False
    if (address.version == 6) != host.startswith("["):
        return False
    return address.is_loopback or address.is_unspecified or (private and address.is_private)
