"""LoRA adapters as peft writes them, merged into the weights when these are read: W + alpha / r * B A (Hu et al. 2021).

The adapter's files are beside the weights of its base model, or the base model's folder is beside the adapter's.
Source: peft 0.21 ``tuners/lora``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npu_proxy.errors import ModelError
from npu_proxy.models.json_files import Json, read_object, short_path
from npu_proxy.models.stored_tensor import Array, StoredTensor

CONFIG, STEM = "adapter_config.json", "adapter_model"
_PREFIX = "base_model.model."
_HALVES = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True, kw_only=True)
class Update:
    """What is added to a weight [out, in]: ``scale * B A``, with A [r, in] and B [out, r]."""

    first: StoredTensor
    second: StoredTensor
    scale: float

    def apply(self, weight: Array, name: str) -> Array:
        """The merged weight, float32. Raises ModelError if the shapes do not fit."""
        rank, width = self.first.shape
        if (tuple(self.second.shape), width) != ((weight.shape[0], rank), weight.shape[1]):
            raise ModelError(f"{STEM}: the update of `{name}` has the shapes {self.first.shape} and {self.second.shape}")
        first, second = (np.asarray(half.read(name), np.float32) for half in (self.first, self.second))
        return np.asarray(weight, np.float32) + np.float32(self.scale) * (second @ first)


def read_updates(found: Mapping[str, StoredTensor], folder: Path) -> dict[str, Update]:
    """The updates in an adapter's tensors, by the name of the weight that they change. Raises ModelError for any other tensor."""
    scale = adapter_scale(read_object(folder / CONFIG))
    updates: dict[str, Update] = {}
    for name, first in found.items():
        if not name.endswith(_HALVES) or not name.startswith(_PREFIX):
            raise ModelError(f"{STEM}: tensor `{name[:80]}` is not supported, only lora_A and lora_B of linear layers")
        if name.endswith(_HALVES[1]):
            if name.removesuffix(_HALVES[1]) + _HALVES[0] not in found:
                raise ModelError(f"{STEM}: tensor `{name[:80]}` has no lora_A")
            continue
        second = found.get(name.removesuffix(_HALVES[0]) + _HALVES[1])
        if second is None or len(first.shape) != 2 or len(second.shape) != 2:
            raise ModelError(f"{STEM}: tensor `{name[:80]}` is not a matrix, or its other half is missing")
        updates[name.removeprefix(_PREFIX).removesuffix(_HALVES[0]) + ".weight"] = Update(first=first, second=second, scale=scale)
    return updates


def adapter_scale(config: Json) -> float:
    """The factor of an adapter's updates. Raises ModelError for a kind of adapter that is not supported."""
    kind, rank, alpha, root = (config.get(key) for key in ("peft_type", "r", "lora_alpha", "use_rslora"))
    if kind != "LORA" or type(rank) is not int or rank < 1 or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ModelError(f"{CONFIG}: `peft_type` {kind} with `r` {rank} and `lora_alpha` {alpha} is not supported, only LORA")
    if not math.isfinite(alpha) or not isinstance(root, bool | None):
        raise ModelError(f"{CONFIG}: `lora_alpha` is {alpha} and `use_rslora` is {root}")
    return float(alpha) / (math.sqrt(rank) if root else rank)


def adapter_files(folder: Path) -> list[Path]:
    """The files of an adapter's tensors in a folder, if it has one."""
    if not (folder / CONFIG).is_file():
        return []
    files = [folder / f"{STEM}.{suffix}" for suffix in ("safetensors", "bin")]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise ModelError(f"{short_path(files[0])} is missing")
    return [found]


def base_folder(folder: Path, config: Any) -> Path:
    """The folder of the base model's configuration and weights: the adapter's own, or one beside it. Raises ModelError."""
    if (folder / "config.json").is_file():
        return folder
    base = str(config.get("base_model_name_or_path") or "")
    names = {base.replace("/", "--"), base.rpartition("/")[2]} - {"", ".", ".."}
    found = next((folder.parent / name for name in sorted(names) if (folder.parent / name / "config.json").is_file()), None)
    if found is None or "\0" in base:
        raise ModelError(
            f"{short_path(folder / CONFIG)}: this is an adapter of `{base[:100]}`, whose folder is not beside it; put it there"
        )
    return found
