"""Which host names the server accepts, and whether others can reach it."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from npu_proxy.settings import Settings


def allowed_hosts(settings: Settings) -> Sequence[str]:
    """Return the names allowed in a Host header: `allowed_hosts`, else this machine's names if only it can reach the server."""
    if settings.allowed_hosts:
        return settings.allowed_hosts
    if settings.uds is not None or is_exposed(settings):
        return ("*",)
    return ("localhost", "127.0.0.1", "[::1]", settings.host)


def is_exposed(settings: Settings) -> bool:
    """Whether other machines can reach the server."""
    return settings.uds is None and not is_loopback(settings.host)


def is_allowed(header: str, hosts: Sequence[str]) -> bool:
    """Whether a Host header, with or without a port, is one of ``hosts`` (lower case; `*.name` matches any name below it)."""
    host = header.lower().rstrip(".")
    name, colon, port = host.rpartition(":")
    if colon and port.isdigit() and not name.endswith(":"):
        host = name
    return any(host == allowed or (allowed.startswith("*.") and host.endswith(allowed[1:])) for allowed in hosts)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
