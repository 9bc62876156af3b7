"""Tensors of torch's .bin and .pt files without torch, and without running what a pickle asks to be run.

Such a file is a zip archive: ``data.pkl`` says which tensors there are, the others hold their numbers. The unpickler here
knows four names, all of which only describe tensors; any other is an error. Source: torch.serialization.
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
                found: Any = _Reader(content, archive, main.removesuffix("data.pkl")).load()
    except Exception as error:  # a broken pickle raises whatever it likes
        raise ModelError(f"{file.name} cannot be read as tensors: {error}; a model.safetensors is safer and faster") from error
    if not isinstance(found, dict) or not all(isinstance(one, np.ndarray) for one in found.values()):
        raise ModelError(f"{file.name}: expected tensors by name")
    return found


class _Reader(pickle.Unpickler):
    def __init__(self, content: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(content)
        self._archive = archive
        self._folder = folder

    def find_class(self, module: str, name: str) -> Any:
        """Only what describes tensors."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")):
            return _tensor if name == "_rebuild_tensor_v2" else _parameter
        if module == "torch" and name in _TYPES:
            return name
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no tensor")

    def persistent_load(self, pid: Any) -> npt.NDArray[Any]:
        """The numbers that a tensor names."""
        kind, of, key, *_ = pid
        if kind != "storage" or of not in _TYPES:
            raise pickle.UnpicklingError(f"unknown storage {of}")
        entry = self._archive.getinfo(f"{self._folder}data/{key}")
        if entry.compress_type != zipfile.ZIP_STORED:  # torch never packs; what is packed may unpack to any size
            raise pickle.UnpicklingError("its numbers are compressed")
        numbers = np.frombuffer(self._archive.read(entry), _TYPES[of])
        if of == "BFloat16Storage":
            return (numbers.astype(np.uint32) << 16).view(np.float32)
        return numbers.astype(np.float32) if of in ("DoubleStorage", "HalfStorage") else numbers


def _tensor(storage: npt.NDArray[Any], offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> npt.NDArray[Any]:
    reach = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True)) if all(size) else offset
    if offset < 0 or min(stride, default=0) < 0 or (all(size) and reach >= len(storage)):
        raise pickle.UnpicklingError("a tensor reaches beyond its numbers")
    if math.prod(size) > len(storage):
        raise pickle.UnpicklingError("a tensor has more numbers than are stored for it")
    steps = [step * storage.itemsize for step in stride]
    return np.array(np.lib.stride_tricks.as_strided(storage[offset:], size, steps))  # a copy: OpenVINO wants writeable memory


def _parameter(tensor: npt.NDArray[Any], *_: Any) -> npt.NDArray[Any]:
    return tensor
