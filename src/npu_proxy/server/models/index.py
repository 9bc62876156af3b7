"""The models in the local store, by every name that clients may use, without loading them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from npu_proxy.errors import ModelError
from npu_proxy.models.catalog import alias, canonical
from npu_proxy.models.resolve import read_folder
from npu_proxy.models.store import ModelStore, StoredModel
from npu_proxy.server.errors import UnknownModelError
from npu_proxy.settings import Settings
from npu_proxy.spec import ModelSpec

_log = logging.getLogger("npu_proxy.server")


def normalize_name(name: str) -> str:
    """Return a name in the form used for comparison: the full name for an alias, lower case, without `:latest`."""
    return canonical(name).lower().removesuffix(":latest")


def split_role(name: str) -> tuple[str, str | None]:
    """Split a name that ends in `:query` or `:document`, the role of the texts; otherwise the role is None."""
    own_name, _, role = name.rpartition(":")
    return (own_name, role) if own_name and role in ("query", "document") else (name, None)


class ModelIndex:
    """The models that can be loaded. Reads files, so it is used in threads; several threads may use it at once."""

    def __init__(self, settings: Settings) -> None:
        self.store: ModelStore = ModelStore(settings.store)
        self._aliases: Mapping[str, tuple[str, str]] = {}
        self.take_over(settings)
        self._specs: dict[Path, tuple[float, ModelSpec | None]] = {}

    def take_over(self, settings: Settings) -> None:
        """Use these settings, and their names for models, from now on."""
        self.settings = settings
        pairs = [name.partition("=") for name in settings.served_model_name]
        self._aliases = {normalize_name(short): (short, normalize_name(target)) for short, _, target in pairs}

    def aliases(self, names: set[str], *, first: bool) -> Sequence[str]:
        """Return the names in `served_model_name` of a model. names: its normalized names. first: whether it is the first model."""
        return [short for short, target in self._aliases.values() if target in names or (first and not target)]

    def is_alias(self, wanted: str) -> bool:
        """Whether a normalized name is one of `served_model_name`."""
        return wanted in self._aliases

    def find(self, name: str) -> StoredModel:
        """Return the stored model with a name or alias. Raises UnknownModelError, also if models are not loaded on demand."""
        wanted = normalize_name(name)
        _, target = self._aliases.get(wanted, ("", ""))
        for stored in self.models():
            if (target or wanted) in (normalize_name(stored.name), alias(stored.name)):
                return stored
        served = [alias(Path(model).name if Path(model).is_absolute() else model) for model in self.settings.model]
        raise UnknownModelError(name, [*served, *(short for short, _ in self._aliases.values())])

    def has(self, name: str) -> bool:
        """Whether a stored model has exactly that name or alias."""
        try:
            return bool(self.find(name))
        except UnknownModelError:
            return False

    def spec_of(self, name: str) -> ModelSpec | None:
        """Return the spec of the stored model with a name or alias; None if there is none."""
        try:
            return self.spec(self.find(name))
        except UnknownModelError:
            return None

    def models(self) -> Iterator[StoredModel]:
        """Yield the models that can be served; none if models are not loaded on demand."""
        for stored in self.store.list() if self.settings.load_on_demand else ():
            if self.spec(stored) is not None:
                yield stored

    def spec(self, stored: StoredModel) -> ModelSpec | None:
        """Return a stored model's spec, or None if this version cannot serve it. Read again only after its folder has changed."""
        spec = None
        try:
            changed = stored.folder.stat().st_mtime
        except OSError:  # removed in the meantime
            return None
        known = self._specs.get(stored.folder)
        if known is not None and known[0] == changed:
            return known[1]
        try:
            spec = read_folder(self.settings, stored.folder, stored.name)
        except (ModelError, OSError) as error:
            _log.info("%s cannot be served: %s", stored.name, error)
        self._specs[stored.folder] = (changed, spec)
        return spec
