"""Read tensors from torch's .bin and .pt files without torch, and without executing code in the pickle.

Such a file is a zip archive: ``data.pkl`` lists the tensors, and the other members contain their numbers. This unpickler accepts
only names that describe tensors; any other is an error. Source: torch.serialization.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npu_proxy.errors import ModelError

_TYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "<u2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "CharStorage": "i1",
    "ByteStorage": "u1",
}


def read_pickled(file: Path) -> Mapping[str, npt.NDArray[Any]]:
    """The tensors of a state dict by name, half precision widened to float32. Raises ModelError."""
    try:
        with zipfile.ZipFile(file) as archive:
            (main,) = (name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl")
            with archive.open(main) as content:
                tensors: Any = _Reader(content, archive, main.removesuffix("data.pkl")).load()
    except Exception as error:  # a malformed pickle can raise anything
        raise ModelError(f"{file.name} cannot be read as tensors: {error}; model.safetensors is safer and faster") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, np.ndarray) for tensor in tensors.values()):
        raise ModelError(f"{file.name}: expected a dictionary of tensors")
    return tensors


class _Reader(pickle.Unpickler):
    def __init__(self, content: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(content)
        self._archive = archive
        self._folder = folder

    def find_class(self, module: str, name: str) -> Any:
        """Resolve only names that describe tensors."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")):
            return _tensor if name == "_rebuild_tensor_v2" else _parameter
        if module == "torch" and name in _TYPES:
            return name
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not part of a tensor")

    def persistent_load(self, pid: Any) -> npt.NDArray[Any]:
        """The numbers of the storage that a tensor refers to."""
        kind, storage_type, key, *_ = pid
        if kind != "storage" or storage_type not in _TYPES:
            raise pickle.UnpicklingError(f"unknown storage {storage_type}")
        entry = self._archive.getinfo(f"{self._folder}data/{key}")
        if entry.compress_type != zipfile.ZIP_STORED:  # torch never compresses them; compressed data can expand to any size
            raise pickle.UnpicklingError("its storage is compressed")
        numbers = np.frombuffer(self._archive.read(entry), _TYPES[storage_type])
        if storage_type == "BFloat16Storage":
            return (numbers.astype(np.uint32) << 16).view(np.float32)
        return numbers.astype(np.float32) if storage_type in ("DoubleStorage", "HalfStorage") else numbers


def _tensor(storage: npt.NDArray[Any], offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> npt.NDArray[Any]:
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True)) if all(size) else offset
    if offset < 0 or min(stride, default=0) < 0 or (all(size) and last >= len(storage)):
        raise pickle.UnpicklingError("a tensor extends beyond its storage")
    if math.prod(size) > len(storage):
        raise pickle.UnpicklingError("a tensor has more numbers than its storage")
    steps = [step * storage.itemsize for step in stride]
    # A copy, because OpenVINO needs writable memory.
    return np.array(np.lib.stride_tricks.as_strided(storage[offset:], size, steps))


def _parameter(tensor: npt.NDArray[Any], *_: Any) -> npt.NDArray[Any]:
    return tensor
