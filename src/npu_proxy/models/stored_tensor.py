"""Where a tensor is in a file, and reading it: into memory of its own, at most as much as the file has bytes for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npu_proxy.errors import ModelError

Array = npt.NDArray[Any]

MOST_DIMENSIONS = 8
KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I8": "i1", "U8": "u1"}
"""numpy's types by the names that safetensors uses."""


def width_of(kind: str) -> int:
    """Bytes per element of a kind."""
    return np.dtype(KINDS[kind]).itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor in a file that had ``file_size`` bytes when it was examined.

    start: offset in bytes of its storage. kind: a key of KINDS, or the name of an unsupported type. strides: elements per step in
    each dimension, None if contiguous.
    """

    file: Path
    file_size: int
    start: int
    kind: str
    shape: Sequence[int]
    strides: Sequence[int] | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def count(self) -> int:
        """Number of elements in the file from its first to its last."""
        if self.strides is None:
            return self.size
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True)) if all(self.shape) else 0

    def read(self, name: str) -> Array:
        """The tensor in new memory, half and double precision converted to float32. Raises ModelError; ``name`` is for messages.

        The memory is not a map of the file, since a file that is cut short while it is mapped ends the process (SIGBUS).
        """
        if self.kind not in KINDS:
            raise ModelError(f"tensor `{name}` has the unsupported type {self.kind}; supported: {', '.join(KINDS)}")
        try:
            flat = np.empty(self.count, KINDS[self.kind])
            with self.file.open("rb") as opened:
                opened.seek(self.start)
                read = opened.readinto(flat.view(np.uint8).data) if flat.size else 0
        except (OSError, ValueError, MemoryError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
            raise ModelError(f"tensor `{name}` of {self.file.name} cannot be read: {reason}") from error
        if read != flat.nbytes or self.file.stat().st_size != self.file_size:
            raise ModelError(f"{self.file.name} was changed while the model was being loaded")
        values = _widened(flat, self.kind)
        if self.strides is None:
            return values.reshape(self.shape)
        steps = [step * values.itemsize for step in self.strides]
        return np.array(np.lib.stride_tricks.as_strided(values, tuple(self.shape), steps), order="C")


def _widened(flat: Array, kind: str) -> Array:
    if kind == "BF16":
        return (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.astype(np.float32) if kind in ("F64", "F16") else flat
