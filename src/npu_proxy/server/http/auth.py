"""Access to the server: API keys, which it must have if others can reach it, and the host names it accepts."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping, Sequence

from npu_proxy.errors import SettingsError
from npu_proxy.server.errors import UnauthorizedError
from npu_proxy.settings import Settings


def read_keys(settings: Settings) -> Sequence[bytes]:
    """Return the keys from the settings and from the key file (one per line, `#` begins a comment).

    Raises SettingsError if the file cannot be read or has no keys, or if others can reach a server without keys.
    """
    keys = [key for key in settings.api_key if key]
    if settings.api_key_file is not None:
        try:
            lines = settings.api_key_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"`api_key_file` {settings.api_key_file} cannot be read: {error}", param="api_key_file") from error
        keys += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not keys:
            raise SettingsError(f"`api_key_file` {settings.api_key_file} contains no keys", param="api_key_file")
    if not keys and not settings.insecure and settings.uds is None and not _is_loopback(settings.host):
        raise SettingsError(
            f"`host` is {settings.host}, which others can reach, but there is no API key; set `api_key` or `api_key_file`,"
            " or set `insecure` to allow everyone",
            param="host",
        )
    return [key.encode() for key in keys]


def check(keys: Sequence[bytes], headers: Mapping[str, str]) -> None:
    """Raise UnauthorizedError unless the request carries one of the keys. Without keys, every request is allowed.

    Accepts `Authorization: Bearer KEY` and `X-Api-Key: KEY`. Compares every key, in constant time.
    """
    if not keys:
        return
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    given = (bearer.strip() if scheme.lower() == "bearer" else "") or headers.get("x-api-key", "")
    if not any([hmac.compare_digest(key, given.encode("latin-1", "replace")) for key in keys]):  # noqa: C419 (no early exit)
        raise UnauthorizedError("this server requires an API key; send it as `Authorization: Bearer KEY`")


def allowed_hosts(settings: Settings) -> Sequence[str]:
    """Return the names allowed in a Host header: `allowed_hosts`, else this machine's names if only it can reach the server."""
    if settings.allowed_hosts:
        return settings.allowed_hosts
    if settings.uds is not None or not _is_loopback(settings.host):
        return ("*",)
    return ("localhost", "127.0.0.1", "[::1]", settings.host)


def is_open(settings: Settings, keys: Sequence[bytes]) -> bool:
    """Whether others can reach the server without a key."""
    return settings.uds is None and not _is_loopback(settings.host) and not keys


def is_allowed(header: str, hosts: Sequence[str]) -> bool:
    """Whether a Host header, with or without a port, is one of ``hosts`` (lower case; `*.name` matches any name below it)."""
    host = header.lower().rstrip(".")
    name, colon, port = host.rpartition(":")
    if colon and port.isdigit() and not name.endswith(":"):
        host = name
    return any(host == allowed or (allowed.startswith("*.") and host.endswith(allowed[1:])) for allowed in hosts)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
