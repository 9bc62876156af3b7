"""The tensors of a model's weight files: found by their headers, and read when a graph needs them.

A safetensors file consists of eight bytes of header length, a JSON header, and raw little-endian tensors; the safetensors library
validates it first. Torch's .bin and .pt files are in models/pickled.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from npu_proxy.errors import ModelError
from npu_proxy.models.json_files import inside, read_object, short_path
from npu_proxy.models.lora import STEM, Update, read_updates
from npu_proxy.models.pickled import find_tensors
from npu_proxy.models.stored_tensor import KINDS, MOST_DIMENSIONS, Array, StoredTensor, width_of

_LARGEST_HEADER = 8 << 20
"""Bytes of a safetensors header, of which a tensor takes about 100."""


class NoWeightsError(ModelError):
    """A folder contains no weights."""


class MissingTensorError(ModelError, KeyError):
    """There is no tensor with this name. Also a KeyError, because a mapping's ``get`` expects one."""

    def __str__(self) -> str:
        return ModelError.__str__(self)  # KeyError would quote the message


class Tensors(Mapping[str, Array]):
    """A read-only mapping from tensor name to array, over one or several files. Every access reads the tensor from its file.

    A LoRA adapter among the files is merged into the tensors that it changes (models/lora.py).

    rename: maps a checkpoint's tensor name to the graph's (a family's ``canonical_name``). Half-precision tensors are
    widened to float32, which is exact.
    """

    def __init__(self, files: Sequence[Path], rename: Callable[[str], str] = str) -> None:
        """Find the tensors without reading them. Raises ModelError."""
        self._stored: dict[str, StoredTensor] = {}
        self._updates: dict[str, Update] = {}
        for file in files:
            found = find_tensors(file) if file.suffix in (".bin", ".pt") else _find_safetensors(file)
            if file.stem == STEM:
                self._updates = {rename(name): update for name, update in read_updates(found, file.parent).items()}
                continue
            for name, tensor in found.items():
                renamed = rename(name)
                if renamed in self._stored:
                    raise ModelError(f"{file.name}: tensor `{name[:80]}` is in the weights twice, as `{renamed[:80]}`")
                self._stored[renamed] = tensor
        if (unknown := next((name for name in self._updates if name not in self._stored), None)) is not None:
            raise ModelError(f"{STEM}: the weights have no tensor `{unknown}`, which the adapter changes")

    def shape(self, name: str) -> Sequence[int]:
        """The shape of a tensor. Raises MissingTensorError."""
        return self._find(name).shape

    def __getitem__(self, name: str) -> Array:
        weight = self._find(name).read(name)
        return self._updates[name].apply(weight, name) if name in self._updates else weight

    def rows(self, name: str, numbers: Sequence[int]) -> Array:
        """Some rows of a matrix, of which only these are read: [len(numbers), width]. Raises ModelError."""
        stored = self._find(name)
        if stored.strides is not None or len(stored.shape) != 2 or name in self._updates:
            return self[name][list(numbers)]
        step = stored.shape[1] * width_of(stored.kind) if stored.kind in KINDS else 0
        found = [replace(stored, start=stored.start + number * step, shape=stored.shape[1:]).read(name) for number in numbers]
        return np.stack(found)

    def _find(self, name: str) -> StoredTensor:
        if name not in self._stored:
            raise MissingTensorError(f"the weights have no tensor `{name}`")
        return self._stored[name]

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


class KeptTensors(Tensors):
    """Tensors that are read once, so that all graphs share their memory, until ``release``."""

    def __init__(self, files: Sequence[Path], rename: Callable[[str], str] = str) -> None:
        super().__init__(files, rename)
        self._kept: dict[str, Array] = {}

    def __getitem__(self, name: str) -> Array:
        found = self._kept.get(name)
        if found is None:
            found = self._kept[name] = super().__getitem__(name)
        return found

    def release(self) -> None:
        """Forget what was read; what a compiled graph needs stays in memory with it."""
        self._kept.clear()


def _find_safetensors(file: Path) -> Mapping[str, StoredTensor]:
    """The tensors of a safetensors file by name. Raises ModelError."""
    try:
        file_size = file.stat().st_size
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            if size > _LARGEST_HEADER:
                raise ModelError(f"{file.name} cannot be read as safetensors: its header has {size} bytes, which is too large")
            header = opened.read(size)
        with safe_open(file, framework="numpy"):  # checks that the tensors lie within the file and do not overlap
            pass
        entries: dict[str, Any] = json.loads(header)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        reason = (error.strerror or "file not found") if isinstance(error, OSError) else error  # without the path
        raise ModelError(f"{file.name} cannot be read as safetensors: {reason}") from error
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        if len(entry["shape"]) > MOST_DIMENSIONS or any(size > file_size for size in entry["shape"]):
            shape = str(entry["shape"])[:80]
            raise ModelError(f"{file.name} cannot be read as safetensors: tensor `{name[:80]}` has the shape {shape}")
    return {
        name: StoredTensor(
            file=file,
            file_size=file_size,
            start=8 + size + entry["data_offsets"][0],
            kind=entry["dtype"],
            shape=tuple(entry["shape"]),
        )
        for name, entry in entries.items()
    }


def weight_files(folder: Path) -> Sequence[Path]:
    """model.safetensors, else the shards in its index; without them, torch's files. Raises ModelError if a file is missing."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if single.is_file():  # transformers, too, prefers it to shards, which may be older
            return [single]
        if index.is_file():
            files = [
                inside(folder, shard, by=index.name)
                for shard in sorted({str(name) for name in read_object(index)["weight_map"].values()})
            ]
            missing = next((file for file in files if not file.is_file()), None)
            if missing is not None:
                raise ModelError(f"{short_path(missing)} is missing")
            return files
    if any(folder.glob("*.gguf")):
        raise NoWeightsError(
            f"{folder.name} has its weights as GGUF, which npu-proxy does not read; pull the repository with safetensors that they"
            " were made from (usually its name without `-GGUF`)"
        )
    raise NoWeightsError(f"{short_path(folder / 'model.safetensors')} is missing")
