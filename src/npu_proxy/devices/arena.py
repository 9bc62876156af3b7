"""Memory that a worker process and its owner share, so that rows and outputs travel without being pickled or copied.

It has no name in the file system, so nothing is left behind however the processes end. Layout: one control block, then
one slot for each row that can be under way.
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

from npu_proxy.graph.packed import RowFormat, RowShape

_ALIGN = 64
_CONTROL = 4096
OUTPUT = "output"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What every slot must hold: rows of any of ``shapes`` in the model's format, and what comes out of them."""

    shapes: Sequence[RowShape]
    format: RowFormat
    slots: int

    def arrays(self, shape: RowShape) -> dict[str, tuple[tuple[int, ...], type]]:
        """Shape and type of each input of a row, and of its output, in the order in which they lie in a slot."""
        measures = (shape.bins, shape.positions, shape.segments)
        return {**self.format.inputs(*measures), OUTPUT: (self.format.output(*measures), np.float32)}

    def offsets(self, shape: RowShape) -> tuple[dict[str, int], int]:
        """Byte offset of each array within a slot, and the bytes they take."""
        offsets: dict[str, int] = {}
        end = 0
        for name, (dimensions, kind) in self.arrays(shape).items():
            offsets[name] = end
            size = int(np.prod(dimensions)) * np.dtype(kind).itemsize
            end += -(-size // _ALIGN) * _ALIGN
        return offsets, end

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot: enough for the largest row, whole pages."""
        largest = max(self.offsets(shape)[1] for shape in self.shapes)
        return -(-largest // mmap.PAGESIZE) * mmap.PAGESIZE

    @property
    def size(self) -> int:
        """Bytes of the whole memory."""
        return _CONTROL + self.slots * self.slot_bytes


class Arena:
    """The memory itself, in the owner (``handle=None``, made anew) or in the worker (the owner's handle)."""

    def __init__(self, layout: Layout, handle: int | str | None = None) -> None:
        self._layout = layout
        self.handle: int | str
        name = handle if isinstance(handle, str) else f"npu-proxy-{secrets.token_hex(8)}"  # Windows; elsewhere it has none
        if sys.platform == "win32":
            self.handle = name
            self._map = mmap.mmap(-1, layout.size, tagname=self.handle)
        else:
            self.handle = handle if isinstance(handle, int) else _unnamed(layout.size)
            self._given_back = weakref.finalize(self, os.close, self.handle)
            self._map = mmap.mmap(self.handle, layout.size)
        self.control: npt.NDArray[np.uint64] = np.frombuffer(self._map, np.uint64, _CONTROL // 8)
        """[0] counts the worker's heartbeats; [1] is the fault that devices/faults.py injects, and 0 otherwise."""

    def views(self, slot: int, shape: RowShape) -> Mapping[str, npt.NDArray[Any]]:
        """The arrays of a row in a slot: inputs by graph name, and ``output``."""
        offsets, _ = self._layout.offsets(shape)
        start = _CONTROL + slot * self._layout.slot_bytes
        return {
            name: np.frombuffer(self._map, kind, int(np.prod(dimensions)), start + offsets[name]).reshape(dimensions)
            for name, (dimensions, kind) in self._layout.arrays(shape).items()
        }

    def close(self) -> None:
        """Give the handle back; the memory goes when nobody looks at it any more."""
        if sys.platform != "win32":
            self._given_back()


def _unnamed(size: int) -> int:
    """A file descriptor of memory without a name."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("npu-proxy")
    else:
        import tempfile

        descriptor, path = tempfile.mkstemp(prefix="npu-proxy-")
        Path(path).unlink()
    os.ftruncate(descriptor, size)
    return descriptor
