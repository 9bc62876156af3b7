"""The local store of models. A model is added to it atomically.

store/blobs/SHA256                    each file once, named by its content
store/models/ORG--NAME/               the model's folder, hard links to blobs (copies if links are not possible)
store/models/ORG--NAME/.manifest.json path, checksum and size of each file, and the mirror
store/partial/                        downloads in progress; resumed or deleted
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from npu_proxy.errors import InputError, ModelNotFoundError, PullError
from npu_proxy.models.catalog import canonical
from npu_proxy.models.fingerprint import file_sha256
from npu_proxy.models.json_files import inside
from npu_proxy.models.manifest import Manifest, ManifestFile, read_manifest, write_manifest
from npu_proxy.system import check_not_public, private_folder

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_LONGEST_NAME = 200
"""Safely below the limit of file systems."""
LOCK_SECONDS = 600


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A model in the store: its full name, folder, size in bytes, and the mirror it was pulled from."""

    name: str
    folder: Path
    size: int
    source: str


class ModelStore:
    """A store of models in one folder. Several processes may use it at once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._models = root / "models"
        self._blobs = root / "blobs"

    def partial(self, name: str) -> Path:
        """The folder in which downloads of a model are kept between attempts."""
        return self._root / "partial" / _file_name(name)

    def find(self, name: str) -> StoredModel | None:
        """The stored model with this name or alias, or None."""
        folder = self._models / _file_name(canonical(name))
        manifest = read_manifest(folder)
        if manifest is None or not is_name(manifest.name) or _file_name(manifest.name) != folder.name:
            return None
        size = sum(entry.size for entry in manifest.files.values())
        return StoredModel(name=manifest.name, folder=folder, size=size, source=manifest.source)

    def resolve(self, name: str) -> tuple[str, Path]:
        """Full name and folder of a model given by name, alias or path. Raises ModelNotFoundError if there is none.

        Raises SettingsError if every user may write to its folder.
        """
        path = Path(name).expanduser()
        if path.is_dir() and (path.is_absolute() or name.startswith(".") or not self._is_stored(name)):
            check_not_public(path)
            return path.resolve().name, path
        stored = self.find(name) if _NAME.fullmatch(canonical(name)) else None
        if stored is None:
            if path.is_absolute() or name.startswith("."):
                message = f"folder `{name}` does not exist"
            else:
                message = f"model `{name}` is neither in the local store nor a folder; download it with `npu-proxy pull {name}`"
            raise ModelNotFoundError(message, param="model")
        check_not_public(stored.folder)
        return stored.name, stored.folder

    def list(self) -> list[StoredModel]:
        """All stored models, sorted by name."""
        folders = sorted(self._models.iterdir()) if self._models.is_dir() else []
        names = (folder.name.replace("--", "/", 1) for folder in folders)
        found = (self.find(name) for name in names if is_name(name))
        return [model for model in found if model]

    def damaged(self, model: StoredModel) -> list[str]:
        """Paths of files that are missing or whose content has changed."""
        manifest = read_manifest(model.folder)
        return [
            path
            for path, entry in (manifest.files.items() if manifest else ())
            if not (file := inside(model.folder, path, by="the manifest")).is_file() or file_sha256(file) != entry.sha256
        ]

    @contextmanager
    def lock(self, name: str) -> Generator[None]:
        """Allow only one process at a time to change a model. Raises PullError after waiting for ten minutes."""
        folder = self._root / "locks"
        private_folder(folder)
        try:
            with FileLock(folder / f"{_file_name(name)}.lock", timeout=LOCK_SECONDS, mode=0o600):
                yield
        except Timeout as error:
            raise PullError(f"another process has held `{name}` for {LOCK_SECONDS} seconds; is a pull stuck?") from error

    def publish(self, name: str, source: str, files: Mapping[str, Path], *, on_file: Callable[[str], None]) -> StoredModel:
        """Copy files (path in the model -> file on disk) into the store, then publish the model atomically."""
        private_folder(self._models)
        private_folder(self._blobs)
        target = self._models / _file_name(name)
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=self._models))
        try:
            entries: dict[str, ManifestFile] = {}
            for path, file in files.items():
                on_file(path)
                entries[path] = self._take(file, staging / path)
            write_manifest(staging, Manifest(name=name, source=source, files=entries))
            if target.exists():
                retired = Path(tempfile.mkdtemp(prefix=".retired-", dir=self._models))
                target.rename(retired / "old")
                staging.rename(target)
                shutil.rmtree(retired, ignore_errors=True)
            else:
                staging.rename(target)
        except OSError as error:
            raise PullError(f"the store cannot be written: {error.strerror or error}; free space or set `store`") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        stored = self.find(name)
        assert stored is not None  # published above
        return stored

    def remove(self, name: str) -> StoredModel:
        """Remove a model, and blobs that no other model uses. Raises ModelNotFoundError if it is not stored."""
        model = self.find(name)
        if model is None:
            raise ModelNotFoundError(
                f"model `{name}` is not in the local store; `npu-proxy list` shows the models in it", param="model"
            )
        with self.lock(model.name):
            retired = model.folder.with_name(f".retired-{model.folder.name}")
            shutil.rmtree(retired, ignore_errors=True)
            model.folder.rename(retired)
            shutil.rmtree(retired, ignore_errors=True)
            self._sweep()
        return model

    def _is_stored(self, name: str) -> bool:
        return bool(_NAME.fullmatch(canonical(name))) and self.find(name) is not None

    def _take(self, file: Path, destination: Path) -> ManifestFile:
        checksum = file_sha256(file)
        blob = self._blobs / checksum
        if not blob.exists() or file_sha256(blob) != checksum:
            partial = blob.with_suffix(f".{os.getpid()}")
            shutil.copyfile(file, partial)
            partial.chmod(0o600)
            partial.replace(blob)
        private_folder(destination.parent)
        try:
            os.link(blob, destination)
        except OSError:  # a file system without hard links
            shutil.copyfile(blob, destination)
            destination.chmod(0o600)
        return ManifestFile(sha256=checksum, size=destination.stat().st_size)

    def _sweep(self) -> None:
        """Delete blobs that no manifest refers to."""
        manifests = (read_manifest(folder) for folder in self._models.iterdir() if folder.is_dir())
        used = {entry.sha256 for manifest in manifests if manifest for entry in manifest.files.values()}
        for blob in self._blobs.iterdir():
            if blob.name not in used:
                blob.unlink(missing_ok=True)


def is_name(name: str) -> bool:
    """Whether this is a model name, `name` or `org/name`, that is safe to use as a file name."""
    return bool(_NAME.fullmatch(name)) and ".." not in name and "--" not in name and len(name) <= _LONGEST_NAME


def check_name(name: str) -> str:
    """Return a name for which ``is_name`` is true. Raises InputError for any other."""
    if not is_name(name):
        raise InputError(f"`{name[:_LONGEST_NAME]}` is not a valid model name; expected `name` or `org/name`", param="model")
    return name


def _file_name(name: str) -> str:
    return check_name(name).replace("/", "--")
