"""Who may ask: API keys, and that a server that others can reach has some."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping, Sequence

from npu_proxy.errors import InputError, SettingsError
from npu_proxy.settings import Settings


class UnauthorizedError(InputError):
    """The request carries no key of this server."""

    kind = "unauthorized"


def read_keys(settings: Settings) -> Sequence[bytes]:
    """The keys of the settings and of their file (one a line, `#` begins a comment).

    Raises SettingsError for a file that cannot be read, and for a server without keys that others can reach.
    """
    keys = [key for key in settings.api_key if key]
    if settings.api_key_file is not None:
        try:
            lines = settings.api_key_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"`api_key_file` {settings.api_key_file} cannot be read: {error}", param="api_key_file") from error
        keys += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not keys:
            raise SettingsError(f"`api_key_file` {settings.api_key_file} has no keys", param="api_key_file")
    if not keys and not settings.insecure and settings.uds is None and not _is_loopback(settings.host):
        raise SettingsError(
            f"`host` is {settings.host}, which others can reach, and there is no API key; set `api_key` or `api_key_file`,"
            " or `insecure` if everybody may ask",
            param="host",
        )
    return [key.encode() for key in keys]


def check(keys: Sequence[bytes], headers: Mapping[str, str]) -> None:
    """Raise UnauthorizedError unless the request has one of the keys; without keys anything will do.

    `Authorization: Bearer KEY` or `X-Api-Key: KEY`. Every key is compared, in constant time.
    """
    if not keys:
        return
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    given = (bearer.strip() if scheme.lower() == "bearer" else "") or headers.get("x-api-key", "")
    if not any([hmac.compare_digest(key, given.encode("latin-1", "replace")) for key in keys]):  # noqa: C419 (no early end)
        raise UnauthorizedError("this server wants an API key: send it as `Authorization: Bearer KEY`")


def allowed_hosts(settings: Settings) -> Sequence[str]:
    """The names that a Host header may have: the setting, or those of this machine while only it can reach the server."""
    if settings.allowed_hosts:
        return settings.allowed_hosts
    if settings.uds is not None or not _is_loopback(settings.host):
        return ("*",)
    return ("localhost", "127.0.0.1", "[::1]", settings.host)


def is_open(settings: Settings, keys: Sequence[bytes]) -> bool:
    """Whether others can reach the server and need no key."""
    return settings.uds is None and not _is_loopback(settings.host) and not keys


def is_allowed(header: str, hosts: Sequence[str]) -> bool:
    """Whether a Host header (with a port or without) is one of ``hosts``, all lower case; `*.name` is any name below."""
    host = header.lower().rstrip(".")
    name, colon, port = host.rpartition(":")
    if colon and port.isdigit() and not name.endswith(":"):
        host = name
    return any(host == one or (one.startswith("*.") and host.endswith(one[1:])) for one in hosts)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
