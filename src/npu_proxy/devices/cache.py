"""Compiled models on disk. A folder for each set of versions; the oldest go first; trouble with the disk costs time only."""

from __future__ import annotations

import hashlib
from pathlib import Path

_PROBE = ".writable"


def folder_for(root: Path, *versions: str) -> Path:
    """The folder of blobs that these versions (OpenVINO, device, driver) can read."""
    return root / hashlib.sha256("\n".join(versions).encode()).hexdigest()[:16]


def usable(folder: Path) -> bool:
    """Whether blobs can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _PROBE).write_bytes(b"")
        (folder / _PROBE).unlink()
    except OSError:
        return False
    return True


def prune(root: Path, limit: int) -> int:
    """Remove the blobs used longest ago until ``limit`` bytes are left; returns the bytes removed."""
    found: list[tuple[float, int, Path]] = []
    for file in root.rglob("*"):
        try:
            if file.is_file():
                found.append((max(file.stat().st_mtime, file.stat().st_atime), file.stat().st_size, file))
        except OSError:  # another process removed it
            continue
    total = sum(size for _, size, _ in found)
    removed = 0
    for _, size, file in sorted(found, key=lambda entry: entry[:2]):
        if total - removed <= limit:
            break
        try:
            file.unlink(missing_ok=True)
        except OSError:  # somebody reads it (Windows); it goes next time
            continue
        removed += size
    return removed
