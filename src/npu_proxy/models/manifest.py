"""The manifest of a stored model: where it came from, and the checksum and size of each of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

_NAME = ".manifest.json"
_LARGEST = 16 << 20


class ManifestFile(msgspec.Struct, frozen=True):
    """A file of a stored model. size: bytes."""

    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    size: Annotated[int, msgspec.Meta(ge=0)]


class Manifest(msgspec.Struct, frozen=True):
    """The content of a manifest. source: the mirror. files: by path within the model's folder."""

    name: str
    source: str
    files: dict[str, ManifestFile]


_DECODER = msgspec.json.Decoder(Manifest)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in a model's folder; None if there is none, or what is there is no manifest."""
    file = folder / _NAME
    try:
        return _DECODER.decode(file.read_bytes()) if file.stat().st_size <= _LARGEST else None
    except (OSError, ValueError, RecursionError):
        return None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest into a model's folder. Raises OSError."""
    file = folder / _NAME
    file.touch(0o600)
    file.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
