"""Who sends a request: the owner of an API key, with its own limits, or else an address and a user agent; and what it asks for."""

from __future__ import annotations

import hmac
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from starlette.requests import Request

from npu_proxy.errors import InputError, SettingsError
from npu_proxy.server.errors import UnauthorizedError
from npu_proxy.server.http.hosts import is_exposed
from npu_proxy.settings import Settings
from npu_proxy.system import check_not_public
from npu_proxy.types import Client, Lane

_LONGEST_AGENT = 100
_KEY_HEADERS = ("x-api-key", "api-key", "x-goog-api-key")
"""Headers of a key besides `Authorization`: ours, Azure's and Google's."""


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

    Accepts `Authorization: Bearer KEY`, also `Token KEY` or the key alone, and the headers of other APIs (_KEY_HEADERS). Compares
    every key, in constant time. Raises UnauthorizedError.
    """
    headers = request.headers
    if not keys:
        address = request.client.host if request.client else ""
        return Client(name=f"{address} {headers.get('user-agent', '')[:_LONGEST_AGENT]}")
    scheme, _, bearer = headers.get("authorization", "").strip().partition(" ")
    in_header = bearer.strip() if scheme.lower() in ("bearer", "token") else scheme if not bearer else ""
    others = (headers.get(name, "") for name in _KEY_HEADERS)
    given = (in_header or next(filter(None, others), "")).encode("latin-1", "replace")
    found = [key for key in keys if hmac.compare_digest(key.secret, given)]
    if not found:
        raise UnauthorizedError("this server requires an API key; send it as `Authorization: Bearer KEY`")
    return found[0]


class _Wishes(msgspec.Struct):
    priority: str | int | None = None
    on_error: Literal["fail", "null", "zero"] | None = None


_WISHES = msgspec.json.Decoder(_Wishes)


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a request of any API may ask for. lane: None decides by size. on_error: None uses the setting."""

    lane: Lane | None
    on_error: Literal["fail", "null", "zero"] | None


def wishes_of(request: Request, body: bytes, key: ApiKey | None) -> Wishes:
    """Return what the headers or fields `priority` and `on_error` ask for, within what the key allows. Raises InputError.

    The header `priority` may have the form of RFC 9218 (`u=3`), and the field that of vLLM (a number, the lowest first).
    """
    given = _Wishes()
    if b'"priority"' in body or b'"on_error"' in body:
        try:
            given = _WISHES.decode(body)
        except msgspec.ValidationError as error:
            if "on_error" in str(error):
                raise InputError("`on_error` must be one of fail, null, zero", param="on_error") from error
            raise InputError(f"`priority` must be one of {', '.join(Lane)}", param="priority") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass  # reported when the whole body is decoded
    headers = request.headers
    on_error = given.on_error or headers.get("x-npu-proxy-on-error")
    if on_error not in (None, "fail", "null", "zero"):
        raise InputError(f"`x-npu-proxy-on-error` is `{on_error[:40]}`; it must be one of fail, null, zero", param="on_error")
    return Wishes(lane=_lane_of(headers.get("priority", ""), given.priority, key), on_error=on_error)


def _lane_of(header: str, field: str | int | None, key: ApiKey | None) -> Lane | None:
    """The lane that is asked for, or that of the key."""
    if key is not None and key.lane is Lane.BULK:
        return Lane.BULK
    if isinstance(field, int):
        asked = None if field == 0 else Lane.BULK if field > 0 else Lane.INTERACTIVE
    else:
        word = field if field is not None else header if "=" not in header and header != "i" else ""
        asked = _lane(word) if word or field is not None else None
    return asked if asked is not None or key is None else key.lane


def _lane(name: str) -> Lane:
    try:
        return Lane(name.lower())
    except ValueError:
        raise InputError(f"`priority` is `{name[:40]}`; it must be one of {', '.join(Lane)}", param="priority") from None
