"""Compiled models on disk. A folder for each set of versions; the oldest go first; trouble with the disk costs time only."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Blobs under ``root``, ``limit`` bytes of them at most."""

    root: Path
    limit: int

    def folder(self, versions: Sequence[str]) -> Path | None:
        """The folder of blobs that these versions (OpenVINO, device, driver) can read, or None where nothing can be written."""
        folder = self.root / hashlib.sha256("\n".join(versions).encode()).hexdigest()[:16]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".writable-{os.getpid()}"
            probe.write_bytes(b"0" * 4096)
            probe.unlink()
        except OSError:
            return None
        return folder

    def files(self) -> list[tuple[float, int, Path]]:
        """When last used (seconds), bytes and path of every blob, the oldest first."""
        found: list[tuple[float, int, Path]] = []
        for file in self.root.rglob("*"):
            try:
                if file.is_file():
                    status = file.stat()
                    found.append((max(status.st_mtime, status.st_atime), status.st_size, file))
            except OSError:  # another process removed it
                continue
        return sorted(found, key=lambda entry: entry[:2])

    def prune(self) -> int:
        """Remove the blobs used longest ago until the limit holds; returns the bytes removed."""
        files = self.files()
        total = sum(size for _, size, _ in files)
        removed = 0
        for _, size, file in files:
            if total - removed <= self.limit:
                break
            try:
                file.unlink(missing_ok=True)
            except OSError:  # somebody reads it (Windows); it goes next time
                continue
            removed += size
        return removed
