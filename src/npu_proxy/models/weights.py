"""Tensors of memory-mapped safetensors files: nothing is read before a graph needs it, and nothing is copied.

Torch's .bin and .pt files are read completely (models/pickled.py). A safetensors file consists of eight bytes of header length,
a JSON header, and raw little-endian tensors. The safetensors library validates it first (offsets within the file, no overlaps),
because the map is passed to native code.
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
from npu_proxy.models.json_files import inside, read_object, short_path
from npu_proxy.models.pickled import read_pickled

Array = npt.NDArray[Any]

_KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I8": "i1", "U8": "u1"}


class NoWeightsError(ModelError):
    """A folder contains no weights."""


class MissingTensorError(ModelError, KeyError):
    """There is no tensor with this name. Also a KeyError, because a mapping's ``get`` expects one."""

    def __str__(self) -> str:
        return ModelError.__str__(self)  # KeyError would quote the message


class Tensors(Mapping[str, Array]):
    """A read-only mapping from tensor name to array, over one or several files.

    rename: maps a checkpoint's tensor name to the graph's (a family's ``canonical_name``). Half-precision tensors are
    widened to float32, which is exact. Arrays are views of the file and must not be written to.
    """

    def __init__(self, files: Sequence[Path], rename: Callable[[str], str] = str) -> None:
        self._maps: list[mmap.mmap] = []
        self._places: dict[str, tuple[mmap.mmap, int, str, list[int]]] = {}
        self._read: dict[str, Array] = {}
        for file in files:
            if file.suffix in (".bin", ".pt"):
                self._read |= {rename(name): tensor for name, tensor in read_pickled(file).items()}
                continue
            try:
                self._open(file, rename)
            except (SafetensorError, OSError, ValueError) as error:
                reason = (error.strerror or "file not found") if isinstance(error, OSError) else error  # without the path
                raise ModelError(f"{file.name} cannot be read as safetensors: {reason}") from error

    def _open(self, file: Path, rename: Callable[[str], str]) -> None:
        with safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as opened:
            # Private and copy-on-write, because OpenVINO needs writable memory; the file does not change.
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        self._maps.append(mapped)
        size = int.from_bytes(mapped[:8], "little")
        header: dict[str, Any] = json.loads(mapped[8 : 8 + size])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            self._places[rename(name)] = (mapped, 8 + size + entry["data_offsets"][0], entry["dtype"], entry["shape"])

    def __getitem__(self, name: str) -> Array:
        if name in self._read:
            return self._read[name]
        if name not in self._places:
            raise MissingTensorError(f"the weights have no tensor `{name}`")
        mapped, start, kind, shape = self._places[name]
        if kind not in _KINDS:
            raise ModelError(f"tensor `{name}` has the unsupported type {kind}; supported: {', '.join(_KINDS)}")
        count = int(np.prod(shape, dtype=np.int64))
        flat = np.frombuffer(mapped, _KINDS[kind], count, start).reshape(shape)
        if kind == "BF16":
            return (flat.astype(np.uint32) << 16).view(np.float32)
        return flat.astype(np.float32) if kind in ("F64", "F16") else flat

    def release(self) -> None:
        """Return the pages read so far to the operating system; they are read from the file again when needed."""
        for mapped in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def __contains__(self, name: object) -> bool:
        return name in self._places or name in self._read

    def __iter__(self) -> Iterator[str]:
        yield from self._places
        yield from self._read

    def __len__(self) -> int:
        return len(self._places) + len(self._read)


def weight_files(folder: Path) -> Sequence[Path]:
    """model.safetensors or the shards in its index; without them, torch's files. Raises ModelError if a file is missing."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            files = [
                inside(folder, shard, by=index.name)
                for shard in sorted({str(name) for name in read_object(index)["weight_map"].values()})
            ]
            missing = next((file for file in files if not file.is_file()), None)
            if missing is not None:
                raise ModelError(f"{short_path(missing)} is missing")
            return files
        if single.is_file():
            return [single]
    raise NoWeightsError(f"{short_path(folder / 'model.safetensors')} is missing")
