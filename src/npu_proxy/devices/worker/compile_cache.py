"""Compiled models on disk: one folder per set of versions, limited in size. Disk errors only cost time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from npu_proxy.system import private_folder


@dataclass(frozen=True, kw_only=True)
class CompileCache:
    """Blobs under ``root``, up to ``limit`` bytes in total."""

    root: Path
    limit: int

    def folder(self, versions: Sequence[str]) -> Path | None:
        """The folder of blobs for these versions (OpenVINO, device, driver), or None if it cannot be written."""
        folder = self.root / hashlib.sha256("\n".join(versions).encode()).hexdigest()[:16]
        try:
            private_folder(folder)
            probe = folder / f".writable-{os.getpid()}"
            probe.write_bytes(b"0" * 4096)
            probe.unlink()
        except OSError:
            return None
        return folder

    def files(self) -> list[tuple[float, int, Path]]:
        """Time of last use, size in bytes and path of every blob, least recently used first."""
        entries: list[tuple[float, int, Path]] = []
        for file in self.root.rglob("*"):
            try:
                if file.is_file():
                    status = file.stat()
                    entries.append((max(status.st_mtime, status.st_atime), status.st_size, file))
            except OSError:  # another process removed it
                continue
        return sorted(entries, key=lambda entry: entry[:2])

    def prune(self) -> int:
        """Remove the least recently used blobs until the limit is met. Returns the number of bytes removed."""
        files = self.files()
        total = sum(size for _, size, _ in files)
        removed = 0
        for _, size, file in files:
            if total - removed <= self.limit:
                break
            try:
                file.unlink(missing_ok=True)
            except OSError:  # in use (Windows); a later call removes it
                continue
            removed += size
        return removed
