"""Keys of cache entries, and conversion of entries to and from bytes. Pure functions.

A key is the model's fingerprint (16 bytes) and a SHA-256 of everything the vector depends on (32 bytes). A value is the
full-width vector before normalization, from which every `dimensions`, `normalize` and output type can be made.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from npu_proxy.types import Pair, TextInput, TextResult

FINGERPRINT_BYTES = 16
KEY_BYTES = FINGERPRINT_BYTES + 32

_HEADER = struct.Struct("<4sIII?BI")
"""Magic, checksum of all bytes after it, width, tokens, truncated, length of what follows before the vector, rows plus 1 (0: one
vector). What follows: the origin (8 bytes), then the name of the device; without an origin in entries of earlier versions."""
_MAGIC, _WITHOUT_ORIGIN = b"npx3", b"npv2"  # several bits apart
_ORIGIN = struct.Struct("<Q")
_CHECKSUM_START = 8
"""The checksum covers all bytes from this offset on."""


class CacheKeys:
    """Makes the keys of one model in one configuration. Thread-safe."""

    def __init__(self, fingerprint: str, *configuration: str) -> None:
        """configuration: other settings that affect vectors (sanitizing, placeholders), and the cache's prefix."""
        self._prefix = fingerprint_bytes(fingerprint)
        self._base = hashlib.sha256(json.dumps([fingerprint, *configuration]).encode())
        # The digest of the last request's options; the next request usually has the same options.
        self._last: tuple[Sequence[object], Any] = ((), self._base)

    def make(self, texts: Sequence[TextInput], options: Sequence[object]) -> list[bytes]:
        """Return one key per text. options: how texts are tokenized (engine.encode_options.EncodeOptions.key)."""
        last, base = self._last
        if last != options:
            base = self._base.copy()
            base.update(json.dumps(options).encode())
            self._last = (options, base)
        keys: list[bytes] = []
        first: tuple[str, Any] = ("", None)
        for text in texts:
            if isinstance(text, Pair):  # the first text of pairs, such as a query, is usually the same, and is hashed once
                if first[1] is None or text.first is not first[0]:
                    first = (text.first, base.copy())
                    first[1].update(_first_content(text.first))
                digest = first[1].copy()
                digest.update(text.second.encode("utf-8", "surrogatepass"))
            else:
                digest = base.copy()
                digest.update(_content(text))
            keys.append(self._prefix + digest.digest())
        return keys


def _first_content(text: str) -> bytes:
    """Convert the first text of a pair to bytes; those of the second text follow."""
    content = text.encode("utf-8", "surrogatepass")
    return b"p%d " % len(content) + content


def _content(text: str | Sequence[int]) -> bytes:
    """Convert a text or token ids to bytes that differ for each kind of input."""
    if isinstance(text, str):
        return b"t" + text.encode("utf-8", "surrogatepass")
    try:
        return b"i" + np.asarray(text, "<i8").tobytes()
    except OverflowError:  # no model has such an id; it is rejected later
        return b"j" + ",".join(map(str, text)).encode()


def origins_to_bytes(origins: Iterable[int]) -> bytes:
    """Convert void origins to bytes; those of several calls may follow one another."""
    return b"".join(map(_ORIGIN.pack, origins))


def origins_from_bytes(value: bytes | None) -> frozenset[int]:
    """Convert the bytes of void origins back."""
    content = value or b""
    return frozenset(_ORIGIN.unpack_from(content, start)[0] for start in range(0, len(content) - _ORIGIN.size + 1, _ORIGIN.size))


def fingerprint_bytes(fingerprint: str) -> bytes:
    """The first bytes of every key of the model with this fingerprint."""
    return fingerprint.encode()[:FINGERPRINT_BYTES].ljust(FINGERPRINT_BYTES, b"-")


def to_bytes(entry: TextResult) -> bytes:
    """Convert an entry to the bytes stored on disk or on a server: header, device, little-endian float32."""
    device = _ORIGIN.pack(entry.origin) + entry.device.encode()[: 255 - _ORIGIN.size]
    body = device + entry.vector.astype("<f4", copy=False).tobytes()
    rows = len(entry.vector) + 1 if entry.vector.ndim == 2 else 0  # 0 rows must differ from one vector
    width = entry.vector.shape[-1]
    head = _HEADER.pack(_MAGIC, 0, width, entry.tokens, entry.truncated, len(device), rows)
    checksum = zlib.crc32(body, zlib.crc32(head[_CHECKSUM_START:]))
    return _HEADER.pack(_MAGIC, checksum, width, entry.tokens, entry.truncated, len(device), rows) + body


def from_bytes(value: bytes) -> TextResult | None:
    """Convert bytes back to an entry; None if they are not exactly what ``to_bytes`` returned."""
    if len(value) < _HEADER.size:
        return None
    magic, checksum, width, tokens, truncated, name_size, rows = _HEADER.unpack_from(value)
    start = _HEADER.size + name_size
    count = width * (rows - 1) if rows else width
    if (
        magic not in (_MAGIC, _WITHOUT_ORIGIN)
        or len(value) != start + 4 * count
        or zlib.crc32(memoryview(value)[_CHECKSUM_START:]) != checksum
    ):
        return None
    vector = np.frombuffer(value, "<f4", count, start).astype(np.float32, copy=False)
    if rows:
        vector = vector.reshape(rows - 1, width)
    name = value[_HEADER.size : start]
    origin = _ORIGIN.unpack_from(name)[0] if magic == _MAGIC and len(name) >= _ORIGIN.size else 0
    device = name[_ORIGIN.size :] if magic == _MAGIC else name
    return TextResult(vector, tokens, truncated, device.decode("utf-8", "replace"), origin=origin)
