"""Compiles a model ahead of time, in a separate process, for a device of this or another machine."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from npu_proxy.batch import BatchShape
from npu_proxy.devices.failure import Failure, classify_failure, first_line
from npu_proxy.devices.openvino import open_core
from npu_proxy.devices.worker.blobs import file_name, folder_name, write_blob
from npu_proxy.devices.worker.compile import compile_static
from npu_proxy.errors import DeviceError, PullError
from npu_proxy.spec import ModelSpec
from npu_proxy.system import private_folder, run_python
from npu_proxy.targets import ANY_PLATFORM, Target

_NO_COMPILER = (
    "this machine has no compiler for it: OpenVINO's Windows packages contain one, its Linux packages use the one in the"
    " NPU's driver, which needs the NPU (see `npu-proxy doctor`)"
)
_NO_DISK = 3
"""Exit code of the compiling process if it cannot write to the disk."""


@dataclass(frozen=True, kw_only=True)
class Blob:
    """A compiled batch shape on disk: its size in bytes, and how many seconds compiling took."""

    shape: BatchShape
    size: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class CompileJob:
    """The input of the compiling process."""

    target: Target
    spec: ModelSpec
    shapes: Sequence[BatchShape]
    properties: Mapping[str, object]
    platform: str
    folder: Path


def compile_ahead(
    store: Path,
    target: Target,
    spec: ModelSpec,
    shapes: Sequence[BatchShape],
    properties: Mapping[str, object],
    platform: str,
    *,
    seconds: float,
) -> tuple[Path, list[Blob]]:
    """Compile every shape in a separate process, within ``seconds``. Returns the folder and the blobs in it.

    Nothing is stored unless every shape compiles. Raises DeviceError with the compiler's message, or PullError if the store
    cannot be written.
    """
    final = store / "compiled" / folder_name(target, spec, platform)
    with _disk_errors():
        private_folder(final.parent)
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=final.parent))
    job = CompileJob(target=target, spec=spec, shapes=shapes, properties=properties, platform=platform, folder=staging)
    try:
        code, printed = run_python("from npu_proxy.devices.worker.compile_ahead import main; main()", pickle.dumps(job), seconds)
        if code is None:
            raise DeviceError(f"{target.name}: compiling took longer than {seconds:g} seconds; increase `compile_timeout`")
        if code == _NO_DISK:
            raise PullError(f"the store cannot be written: {printed.strip()}; free disk space or set `store` to another folder")
        if code:
            reason = printed.strip() or f"the compiling process exited with code {code}"
            hint = f"; {_NO_COMPILER}" if classify_failure(reason) is Failure.ABSENT else ""
            raise DeviceError(f"{target.name} could not compile {spec.name}: {reason}{hint}")
        with _disk_errors():
            blobs = [_read_blob(staging, shape) for shape in shapes]
            if final.exists():
                final.rename(staging / "older")
            staging.rename(final)
            shutil.rmtree(final / "older", ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return final, blobs


def main() -> None:
    """Run the compiling process: read a pickled CompileJob, write blobs to its folder, print the message of an error."""
    job: CompileJob = pickle.load(sys.stdin.buffer)  # noqa: S301 (written by the parent process)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # native code may print to standard output
    other_platform = {} if job.platform == ANY_PLATFORM else {"NPU_PLATFORM": job.platform, "NPU_COMPILER_TYPE": "PLUGIN"}
    try:
        core = open_core(job.target)
        for shape in job.shapes:
            start = time.perf_counter()
            compiled = compile_static(core, job.target, job.spec, [shape], job.properties, required=other_platform).models[shape]
            path = job.folder / file_name(shape)
            write_blob(path, compiled.export_model().getvalue())
            seconds = time.perf_counter() - start
            path.with_suffix(".seconds").write_text(str(seconds))
    except OSError as error:
        print(error.strerror or error, file=out, flush=True)
        os._exit(_NO_DISK)
    except Exception as error:  # the parent process reports it
        print(first_line(error), file=out, flush=True)
        os._exit(1)
    os._exit(0)  # a driver's destructors may hang


@contextmanager
def _disk_errors() -> Generator[None]:
    """Raise PullError in place of OSError."""
    try:
        yield
    except OSError as error:
        raise PullError(
            f"the store cannot be written: {error.strerror or error}; free disk space or set `store` to another folder"
        ) from error


def _read_blob(folder: Path, shape: BatchShape) -> Blob:
    path = folder / file_name(shape)
    timing = path.with_suffix(".seconds")
    seconds = float(timing.read_text())
    timing.unlink()
    return Blob(shape=shape, size=path.stat().st_size, seconds=seconds)
