"""The models of one server: loaded at the start or on first use, kept alive, unloaded when idle or when memory runs out.

All of it changes in the event loop only, so nothing needs a lock; loading and unloading go to threads. A model that a request
uses is never unloaded.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from npu_proxy.cache.vectors import VectorCache
from npu_proxy.devices.system import available_memory
from npu_proxy.engine.engine import Engine
from npu_proxy.engine.parts import open_cache
from npu_proxy.errors import DeadlineError, InputError, StoppedError, UnavailableError
from npu_proxy.models.cl100k import FILE, NAME, Cl100k
from npu_proxy.models.pull import chosen
from npu_proxy.models.store import StoredModel
from npu_proxy.server.dialect import Served
from npu_proxy.server.stock import Stock, plain
from npu_proxy.settings import Settings
from npu_proxy.types import ModelSpec

log = logging.getLogger("npu_proxy.server")

_NAMES = 1000
"""Spellings of names that are remembered; clients may send as many as they like."""
Make = Callable[[Settings, VectorCache | None], Engine]


@dataclass(eq=False)
class Loaded:
    """A model in memory, or on its way there. uses: requests that hold it. size: bytes of its weights."""

    name: str
    engine: Engine
    pinned: bool
    size: int = 0
    since: int = field(default_factory=lambda: int(time.time()))
    uses: int = 0
    last_used: float = field(default_factory=time.monotonic)
    keep_alive: float = math.inf
    task: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None

    @property
    def running(self) -> bool:
        """Whether it can answer."""
        return self.engine.state == "running"

    @property
    def expires(self) -> float | None:
        """Unix seconds when it will be unloaded; None: never."""
        return None if math.isinf(self.keep_alive) else time.time() + self.last_used + self.keep_alive - time.monotonic()


@dataclass(slots=True)
class Use:
    """A request's hold on a model, a context manager."""

    registry: Registry
    loaded: Loaded
    served: Served
    keep_alive: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.registry.release(self.loaded, self.keep_alive)


def make_engine(settings: Settings, cache: VectorCache | None) -> Engine:
    """An engine that shares the server's cache; without one it has none of its own either."""
    return Engine(settings=replace(settings, cache_mb=0, cache_disk_mb=0, cache_url=""), cache=cache)


def unloadable(loaded: Sequence[Loaded], size: int, limit: int) -> list[Loaded] | None:
    """The models to unload so that ``size`` bytes more fit into ``limit``, longest unused first; None where they cannot."""
    over = sum(one.size for one in loaded) + size - limit
    chosen: list[Loaded] = []
    for one in sorted(loaded, key=lambda one: one.last_used):
        if over <= 0:
            break
        if not one.pinned and not one.uses and one.running:
            chosen.append(one)
            over -= one.size
    return chosen if over <= 0 else None


class Registry:
    """Owns the engines and the cache they share. ``start`` and ``stop`` once."""

    def __init__(self, settings: Settings, *, make: Make = make_engine) -> None:
        """Nothing is loaded before ``start``. Raises SettingsError for a cache or an alias that cannot be."""
        self.settings = settings
        self.stock = Stock(settings)
        self.cache = open_cache(settings)
        self._make = make
        self._limit = settings.models_mb * 1_000_000 or available_memory() // 4
        self._loaded: dict[str, Loaded] = {}
        self._by_name: dict[str, Loaded] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(8, "npu-proxy-models")
        self._cl100k: Cl100k | None = None
        self.unloaded = 0
        self.failure: str | None = None
        """Why the models of the settings could not be loaded."""
        for name in settings.model:
            own = make(replace(settings, model=(name,)), self.cache)
            self._loaded[name] = Loaded(name=name, engine=own, pinned=True)
        self.first = self._loaded[settings.model[0]]

    # -- life ----------------------------------------------------------------------------------------------------

    async def in_thread(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Run what may take long (loading, unloading, pulling) in threads of its own, so that nothing short waits for it."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    async def start(self) -> None:
        """Load the models that the settings name, one after another. Raises what loading raises."""
        for one in self.loaded():
            _, folder = await self.in_thread(self.stock.store.resolve, one.name)
            one.size = _weights(folder)
            await self.in_thread(one.engine.start)

    async def stop(self) -> None:
        """Stop every engine, after what it has under way, and write what the cache holds back."""
        loaded = self.loaded()
        for one in loaded:
            if one.timer is not None:
                one.timer.cancel()
        stops = [self.in_thread(one.engine.stop) for one in loaded]
        for outcome in await asyncio.gather(*stops, *self._tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                log.warning("stopping a model: %s", outcome)
        if self.cache is not None:
            await self.in_thread(self.cache.close)
        self._threads.shutdown(wait=False)

    def loaded(self) -> Sequence[Loaded]:
        """The models in memory, those of the settings first."""
        return list(self._loaded.values())

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes of the weights that are loaded, and how many there may be."""
        return sum(one.size for one in self._loaded.values()), self._limit

    # -- use -----------------------------------------------------------------------------------------------------

    async def acquire(self, name: str | None, seconds: float, fits: Callable[[ModelSpec], bool] | None = None) -> Use:
        """The model for a request, loaded first where that is allowed; it is not unloaded before ``Use`` ends.

        fits: without a name, the first model of the settings that does, or the first.

        Raises UnknownModelError, StoppedError, DeadlineError after ``seconds`` of loading, UnavailableError where there is no
        room.
        """
        one, waited = self._by_name.get(name) if name else self._fitting(fits), 0.0
        if one is None or not one.running:
            one = self.running(name)
            if one is None:
                start = time.monotonic()
                one = await self._summon(str(name), seconds)
                waited = time.monotonic() - start
            if name and len(self._by_name) < _NAMES:
                self._by_name[name] = one
        one.uses += 1
        engine = one.engine
        asked = name or engine.spec.name
        served = Served(
            spec=engine.spec,
            encoder=engine.encoder,
            settings=self.settings,
            asked=asked,
            load_seconds=waited,
            foreign=self._foreign,
        )
        return Use(self, one, served)

    def _fitting(self, fits: Callable[[ModelSpec], bool] | None) -> Loaded | None:
        running = (one for one in self._loaded.values() if one.pinned and one.running)
        return next((one for one in running if fits is not None and fits(one.engine.spec)), None)

    def release(self, one: Loaded, keep_alive: float | None) -> None:
        """A request is done with the model. keep_alive: seconds to stay loaded, negative for ever; None takes the setting."""
        one.uses -= 1
        one.last_used = time.monotonic()
        if not one.pinned:
            self._rest(one, self.settings.keep_alive if keep_alive is None else keep_alive)

    def running(self, name: str | None) -> Loaded | None:
        """The running model of that name; None for one that would have to be loaded. Raises StoppedError while it loads."""
        one = self.named(plain(name)) if name else self.first
        if one is not None and not one.running and one.pinned:
            raise StoppedError(self.failure or _NOT_RUNNING.get(one.engine.state, "the engine has stopped"))
        return one if one is not None and one.running else None

    def named(self, wanted: str) -> Loaded | None:
        """The model in memory, or on its way there, that has this plain name."""
        return next((one for one in self.loaded() if wanted in self._names(one)), None)

    def aliases(self, one: Loaded) -> Sequence[str]:
        """Its names by the setting `served_model_name`, as they are written there."""
        return self.stock.aliases(self._own_names(one), first=one is self.first)

    def _own_names(self, one: Loaded) -> set[str]:
        names = {plain(one.name), plain(Path(one.name).name)}
        return names | {plain(one.engine.spec.name)} if one.running else names

    def _names(self, one: Loaded) -> set[str]:
        return self._own_names(one) | set(map(plain, self.aliases(one)))

    async def _summon(self, name: str, seconds: float) -> Loaded:
        """Load a stored model, or wait for somebody else's loading of it."""
        one = self.named(plain(name))
        if one is None:
            stored = await self.in_thread(self.stock.find, name)
            one = self.named(plain(stored.name)) or self._begin(stored)  # meanwhile somebody else may have begun
        one.uses += 1  # so that it is not unloaded before it was used at all
        try:
            if one.task is not None:
                await asyncio.wait_for(asyncio.shield(one.task), seconds)
        except TimeoutError:
            raise DeadlineError(f"model `{one.name}` is still loading after {seconds:g} seconds; try again") from None
        finally:
            one.uses -= 1
        if not one.running:
            raise UnavailableError(f"model `{one.name}` was unloaded meanwhile; try again")
        return one

    def _begin(self, stored: StoredModel) -> Loaded:
        size = _weights(stored.folder)
        leaving = self._make_room(stored.name, size)
        engine = self._make(replace(self.settings, model=(stored.name,)), self.cache)
        one = self._loaded[stored.name] = Loaded(name=stored.name, engine=engine, pinned=False, size=size)
        one.task = asyncio.create_task(self._load(one, leaving))
        self._tasks.add(one.task)
        one.task.add_done_callback(self._done)
        return one

    async def _load(self, one: Loaded, leaving: Sequence[asyncio.Task[None]]) -> None:
        """Load it, once those that made room for it have left the memory."""
        log.info("loading %s", one.name)
        try:
            if leaving:
                await asyncio.wait(leaving)
            await self.in_thread(one.engine.start)
        except BaseException:
            self._forget(one)
            raise
        one.last_used = time.monotonic()
        self._rest(one, self.settings.keep_alive)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:  # those who wait get it as well
            log.warning("loading or unloading failed: %s", error)

    def _make_room(self, name: str, size: int) -> Sequence[asyncio.Task[None]]:
        chosen = unloadable(self.loaded(), size, self._limit)
        if chosen is None:
            message = f"model `{name}` ({size / 1e6:.0f} MB of weights) does not fit beside those loaded into `models_mb`"
            fixed = sum(one.size for one in self._loaded.values() if one.pinned)
            if fixed + size > self._limit:  # that will not change by itself
                raise InputError(f"{message} ({self._limit / 1e6:.0f} MB); raise it on the server", param="model")
            raise UnavailableError(f"{message}; try again when others are idle")
        return [self.unload(one) for one in chosen]

    def _rest(self, one: Loaded, keep_alive: float) -> None:
        """Note how long a model may stay idle, and look again then."""
        one.keep_alive = math.inf if keep_alive < 0 else keep_alive
        if one.timer is not None:
            one.timer.cancel()
            one.timer = None
        if not math.isinf(one.keep_alive):
            one.timer = asyncio.get_running_loop().call_later(one.keep_alive, self._expire, one)

    def _expire(self, one: Loaded) -> None:
        if not one.uses and one.running:
            self.unload(one)

    def unload(self, one: Loaded) -> asyncio.Task[None]:
        """Take a model that nobody uses out of memory; the task is done when that is."""
        log.info("unloading %s", one.name)
        self._forget(one)
        self.unloaded += 1
        task: asyncio.Task[None] = asyncio.create_task(self.in_thread(one.engine.stop, 0.0))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _forget(self, one: Loaded) -> None:
        if one.timer is not None:
            one.timer.cancel()
        self._loaded.pop(one.name, None)
        self._by_name = {name: other for name, other in self._by_name.items() if other is not one}

    def _foreign(self) -> Cl100k:
        """The decoder of cl100k_base ids. Raises InputError with the cure where it was never pulled."""
        if self._cl100k is None:
            stored = self.stock.store.find(NAME)
            if stored is None:
                raise InputError(
                    "these token ids are not of this model's vocabulary but of cl100k_base's (langchain-openai sends them unless"
                    " check_embedding_ctx_length=False), which this server cannot read yet:"
                    f" `npu-proxy pull {NAME.partition('/')[2]}` on the server, or send text",
                    param="input",
                )
            self._cl100k = Cl100k(stored.folder / FILE)
            log.warning("a client sends token ids of cl100k_base; they are turned back into text (setting `token_ids`)")
        return self._cl100k


def _weights(folder: Path) -> int:
    """Bytes of a model's weights."""
    files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    return sum((folder / file).stat().st_size for file in chosen(files) if not file.endswith(".json"))


_NOT_RUNNING = {"new": "the model is loading; try again in a moment", "stopping": "the server is stopping"}
