"""Who sends a request: the owner of an API key, with its own limits, or else an address and a user agent; and what it asks for."""

from __future__ import annotations

import hmac
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
from starlette.requests import Request

from npu_proxy.errors import InputError, SettingsError
from npu_proxy.server.errors import UnauthorizedError
from npu_proxy.server.http.hosts import is_exposed
from npu_proxy.settings import Settings
from npu_proxy.system import check_not_public
from npu_proxy.types import Client, Lane

_LONGEST_AGENT = 100


class KeyTable(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A table of `api_keys_file`."""

    key: Annotated[str, msgspec.Meta(pattern=r"^\S+$")]
    priority: Lane | None = None
    weight: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 1.0
    max_texts: Annotated[int, msgspec.Meta(ge=1)] | None = None


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """An API key: its name for metrics and logs, its share and limit (``client``), and the lane that its requests use.

    lane: `bulk` applies to all of its requests, `interactive` to those that ask for nothing else; None decides by their size.
    """

    name: str
    secret: bytes = field(repr=False)
    client: Client
    lane: Lane | None = None


def read_keys(settings: Settings) -> Sequence[ApiKey]:
    """Return the keys of `api_key`, `api_key_file` and `api_keys_file`.

    Raises SettingsError if a file cannot be read, is invalid or has no keys, or if others can reach a server without keys.
    """
    plain = [key for key in settings.api_key if key]
    if settings.api_key_file is not None:
        lines = [line.strip() for line in _read(settings.api_key_file, "api_key_file").splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise SettingsError(f"`api_key_file` {settings.api_key_file} contains no keys", param="api_key_file")
        plain += found
    keys = [_key(f"key-{number}", KeyTable(key=key)) for number, key in enumerate(dict.fromkeys(plain), 1)]
    if settings.api_keys_file is not None:
        keys += _named(settings.api_keys_file)
    if len({key.secret for key in keys}) < len(keys):
        raise SettingsError(
            "`api_keys_file` contains a key twice, or one that `api_key` or `api_key_file` has", param="api_keys_file"
        )
    if not keys and not settings.insecure and is_exposed(settings):
        raise SettingsError(
            f"`host` is {settings.host}, which others can reach, but there is no API key; set `api_key`, `api_key_file` or"
            " `api_keys_file`, or set `insecure` to allow everyone",
            param="host",
        )
    return keys


def _read(path: Path, setting: str) -> str:
    try:
        check_not_public(path)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"`{setting}` {path} cannot be read: {error}", param=setting) from error


def _named(path: Path) -> list[ApiKey]:
    """The keys of a TOML file with one table per key, named as in metrics and logs."""
    try:
        tables = tomllib.loads(_read(path, "api_keys_file"))
    except tomllib.TOMLDecodeError as error:
        raise _invalid(path, f"is not valid TOML: {error}") from None
    if not tables:
        raise _invalid(path, "contains no keys; it needs a table per key, such as [search] with key = ...")
    keys: list[ApiKey] = []
    for name, table in tables.items():
        try:
            keys.append(_key(name, msgspec.convert(table, KeyTable)))
        except msgspec.ValidationError as error:  # its message does not contain the key
            raise _invalid(path, f"[{name}] {error}") from None
    return keys


def _invalid(path: Path, problem: str) -> SettingsError:
    return SettingsError(f"`api_keys_file` {path}: {problem}", param="api_keys_file")


def _key(name: str, table: KeyTable) -> ApiKey:
    client = Client(name=f"key {name}", weight=table.weight, max_texts=table.max_texts)
    return ApiKey(name=name, secret=table.key.encode(), client=client, lane=table.priority)


def identify(keys: Sequence[ApiKey], request: Request) -> ApiKey | Client:
    """Return the key that a request carries, or without any keys, a client by its address and user agent.

    Accepts `Authorization: Bearer KEY` and `X-Api-Key: KEY`. Compares every key, in constant time. Raises UnauthorizedError.
    """
    headers = request.headers
    if not keys:
        address = request.client.host if request.client else ""
        return Client(name=f"{address} {headers.get('user-agent', '')[:_LONGEST_AGENT]}")
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    given = ((bearer.strip() if scheme.lower() == "bearer" else "") or headers.get("x-api-key", "")).encode("latin-1", "replace")
    found = [key for key in keys if hmac.compare_digest(key.secret, given)]
    if not found:
        raise UnauthorizedError("this server requires an API key; send it as `Authorization: Bearer KEY`")
    return found[0]


class _Priority(msgspec.Struct):
    priority: str | int | None = None


_PRIORITY = msgspec.json.Decoder(_Priority)


def lane_of(request: Request, body: bytes, key: ApiKey | None) -> Lane | None:
    """Return the lane that the header or body field `priority` asks for, within what the key allows; None decides by size.

    The header may have the form of RFC 9218 (`u=3`), and the field that of vLLM (a number, the lowest first). Raises InputError.
    """
    if key is not None and key.lane is Lane.BULK:
        return Lane.BULK
    asked = _asked(request.headers.get("priority", ""), body)
    return asked if asked is not None or key is None else key.lane


def _asked(header: str, body: bytes) -> Lane | None:
    if b'"priority"' in body:
        try:
            priority = _PRIORITY.decode(body).priority
        except msgspec.ValidationError as error:
            raise InputError(f"`priority` must be one of {', '.join(Lane)}", param="priority") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None  # reported when the whole body is decoded
        if isinstance(priority, int):
            return None if priority == 0 else Lane.BULK if priority > 0 else Lane.INTERACTIVE
        if priority is not None:
            return _lane(priority)
    return _lane(header) if header and "=" not in header and header != "i" else None


def _lane(name: str) -> Lane:
    try:
        return Lane(name.lower())
    except ValueError:
        raise InputError(f"`priority` is `{name[:40]}`; it must be one of {', '.join(Lane)}", param="priority") from None
