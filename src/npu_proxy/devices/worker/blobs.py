"""Models compiled ahead of time, for a device of this or another machine, and where the store keeps them.

store/compiled/FINGERPRINT-DEVICE-PLATFORM-OPENVINO-VERSION/BINSxPOSITIONSxSEGMENTS.blob

A worker imports a blob instead of compiling if the plugin accepts it; the device is certified in either case. A store that is
copied to another machine includes its blobs.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import openvino as ov

from npu_proxy.batch import BatchShape
from npu_proxy.devices.failure import first_line
from npu_proxy.spec import ModelSpec
from npu_proxy.targets import Target
from npu_proxy.version import __version__

_log = logging.getLogger("npu_proxy.worker")


def stored_blobs(store: Path, target: Target, spec: ModelSpec, shape: BatchShape) -> list[Path]:
    """The blobs of a batch shape for any platform of the device, made with the installed versions of OpenVINO and npu-proxy."""
    return sorted((store / "compiled").glob(f"{folder_name(target, spec, '*')}/{file_name(shape)}"))


def import_blob(core: ov.Core, target: Target, files: Sequence[Path], properties: Mapping[str, object]) -> ov.CompiledModel | None:
    """Import the first of these blobs that the plugin accepts. Returns None if it accepts none."""
    import_model: Callable[..., ov.CompiledModel] = core.import_model
    for file in files:
        try:
            return import_model(file.read_bytes(), target.openvino, dict(properties))
        except (OSError, RuntimeError) as error:  # made for another platform or driver
            _log.warning("%s cannot be imported, so the graph is compiled: %s", file, first_line(error))
    return None


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
