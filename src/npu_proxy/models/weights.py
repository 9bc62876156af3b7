"""Tensors of safetensors files, memory-mapped: nothing is read before a graph needs it, and nothing is copied.

The format is eight bytes of header length, a JSON header, and raw little-endian tensors; safetensors' own reader checks
it first (offsets within the file, no overlaps), because the map is handed to native code.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from npu_proxy.errors import ModelError

Array = npt.NDArray[Any]

_KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I8": "i1", "U8": "u1"}


class Tensors(Mapping[str, Array]):
    """A read-only mapping from tensor name to array, over one or several files.

    rename: maps a checkpoint's name to the name the graph uses (a family's ``canonical_name``). Half-precision tensors
    are widened to float32, which is exact. Arrays are views of the file: they must not be written to.
    """

    def __init__(self, files: Sequence[Path], rename: Callable[[str], str] = str) -> None:
        self._maps: list[mmap.mmap] = []
        self._places: dict[str, tuple[mmap.mmap, int, str, list[int]]] = {}
        for file in files:
            try:
                self._open(file, rename)
            except (SafetensorError, OSError, ValueError) as error:
                reason = (error.strerror or "it is not there") if isinstance(error, OSError) else error  # without the path
                raise ModelError(f"{file.name} cannot be read as safetensors: {reason}") from error

    def _open(self, file: Path, rename: Callable[[str], str]) -> None:
        with safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as opened:
            # Private and copy-on-write: OpenVINO wants writeable memory, the file stays as it is.
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        self._maps.append(mapped)
        size = int.from_bytes(mapped[:8], "little")
        header: dict[str, Any] = json.loads(mapped[8 : 8 + size])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            self._places[rename(name)] = (mapped, 8 + size + entry["data_offsets"][0], entry["dtype"], entry["shape"])

    def __getitem__(self, name: str) -> Array:
        if name not in self._places:
            raise ModelError(f"the weights have no tensor `{name}`")
        mapped, start, kind, shape = self._places[name]
        if kind not in _KINDS:
            raise ModelError(f"tensor `{name}` has the type {kind}; known: {', '.join(_KINDS)}")
        count = int(np.prod(shape, dtype=np.int64))
        flat = np.frombuffer(mapped, _KINDS[kind], count, start).reshape(shape)
        if kind == "BF16":
            return (flat.astype(np.uint32) << 16).view(np.float32)
        return flat.astype(np.float32) if kind in ("F64", "F16") else flat

    def release(self) -> None:
        """Give the pages read so far back to the system; they come again from the file when touched."""
        for mapped in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
