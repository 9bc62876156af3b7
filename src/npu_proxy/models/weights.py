"""Tensors of safetensors files, memory-mapped: a tensor is read when a graph asks for it, and not copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from npu_proxy.errors import ModelError

Array = npt.NDArray[Any]


class Tensors(Mapping[str, Array]):
    """A read-only mapping from tensor name to float32 array, over one or several files.

    rename: maps a checkpoint's name to the name the graph uses (a family's ``canonical_name``).
    Half-precision tensors are widened to float32, which is exact.
    """

    def __init__(self, files: Sequence[Path], rename: Callable[[str], str] = str) -> None:
        self._places: dict[str, tuple[Any, str]] = {}
        for file in files:
            try:
                reader: Any = safe_open(file, framework="numpy")
                names = list(reader.keys())
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file.name} cannot be read as safetensors: {error}") from error
            self._places.update({rename(name): (reader, name) for name in names})

    def __getitem__(self, name: str) -> Array:
        if name not in self._places:
            raise ModelError(f"the weights have no tensor `{name}`")
        reader, stored = self._places[name]
        try:
            tensor = np.asarray(reader.get_tensor(stored))
        except (SafetensorError, TypeError) as error:
            raise ModelError(f"tensor `{stored}` cannot be read: {error}") from error
        return tensor.astype(np.float32, copy=False) if tensor.dtype.kind in "fV" else tensor

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
