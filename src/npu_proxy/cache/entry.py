"""Keys of cache entries, and conversion of entries to and from bytes. Pure functions.

A key is the model's fingerprint (16 bytes) and a SHA-256 of everything the vector depends on (32 bytes). A value is the
full-width vector before normalization, from which every `dimensions`, `normalize` and output type can be made.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from npu_proxy.types import Pair, TextInput, TextResult

FINGERPRINT_BYTES = 16
KEY_BYTES = FINGERPRINT_BYTES + 32

_HEADER = struct.Struct("<4sIII?BI")
"""Magic, checksum of all bytes after it, width, tokens, truncated, length of the device name, rows plus 1 (0: one vector)."""
_MAGIC = b"npv2"
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
        for text in texts:
            digest = base.copy()
            digest.update(_content(text))
            keys.append(self._prefix + digest.digest())
        return keys


def _content(text: TextInput) -> bytes:
    """Convert a text, pair or token ids to bytes that differ for each kind of input."""
    if isinstance(text, str):
        return b"t" + text.encode("utf-8", "surrogatepass")
    if isinstance(text, Pair):
        first = text.first.encode("utf-8", "surrogatepass")
        return b"p%d " % len(first) + first + text.second.encode("utf-8", "surrogatepass")
    try:
        return b"i" + np.asarray(text, "<i8").tobytes()
    except OverflowError:  # no model has such an id; it is rejected later
        return b"j" + ",".join(map(str, text)).encode()


def fingerprint_bytes(fingerprint: str) -> bytes:
    """The first bytes of every key of the model with this fingerprint."""
    return fingerprint.encode()[:FINGERPRINT_BYTES].ljust(FINGERPRINT_BYTES, b"-")


def to_bytes(entry: TextResult) -> bytes:
    """Convert an entry to the bytes stored on disk or on a server: header, device, little-endian float32."""
    device = entry.device.encode()[:255]
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
    if magic != _MAGIC or len(value) != start + 4 * count or zlib.crc32(memoryview(value)[_CHECKSUM_START:]) != checksum:
        return None
    vector = np.frombuffer(value, "<f4", count, start).astype(np.float32, copy=False)
    if rows:
        vector = vector.reshape(rows - 1, width)
    return TextResult(vector, tokens, truncated, value[_HEADER.size : start].decode("utf-8", "replace"))
