"""The models of the local store by all the names that clients may use, and what each is."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from npu_proxy.errors import ModelError
from npu_proxy.models.catalog import alias, canonical
from npu_proxy.models.layout import read_spec
from npu_proxy.models.store import Store, StoredModel
from npu_proxy.server.dialect import UnknownModelError
from npu_proxy.settings import Settings
from npu_proxy.types import ModelSpec

log = logging.getLogger("npu_proxy.server")


def plain(name: str) -> str:
    """A name as names are compared: the full name for an alias, lower case, without `:latest`."""
    return canonical(name).lower().removesuffix(":latest")


class Stock:
    """What may be loaded. Reads files, so it is asked in threads."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = Store(settings.store)
        pairs = [one.partition("=") for one in settings.served_model_name]
        self._aliases: Mapping[str, tuple[str, str]] = {plain(short): (short, plain(target)) for short, _, target in pairs}
        self._specs: dict[Path, tuple[float, ModelSpec | None]] = {}

    def aliases(self, names: set[str], *, first: bool) -> Sequence[str]:
        """The names of `served_model_name` that mean the model of these plain names, or the first model."""
        return [short for short, target in self._aliases.values() if target in names or (first and not target)]

    def find(self, name: str) -> StoredModel:
        """The stored model of a name or alias. Raises UnknownModelError, also where models are not loaded on demand."""
        wanted = plain(name)
        _, target = self._aliases.get(wanted, ("", ""))
        for stored in self.models():
            if (target or wanted) in (plain(stored.name), alias(stored.name)):
                return stored
        raise UnknownModelError(name)

    def models(self) -> Iterator[StoredModel]:
        """Those that can be served; none where models are not loaded on demand."""
        for stored in self.store.list() if self.settings.load_on_demand else ():
            if self.spec(stored) is not None:
                yield stored

    def spec(self, stored: StoredModel) -> ModelSpec | None:
        """What a stored model is; None for one that this version cannot serve. Read once for each state of its folder."""
        spec = None
        try:
            changed = stored.folder.stat().st_mtime
        except OSError:  # it was removed meanwhile
            return None
        known = self._specs.get(stored.folder)
        if known is not None and known[0] == changed:
            return known[1]
        try:
            spec = read_spec(stored.folder, name=stored.name, pooling=self.settings.pooling, max_length=self.settings.max_length)
        except (ModelError, OSError) as error:
            log.info("%s cannot be served: %s", stored.name, error)
        self._specs[stored.folder] = (changed, spec)
        return spec
