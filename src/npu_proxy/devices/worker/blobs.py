"""Compiled models as files that end with their SHA-256, and those that were compiled ahead of time for a device.

store/compiled/FINGERPRINT-DEVICE-PLATFORM-OPENVINO-VERSION/BINSxPOSITIONSxSEGMENTS.blob

A worker imports a blob instead of compiling if it is undamaged and the plugin accepts it; the device is certified in either case.
A store that is copied to another machine includes its blobs.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openvino as ov

from npu_proxy.batch import BatchShape
from npu_proxy.devices.failure import first_line
from npu_proxy.spec import ModelSpec
from npu_proxy.targets import Target
from npu_proxy.version import __version__

Blob = npt.NDArray[np.uint8]

_DIGEST = hashlib.sha256().digest_size
_checked: set[tuple[Path, int, int, bytes]] = set()
"""Files whose hash was right: each slot reads them again."""
_log = logging.getLogger("npu_proxy.worker")


def write_blob(path: Path, content: bytes) -> int:
    """Write a blob and its hash; the file appears complete or not at all. Returns its size in bytes. Raises OSError."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.write(hashlib.sha256(content).digest())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return len(content) + _DIGEST


def read_blob(path: Path) -> Blob | None:
    """Map a blob into memory (changes stay private). Returns None, and removes the file, if it is damaged. Raises OSError."""
    status = path.stat()
    if status.st_size > _DIGEST:
        mapped: Blob = np.memmap(path, np.uint8, "c")
        digest = mapped[-_DIGEST:].tobytes()
        checked = (path, status.st_ino, status.st_mtime_ns, digest)
        if checked in _checked or hashlib.sha256(mapped[:-_DIGEST].data).digest() == digest:
            _checked.add(checked)
            return mapped[:-_DIGEST]
    _log.warning("%s is damaged and was removed; the graph is compiled again", path)
    path.unlink(missing_ok=True)
    return None


def import_blob(
    core: ov.Core, target: Target, files: Sequence[Path], properties: Mapping[str, object]
) -> tuple[ov.CompiledModel, Blob] | None:
    """Import the first of these blobs that the plugin accepts, or return None. The memory must be kept as long as the model."""
    import_model: Callable[..., ov.CompiledModel] = core.import_model
    for file in files:
        try:
            blob = read_blob(file)
            if blob is not None:
                return import_model(ov.Tensor(blob, shared_memory=True), target.openvino, dict(properties)), blob
        except FileNotFoundError:
            continue
        except (OSError, RuntimeError) as error:  # made for another platform or driver
            _log.warning("%s cannot be imported, so the graph is compiled: %s", file, first_line(error))
    return None


def stored_blobs(store: Path, target: Target, spec: ModelSpec, shape: BatchShape) -> list[Path]:
    """The blobs of a batch shape for any platform of the device, made with the installed versions of OpenVINO and npu-proxy."""
    return sorted((store / "compiled").glob(f"{folder_name(target, spec, '*')}/{file_name(shape)}"))


def folder_name(target: Target, spec: ModelSpec, platform: str) -> str:
    """The name of the folder of a model's blobs for a device and platform."""
    return f"{spec.fingerprint}-{target.name}-{platform}-{ov.get_version().split('-')[0]}-{__version__}"


def file_name(shape: BatchShape) -> str:
    """The name of the file of a batch shape's blob."""
    return f"{shape}x{shape.segments}.blob"


def remove_blobs(store: Path, fingerprint: str) -> None:
    """Remove every blob of a model, or of its int8 copy."""
    for folder in (store / "compiled").glob(f"{fingerprint}-*"):
        shutil.rmtree(folder, ignore_errors=True)
