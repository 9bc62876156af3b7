"""From bytes as they are sent to a body: compression, charsets, what is no Unicode, JSON, and fields that are refused.

Pure functions; docs/adr/0018 says why.
"""

from __future__ import annotations

import codecs
import re
import zlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import msgspec

from npu_proxy.errors import InputError
from npu_proxy.server.apis.contract import RequestBody
from npu_proxy.server.errors import NoBodyError, UnsupportedEncodingError

_ANY_FORMAT = 47
"""zlib's window bits for gzip or zlib, by the header."""
_ESCAPES = re.compile(rb"\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<half>\\u[dD][89a-fA-F][0-9a-fA-F]{2})")
"""An escaped backslash, a pair of surrogates, or half of one."""
_CHARSETS = ("iso-8859-1", "latin1", "latin-1", "iso-8859-15", "windows-1252", "utf-16", "utf-16le", "utf-16be")
_MOST_REPLACED, _MOST_ESCAPES = 100_000, 2_000_000
_UNPACKED_AT_ONCE, _MOST_MEMBERS = 64 * 1024, 1000


def decompressed(body: bytes, most: int) -> bytes | None:
    """Return a gzip or zlib body decompressed; None if that is more than ``most`` bytes. Raises zlib.error.

    A body may have several members, as gzip files have; padding with zeros after them is ignored.
    """
    parts: list[bytes] = []
    room, members, unpack, ended = most, 0, zlib.decompressobj(_ANY_FORMAT), False
    for start in range(0, len(body), _UNPACKED_AT_ONCE):  # in pieces: what follows a member is copied
        piece = body[start : start + _UNPACKED_AT_ONCE]
        while piece:
            if ended:
                if not piece[0]:
                    return b"".join(parts)
                members += 1
                if members > _MOST_MEMBERS:
                    raise zlib.error(f"it has more than {_MOST_MEMBERS} members")
                unpack, ended = zlib.decompressobj(_ANY_FORMAT), False
            part = unpack.decompress(piece, room + 1)
            room -= len(part)
            if room < 0 or unpack.unconsumed_tail:
                return None
            parts.append(part)
            ended, piece = unpack.eof, unpack.unused_data
    if body and not ended:
        raise zlib.error("it is cut short")
    return b"".join(parts)


def as_utf8(body: bytes, content_type: str) -> bytes:
    """Return a body in UTF-8, if its content type declares another charset. Raises UnsupportedEncodingError, InputError."""
    _, declared, charset = content_type.lower().partition("charset=")
    charset = charset.partition(";")[0].strip(" \"'")
    if not declared or charset in ("utf-8", "utf8", "us-ascii", "ascii", ""):
        return body
    if charset not in _CHARSETS:
        raise UnsupportedEncodingError(f"the charset `{charset[:40]}` is not supported; send UTF-8")
    try:
        return body.decode(charset).encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise InputError(f"the body is not valid {charset}: {error}") from None


def with_replacements(body: bytes) -> tuple[bytes, int]:
    """Return a body in which bytes that are no UTF-8, and escapes of half a surrogate pair, are U+FFFD, and their number.

    That is what the JSON decoders of Go, and so of Ollama, do; JavaScript cuts texts between the halves of an emoji. A byte order
    mark at the start is removed. Raises InputError if there are too many.
    """
    body = body.removeprefix(codecs.BOM_UTF8)
    count = 0
    try:
        body.decode()
    except UnicodeDecodeError:
        text = body.decode(errors="replace")
        count = text.count("\ufffd") - body.count("\ufffd".encode())
        if count > _MOST_REPLACED:
            raise InputError("the body is not valid JSON: it is not UTF-8") from None
        body = text.encode()
    parts: list[bytes] = []
    end = 0
    for number, match in enumerate(_ESCAPES.finditer(body)):
        if count > _MOST_REPLACED or number > _MOST_ESCAPES:
            raise InputError("the body is not valid JSON: it has too many escapes and halves of surrogate pairs")
        if match["half"]:
            parts += [body[end : match.start()], b"\\ufffd"]
            end = match.end()
            count += 1
    return b"".join([*parts, body[end:]]), count


def decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    """Decode a body to the decoder's type. Raises NoBodyError, or InputError naming the field."""
    if not body:
        raise NoBodyError("the request has no body; send a JSON object")
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$.")
        raise InputError(f"{problem} (at `{path.rstrip('`')}`)" if path else problem, param=path.rstrip("`") or None) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"the body is not valid JSON: {error}") from error


@cache
def _quoted(kind: type[RequestBody]) -> Sequence[tuple[bytes, str]]:
    """The refused fields of a body type, as they are in JSON, and their names."""
    return [(b'"%s"' % name.encode(), name) for name in kind.refused]


def check_refused(body: bytes, kind: type[RequestBody]) -> None:
    """Raise InputError if a body has a field that would change the result, and that is not supported."""
    present = [name for quoted, name in _quoted(kind) if quoted in body]
    if not present:
        return
    try:
        given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return  # reported when the body is decoded
    for name in present:
        try:
            value: Any = msgspec.json.decode(given[name]) if name in given else None
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):  # such as 1e400
            value = given[name]
        if isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        refused = kind.refused[name]
        if value is not None and value not in refused.neutral:
            raise InputError(f"`{name}` {refused.why}", param=name)
