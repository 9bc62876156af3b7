"""What dialects list, show, pull and delete without loading anything. Called in threads, since it reads files."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from npu_proxy.errors import PullError, UnavailableError
from npu_proxy.models.catalog import canonical
from npu_proxy.models.pull import pull
from npu_proxy.models.store import StoredModel, is_name
from npu_proxy.prepare.commands import forget
from npu_proxy.server.dialect import Card, ForbiddenError, UnknownModelError
from npu_proxy.server.registry import Loaded, Registry
from npu_proxy.server.stock import plain
from npu_proxy.settings import Settings

_SECONDS = 60.0


class ModelShelf:
    """A dialect.Shelf over the registry, whose event loop is ``loop``."""

    def __init__(self, registry: Registry, loop: asyncio.AbstractEventLoop) -> None:
        self._registry = registry
        self._stock = registry.stock
        self._loop = loop

    @property
    def settings(self) -> Settings:
        """The server's settings."""
        return self._registry.settings

    @property
    def default(self) -> Card:
        """The first model. Raises StoppedError while it loads."""
        return self._card(self._registry.running(None) or self._registry.first)

    def cards(self) -> Sequence[Card]:
        """Every model that can be asked, loaded ones first."""
        cards = [self._card(one) for one in self._registry.loaded() if one.running]
        known = {card.spec.name for card in cards}
        for stored in self._stock.models():
            if stored.name not in known:
                with suppress(UnknownModelError):  # removed meanwhile
                    cards.append(self._stored_card(stored))
        return cards

    def find(self, name: str | None) -> Card:
        """The model of that name or alias, the first one without a name. Raises UnknownModelError."""
        one = self._registry.running(name)
        return self._card(one) if one is not None else self._stored_card(self._stock.find(name or ""))

    def pull(self, name: str, report: Callable[[str], None]) -> StoredModel:
        """Fetch a model into the store. Raises ForbiddenError where that is switched off, InputError, PullError."""
        self._allowed("pulled", "pull")
        folders = [mirror for mirror in self.settings.mirrors if Path(mirror).is_absolute() or "/" in mirror]

        def shown(words: str) -> str:
            for folder in folders:
                words = words.replace(folder, Path(folder).name)
            return words

        wanted, mirrors = canonical(name.removesuffix(":latest")), self.settings.mirrors
        try:
            return pull(self._stock.store, wanted, mirrors=mirrors, report=lambda line: report(shown(line)), folders=False)
        except PullError as error:
            raise PullError(shown(str(error))) from error

    def delete(self, name: str) -> None:
        """Unload a model and remove it from the store. Raises ForbiddenError, UnknownModelError, UnavailableError."""
        self._allowed("removed", "rm")
        stored = self._stock.store.find(name) if is_name(canonical(name)) else None
        if stored is None:
            raise UnknownModelError(name)
        asyncio.run_coroutine_threadsafe(self._drop(stored), self._loop).result(_SECONDS)
        forget(self.settings, stored.folder)
        self._stock.store.remove(stored.name)

    async def _drop(self, stored: StoredModel) -> None:
        one = self._registry.named(plain(stored.name))
        if one is None:
            return
        if one.pinned:
            raise ForbiddenError(f"`{stored.name}` is served by the server's settings; take it out of `model` first")
        if one.uses or not one.running:
            raise UnavailableError(f"`{stored.name}` is in use; try again")
        self._registry.unload(one)

    def _allowed(self, done: str, command: str) -> None:
        if not self.settings.allow_pull:
            raise ForbiddenError(
                f"models are {done} on the server itself: `npu-proxy {command}`; the setting `allow_pull` lets clients do it"
            )

    def _card(self, one: Loaded) -> Card:
        spec = one.engine.spec
        return Card(spec=spec, since=one.since, names=self._registry.aliases(one), expires=one.expires)

    def _stored_card(self, stored: StoredModel) -> Card:
        spec = self._stock.spec(stored)
        try:
            since = int((stored.folder / "config.json").stat().st_mtime)
        except OSError as error:  # removed meanwhile
            raise UnknownModelError(stored.name) from error
        if spec is None:
            raise UnknownModelError(stored.name)
        return Card(spec=spec, since=since, names=self._stock.aliases({plain(stored.name)}, first=False), loaded=False)
