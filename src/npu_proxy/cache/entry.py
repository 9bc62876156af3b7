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

import numpy as np

from npu_proxy.types import Embedded, TextInput, Truncate

FINGERPRINT_BYTES = 16
KEY_BYTES = FINGERPRINT_BYTES + 32

_HEADER = struct.Struct("<4sIII?B")
"""Magic, checksum of what follows it, width, tokens, truncated, length of the device's name."""
_MAGIC = b"npv1"
_CHECKED = 8
"""The checksum covers all from here on."""


class Keys:
    """Keys of one model under one configuration. Thread-safe."""

    def __init__(self, fingerprint: str, *configuration: str) -> None:
        """configuration: whatever else changes what a text becomes (sanitizing, placeholders), and the cache's prefix."""
        self._prefix = fingerprint_bytes(fingerprint)
        self._base = hashlib.sha256(json.dumps([fingerprint, *configuration]).encode())
        # The digest of what the last request had beside its texts: the next one mostly has the same.
        self._last = (("", Truncate.END, 0), self._base)

    def of(self, texts: Sequence[TextInput], prompt: str, truncate: Truncate, limit: int) -> list[bytes]:
        """One key a text. limit: tokens of a text."""
        how, base = self._last
        if how != (prompt, truncate, limit):
            base = self._base.copy()
            base.update(json.dumps([prompt, truncate, limit]).encode())
            self._last = ((prompt, truncate, limit), base)
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
    head = _HEADER.pack(_MAGIC, 0, len(entry.vector), entry.tokens, entry.truncated, len(device))
    checksum = zlib.crc32(body, zlib.crc32(head[_CHECKED:]))
    return _HEADER.pack(_MAGIC, checksum, len(entry.vector), entry.tokens, entry.truncated, len(device)) + body


def from_bytes(value: bytes) -> Embedded | None:
    """The entry, or None where the bytes are not exactly what ``to_bytes`` made."""
    if len(value) < _HEADER.size:
        return None
    magic, checksum, width, tokens, truncated, named = _HEADER.unpack_from(value)
    start = _HEADER.size + named
    if magic != _MAGIC or len(value) != start + 4 * width or zlib.crc32(memoryview(value)[_CHECKED:]) != checksum:
        return None
    vector = np.frombuffer(value, "<f4", width, start).astype(np.float32, copy=False)
    return Embedded(vector, tokens, truncated, value[_HEADER.size : start].decode("utf-8", "replace"))
