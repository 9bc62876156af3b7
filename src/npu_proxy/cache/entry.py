"""What is cached of a text, under which key, and as which bytes. Pure functions.

A key is the model's fingerprint, 16 bytes, and a SHA-256 over all that a vector depends on, 32 bytes. A value is the
full-width vector that is not normalized, so that every `dimensions`, `normalize` and output type is cut from it.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from npu_proxy.types import Embedded, Pair, TextInput

FINGERPRINT_BYTES = 16
KEY_BYTES = FINGERPRINT_BYTES + 32

_HEADER = struct.Struct("<4sIII?BI")
"""Magic, checksum of what follows it, width, tokens, truncated, length of the device's name, rows (0: one vector)."""
_MAGIC = b"npv2"
_CHECKED = 8
"""The checksum covers all from here on."""


class Keys:
    """Keys of one model under one configuration. Thread-safe."""

    def __init__(self, fingerprint: str, *configuration: str) -> None:
        """configuration: whatever else changes what a text becomes (sanitizing, placeholders), and the cache's prefix."""
        self._prefix = fingerprint_bytes(fingerprint)
        self._base = hashlib.sha256(json.dumps([fingerprint, *configuration]).encode())
        # The digest of what the last request had beside its texts: the next one mostly has the same.
        self._last: tuple[Sequence[object], Any] = ((), self._base)

    def of(self, texts: Sequence[TextInput], manner: Sequence[object]) -> list[bytes]:
        """One key a text. manner: how it is read (engine.tokenize.Manner.key)."""
        how, base = self._last
        if how != manner:
            base = self._base.copy()
            base.update(json.dumps(manner).encode())
            self._last = (manner, base)
        keys: list[bytes] = []
        for text in texts:
            digest = base.copy()
            digest.update(_content(text))
            keys.append(self._prefix + digest.digest())
        return keys


def _content(text: TextInput) -> bytes:
    """A text or token ids as bytes, never the same for both."""
    if isinstance(text, str):
        return b"t" + text.encode("utf-8", "surrogatepass")
    if isinstance(text, Pair):
        first = text.first.encode("utf-8", "surrogatepass")
        return b"p%d " % len(first) + first + text.second.encode("utf-8", "surrogatepass")
    try:
        return b"i" + np.asarray(text, "<i8").tobytes()
    except OverflowError:  # an id of no model; it is an error later on
        return b"j" + ",".join(map(str, text)).encode()


def fingerprint_bytes(fingerprint: str) -> bytes:
    """The first bytes of every key of that model."""
    return fingerprint.encode()[:FINGERPRINT_BYTES].ljust(FINGERPRINT_BYTES, b"-")


def to_bytes(entry: Embedded) -> bytes:
    """An entry as it lies on disk or on a server: header, device, little-endian float32."""
    device = entry.device.encode()[:255]
    body = device + entry.vector.astype("<f4", copy=False).tobytes()
    rows = len(entry.vector) + 1 if entry.vector.ndim == 2 else 0  # so that no rows at all are told from one vector
    width = entry.vector.shape[-1]
    head = _HEADER.pack(_MAGIC, 0, width, entry.tokens, entry.truncated, len(device), rows)
    checksum = zlib.crc32(body, zlib.crc32(head[_CHECKED:]))
    return _HEADER.pack(_MAGIC, checksum, width, entry.tokens, entry.truncated, len(device), rows) + body


def from_bytes(value: bytes) -> Embedded | None:
    """The entry, or None where the bytes are not exactly what ``to_bytes`` made."""
    if len(value) < _HEADER.size:
        return None
    magic, checksum, width, tokens, truncated, named, rows = _HEADER.unpack_from(value)
    start = _HEADER.size + named
    count = width * (rows - 1) if rows else width
    if magic != _MAGIC or len(value) != start + 4 * count or zlib.crc32(memoryview(value)[_CHECKED:]) != checksum:
        return None
    vector = np.frombuffer(value, "<f4", count, start).astype(np.float32, copy=False)
    if rows:
        vector = vector.reshape(rows - 1, width)
    return Embedded(vector, tokens, truncated, value[_HEADER.size : start].decode("utf-8", "replace"))
