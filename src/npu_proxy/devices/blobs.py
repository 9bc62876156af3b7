"""Compiled models ahead of time, for this machine's device or, where OpenVINO carries its compiler, for another's.

store/compiled/FINGERPRINT-DEVICE-PLATFORM-OPENVINO-VERSION/BINSxPOSITIONSxSEGMENTS.blob

A worker imports them in place of compiling; the plugin's own verdict on a blob is final, and certification follows as
always. A store that is copied to the other machine takes them along.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openvino as ov

from npu_proxy.devices.failure import Failure, classify, first_line
from npu_proxy.devices.kinds import ANY, Target
from npu_proxy.devices.system import ask_python
from npu_proxy.errors import DeviceError, PullError
from npu_proxy.graph.packed import RowShape
from npu_proxy.types import ModelSpec
from npu_proxy.version import __version__

log = logging.getLogger("npu_proxy.worker")

_NO_COMPILER = (
    "there is no compiler for it here: OpenVINO's Windows packages carry one, its Linux packages use that of the NPU's driver,"
    " which needs the NPU (see `npu-proxy doctor`)"
)
_NO_DISK = 3
"""Exit code of the compiling process when it could not write."""


@dataclass(frozen=True, kw_only=True)
class Blob:
    """A compiled row shape on disk."""

    shape: RowShape
    size: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class BlobJob:
    """What the compiling process is told."""

    target: Target
    spec: ModelSpec
    shapes: Sequence[RowShape]
    properties: Mapping[str, object]
    platform: str
    folder: Path


def stored(store: Path, target: Target, spec: ModelSpec, shape: RowShape) -> list[Path]:
    """The blobs of a row shape for any platform of the device, this OpenVINO's."""
    return sorted((store / "compiled").glob(f"{_name(target, spec, '*')}/{_file(shape)}"))


def compile_ahead(
    store: Path, target: Target, spec: ModelSpec, shapes: Sequence[RowShape], properties: Mapping[str, object], platform: str, *,
    seconds: float,
) -> tuple[Path, list[Blob]]:  # fmt: skip
    """Compile every shape in a process of its own, within ``seconds``; the folder and what lies in it.

    Nothing is stored unless all of it compiled. Raises DeviceError with the compiler's words, PullError for a full disk.
    """
    final = store / "compiled" / _name(target, spec, platform)
    with _writing():
        final.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=final.parent))
    job = BlobJob(target=target, spec=spec, shapes=shapes, properties=properties, platform=platform, folder=staging)
    try:
        code, said = ask_python("from npu_proxy.devices.blobs import main; main()", pickle.dumps(job), seconds)
        if code is None:
            raise DeviceError(f"{target.name}: compiling took longer than {seconds:g} seconds; see `compile_timeout`")
        if code == _NO_DISK:
            raise PullError(f"the store cannot be written: {said.strip()}; free space or set `store`")
        if code:
            reason = said.strip() or f"the compiling process ended with {code}"
            cure = f"; {_NO_COMPILER}" if classify(reason) is Failure.ABSENT else ""
            raise DeviceError(f"{target.name} could not compile {spec.name}: {reason}{cure}")
        with _writing():
            blobs = [_blob(staging, shape) for shape in shapes]
            if final.exists():
                final.rename(staging / "older")
            staging.rename(final)
            shutil.rmtree(final / "older", ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return final, blobs


@contextmanager
def _writing() -> Generator[None]:
    """Raises PullError for what is wrong with the disk."""
    try:
        yield
    except OSError as error:
        raise PullError(f"the store cannot be written: {error.strerror or error}; free space or set `store`") from error


def main() -> None:
    """The compiling process: a pickled BlobJob comes in, blobs go to its folder, an error's text to standard output."""
    from npu_proxy.devices.openvino import compile_static, open_core

    job: BlobJob = pickle.load(sys.stdin.buffer)  # noqa: S301 (our own parent wrote it)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # native code prints where it likes
    elsewhere = {} if job.platform == ANY else {"NPU_PLATFORM": job.platform, "NPU_COMPILER_TYPE": "PLUGIN"}
    try:
        core = open_core(job.target)
        for shape in job.shapes:
            start = time.perf_counter()
            compiled = compile_static(core, job.target, job.spec, [shape], job.properties, demanded=elsewhere)[shape]
            path = job.folder / _file(shape)
            path.write_bytes(compiled.export_model().getvalue())
            seconds = time.perf_counter() - start
            path.with_suffix(".seconds").write_text(str(seconds))
    except OSError as error:
        print(error.strerror or error, file=out, flush=True)
        os._exit(_NO_DISK)
    except Exception as error:  # whatever it is, the parent tells the user
        print(first_line(error), file=out, flush=True)
        os._exit(1)
    os._exit(0)  # destructors of a driver may hang


def import_blob(core: ov.Core, target: Target, files: Sequence[Path], properties: Mapping[str, object]) -> ov.CompiledModel | None:
    """The first of these blobs that the plugin takes, or None."""
    importing: Callable[..., ov.CompiledModel] = core.import_model
    for file in files:
        try:
            return importing(file.read_bytes(), target.openvino, dict(properties))
        except (OSError, RuntimeError) as error:  # made for another platform or driver: the next one, or compile
            log.warning("%s is not taken, the graph is compiled: %s", file, first_line(error))
    return None


def _blob(folder: Path, shape: RowShape) -> Blob:
    path = folder / _file(shape)
    timing = path.with_suffix(".seconds")
    seconds = float(timing.read_text())
    timing.unlink()
    return Blob(shape=shape, size=path.stat().st_size, seconds=seconds)


def _name(target: Target, spec: ModelSpec, platform: str) -> str:
    return f"{spec.fingerprint}-{target.name}-{platform}-{ov.get_version().split('-')[0]}-{__version__}"


def _file(shape: RowShape) -> str:
    return f"{shape}x{shape.segments}.blob"


def remove(store: Path, fingerprint: str) -> None:
    """Remove every blob of a model, or of its int8 copy."""
    for folder in (store / "compiled").glob(f"{fingerprint}-*"):
        shutil.rmtree(folder, ignore_errors=True)
