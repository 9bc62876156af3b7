"""Memory that a worker process and its owner share, so that batches and outputs are neither pickled nor copied.

It has no name in the file system, so nothing is left behind, however the processes end. It consists of one control block and
one slot per concurrent batch.
"""

from __future__ import annotations

import mmap
import os
import secrets
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npu_proxy.batch import BatchLayout, BatchShape

_ALIGN = 64
_CONTROL = 4096
OUTPUT = "output"


@dataclass(frozen=True, kw_only=True)
class MemoryLayout:
    """What every slot can hold: a batch of any of ``shapes`` in the model's layout, and its output."""

    shapes: Sequence[BatchShape]
    layout: BatchLayout
    slots: int

    def arrays(self, shape: BatchShape) -> dict[str, tuple[tuple[int, ...], type]]:
        """Dimensions and type of each input of a batch, and of its output, in the order of a slot's memory."""
        sizes = (shape.bins, shape.positions, shape.segments)
        return {**self.layout.inputs(*sizes), OUTPUT: (self.layout.output(*sizes), np.float32)}

    def offsets(self, shape: BatchShape) -> tuple[dict[str, int], int]:
        """Byte offset of each array within a slot, and their total size in bytes."""
        offsets: dict[str, int] = {}
        end = 0
        for name, (dimensions, kind) in self.arrays(shape).items():
            offsets[name] = end
            size = int(np.prod(dimensions)) * np.dtype(kind).itemsize
            end += -(-size // _ALIGN) * _ALIGN
        return offsets, end

    @property
    def slot_bytes(self) -> int:
        """Bytes per slot: enough for the largest batch, in whole pages."""
        largest = max(self.offsets(shape)[1] for shape in self.shapes)
        return -(-largest // mmap.PAGESIZE) * mmap.PAGESIZE

    @property
    def size(self) -> int:
        """Bytes in total."""
        return _CONTROL + self.slots * self.slot_bytes


class SharedMemory:
    """A block of shared memory: created by the owner (``handle=None``), opened by the worker with the owner's handle."""

    def __init__(self, layout: MemoryLayout, handle: int | str | None = None) -> None:
        self._layout = layout
        self.handle: int | str
        name = handle if isinstance(handle, str) else f"npu-proxy-{secrets.token_hex(8)}"  # used on Windows only
        if sys.platform == "win32":
            self.handle = name
            self._map = mmap.mmap(-1, layout.size, tagname=self.handle)
        else:
            self.handle = handle if isinstance(handle, int) else _unnamed(layout.size)
            self._close_handle = weakref.finalize(self, os.close, self.handle)
            self._map = mmap.mmap(self.handle, layout.size)
        self.control: npt.NDArray[np.uint64] = np.frombuffer(self._map, np.uint64, _CONTROL // 8)
        """[0] counts the worker's heartbeats; [1] is the fault that faults.py injects, 0 for none."""

    def views(self, slot: int, shape: BatchShape) -> Mapping[str, npt.NDArray[Any]]:
        """The arrays of a batch in a slot: inputs by their names in the graph, and ``output``."""
        offsets, _ = self._layout.offsets(shape)
        start = _CONTROL + slot * self._layout.slot_bytes
        return {
            name: np.frombuffer(self._map, kind, int(np.prod(dimensions)), start + offsets[name]).reshape(dimensions)
            for name, (dimensions, kind) in self._layout.arrays(shape).items()
        }

    def close(self) -> None:
        """Close the handle. The memory is freed once nothing maps it."""
        if sys.platform != "win32":
            self._close_handle()


def _unnamed(size: int) -> int:
    """Create unnamed memory and return its file descriptor."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("npu-proxy")
    else:
        import tempfile

        descriptor, path = tempfile.mkstemp(prefix="npu-proxy-")
        Path(path).unlink()
    os.ftruncate(descriptor, size)
    return descriptor
