"""The models that clients list, show, download and delete, without loading any. Used in threads, since it reads files."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from npu_proxy.errors import PullError, UnavailableError
from npu_proxy.models.catalog import canonical
from npu_proxy.models.pull import pull
from npu_proxy.models.store import StoredModel, is_name
from npu_proxy.prepare.artifacts import remove_artifacts
from npu_proxy.server.apis.contract import ModelInfo
from npu_proxy.server.errors import ForbiddenError, UnknownModelError
from npu_proxy.server.models.index import normalize_name, split_role
from npu_proxy.server.models.loaded import LoadedModels
from npu_proxy.settings import Settings

_DELETE_SECONDS = 60.0


class ServerListing:
    """A ModelListing: the models in memory when it was created, and those in the store.

    Create it in the event loop (``loop``), where the models in memory change, and use it in a thread.
    """

    def __init__(self, models: LoadedModels, loop: asyncio.AbstractEventLoop, only: str | None = None) -> None:
        """only: list nothing but the model with that name."""
        self._models = models
        self._only = only
        self._loaded = models.snapshot()
        self._index = models.index
        self._loop = loop

    @property
    def settings(self) -> Settings:
        """The server's settings."""
        return self._index.settings

    @property
    def default(self) -> ModelInfo:
        """The first model, or the only one. Raises StoppedError while it is loading, or UnknownModelError."""
        return self.find(self._only) if self._only is not None else self._first()

    def _first(self) -> ModelInfo:
        return self._loaded.find(None) or self._loaded.models[0]

    def all(self) -> Sequence[ModelInfo]:
        """Return every model that clients may request, loaded ones first."""
        if self._only is not None:
            return [self.find(self._only)]
        models = list(self._loaded.models)
        known = {model.spec.name for model in models}
        for stored in self._index.models():
            if stored.name not in known:
                with suppress(UnknownModelError):  # removed in the meantime
                    models.append(self._stored(stored))
        return models

    def find(self, name: str | None) -> ModelInfo:
        """Return the model with that name or alias, or the first model without a name. Raises UnknownModelError."""
        name = self._only or name
        own_name, role = split_role(name or "")
        if role is not None and self._loaded.find(name) is None and not self._index.has(name or ""):
            name = own_name
        return self._loaded.find(name) or self._stored(self._index.find(name or ""))

    def pull(self, name: str, report: Callable[[str], None]) -> StoredModel:
        """Download a model into the store. Raises ForbiddenError if that is not allowed, InputError or PullError."""
        self._check_allowed("download", "pull")
        folders = [mirror for mirror in self.settings.mirrors if Path(mirror).is_absolute() or "/" in mirror]

        def without_paths(message: str) -> str:
            for folder in folders:
                message = message.replace(folder, Path(folder).name)
            return message

        wanted, mirrors = canonical(name.removesuffix(":latest")), self.settings.mirrors
        try:
            return pull(
                self._index.store,
                wanted,
                mirrors=mirrors,
                report=lambda line: report(without_paths(line)),
                folders=False,
                most_bytes=int(self.settings.max_pull_gb * 1e9),
            )
        except PullError as error:
            raise PullError(without_paths(str(error))) from error

    def delete(self, name: str) -> None:
        """Unload a model and remove it from the store. Raises ForbiddenError, UnknownModelError or UnavailableError."""
        self._check_allowed("remove", "rm")
        stored = self._index.store.find(name) if is_name(canonical(name)) else None
        if stored is None:
            raise UnknownModelError(name)
        asyncio.run_coroutine_threadsafe(self._unload(stored), self._loop).result(_DELETE_SECONDS)
        remove_artifacts(self.settings, stored.folder)
        self._index.store.remove(stored.name)

    async def _unload(self, stored: StoredModel) -> None:
        model = self._models.named(normalize_name(stored.name))
        if model is None:
            return
        if model.pinned:
            raise ForbiddenError(f"`{stored.name}` is named in the server's settings; remove it from `model` first")
        if model.uses or not model.running:
            raise UnavailableError(f"`{stored.name}` is in use; try again later")
        self._models.unload(model)

    def _check_allowed(self, action: str, command: str) -> None:
        if not self.settings.allow_pull:
            raise ForbiddenError(
                f"clients may not {action} models; run `npu-proxy {command}` on the server, or set `allow_pull` to allow it"
            )

    def _stored(self, stored: StoredModel) -> ModelInfo:
        spec = self._index.spec(stored)
        try:
            since = int((stored.folder / "config.json").stat().st_mtime)
        except OSError as error:  # removed in the meantime
            raise UnknownModelError(stored.name) from error
        if spec is None:
            raise UnknownModelError(stored.name)
        names = self._index.aliases({normalize_name(stored.name)}, first=False)
        return ModelInfo(spec=spec, since=since, names=names, loaded=False)
