"""The models in a server's memory: loaded at startup or on first use, unloaded when idle or to make room for others.

All state belongs to the event loop, so it needs no lock: loading and unloading run in threads, and threads that list models
get a snapshot. A model is never unloaded while a request uses it.

Longer than most files here, so that the states of a model and the transitions between them can be read together.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from npu_proxy.cache.tiers import open_cache, without_cache
from npu_proxy.cache.vectors import VectorCache
from npu_proxy.engine.engine import Engine
from npu_proxy.errors import DeadlineError, InputError, StoppedError, UnavailableError
from npu_proxy.models.cl100k import FILE, NAME, Cl100k
from npu_proxy.models.per_model import check_models, settings_of
from npu_proxy.models.pull import model_files
from npu_proxy.models.store import StoredModel
from npu_proxy.server.apis.contract import KINDS, ModelInfo, ServedModel, kind_of
from npu_proxy.server.models.index import ModelIndex, normalize_name, split_role
from npu_proxy.settings import Settings
from npu_proxy.spec import ModelSpec
from npu_proxy.system import available_memory

_log = logging.getLogger("npu_proxy.server")

_REMEMBERED_NAMES = 1000
"""How many spellings of names are remembered; clients can send any number of them."""
_NOT_RUNNING = {"new": "the model is loading; try again shortly", "stopping": "the server is stopping"}
MakeEngine = Callable[[Settings, VectorCache | None], Engine]


@dataclass(eq=False)
class LoadedModel:
    """A model that is in memory or being loaded. uses: requests that use it now. size: bytes of its weights."""

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
        """Whether it can serve requests."""
        return self.engine.state == "running"

    @property
    def expires(self) -> float | None:
        """When it will be unloaded, in Unix seconds; None for never."""
        return None if math.isinf(self.keep_alive) else time.time() + self.last_used + self.keep_alive - time.monotonic()


@dataclass(frozen=True, kw_only=True)
class LoadedSnapshot:
    """The models that were running at one time. unavailable: why a model cannot serve requests, by normalized name."""

    models: Sequence[ModelInfo]
    by_name: dict[str, ModelInfo]
    unavailable: dict[str, str]
    first: str

    def find(self, name: str | None) -> ModelInfo | None:
        """Return the running model with that name, or None if it must be loaded first. Raises StoppedError while it is loading."""
        wanted = normalize_name(name) if name else self.first
        if wanted in self.unavailable:
            raise StoppedError(self.unavailable[wanted])
        return self.by_name.get(wanted)


@dataclass(slots=True)
class ModelUse:
    """A context manager that holds a model for a request. keep_alive: see LoadedModels.release."""

    models: LoadedModels
    model: LoadedModel
    served: ServedModel
    keep_alive: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.models.release(self.model, self.keep_alive)


def make_engine(settings: Settings, cache: VectorCache | None) -> Engine:
    """Create an engine that uses the server's cache, or no cache if the server has none."""
    return Engine(settings=without_cache(settings), cache=cache)


def _weights_limit(settings: Settings) -> int:
    """Maximum bytes of weights in memory."""
    return settings.models_mb * 1_000_000 if settings.models_mb else available_memory() // 4


def unloadable(loaded: Sequence[LoadedModel], size: int, limit: int) -> list[LoadedModel] | None:
    """Return the models to unload to fit ``size`` more bytes into ``limit``, least recently used first; None if impossible."""
    excess = sum(model.size for model in loaded) + size - limit
    chosen: list[LoadedModel] = []
    for model in sorted(loaded, key=lambda model: model.last_used):
        if excess <= 0:
            break
        if not model.pinned and not model.uses and model.running:
            chosen.append(model)
            excess -= model.size
    return chosen if excess <= 0 else None


class LoadedModels:
    """Owns the engines and their shared cache. Call ``start`` and ``stop`` once each."""

    def __init__(self, settings: Settings, *, make: MakeEngine = make_engine) -> None:
        """Create the engines without loading any model. Raises SettingsError if the cache or an alias is invalid."""
        self.settings: Settings = settings
        self.index: ModelIndex = ModelIndex(settings)
        check_models(settings, (stored.name for stored in self.index.store.list()))
        self.cache: VectorCache | None = open_cache(settings)
        self._make = make
        self._limit = _weights_limit(settings)
        self._loaded: dict[str, LoadedModel] = {}
        self._by_name: dict[str, tuple[LoadedModel, str | None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(8, "npu-proxy-models")
        self._cl100k: Cl100k | None = None
        self._stopping = False
        self.unloaded: int = 0
        self.failure: str | None = None
        """Why the models of the settings could not be loaded."""
        for name in settings.model:
            engine = make(settings_of(settings, name), self.cache)
            self._loaded[name] = LoadedModel(name=name, engine=engine, pinned=True)
        self.first: LoadedModel = self._loaded[settings.model[0]]

    # -- life cycle ----------------------------------------------------------------------------------------------

    async def in_thread(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Run a slow call (loading, unloading, downloading) in a separate thread pool, so that short calls do not wait for it."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    async def start(self) -> None:
        """Load the models named in the settings, one after another. Raises any error of loading."""
        for model in self.loaded():
            _, folder = await self.in_thread(self.index.store.resolve, model.name)
            model.size = _weight_bytes(folder)
            await self.in_thread(model.engine.start)

    async def stop(self) -> None:
        """Stop every engine after its requests in progress, and write the cache's pending entries."""
        self._stopping = True
        loaded = self.loaded()
        for model in loaded:
            if model.timer is not None:
                model.timer.cancel()
        stops = [self.in_thread(model.engine.stop) for model in loaded]
        for outcome in await asyncio.gather(*stops, *self._tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                _log.warning("stopping a model failed: %s", outcome)
        if self.cache is not None:
            await self.in_thread(self.cache.close)
        self._threads.shutdown(wait=False)

    def loaded(self) -> Sequence[LoadedModel]:
        """Return the models in memory, those named in the settings first."""
        return list(self._loaded.values())

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes of the loaded weights, and the limit on them."""
        return sum(model.size for model in self._loaded.values()), self._limit

    def snapshot(self) -> LoadedSnapshot:
        """Return the models that are running now, for use in a thread."""
        models: list[ModelInfo] = []
        by_name: dict[str, ModelInfo] = {}
        unavailable: dict[str, str] = {}
        for model in self.loaded():
            names = self._names(model)
            if model.running:
                aliases = self._aliases(model)
                info = ModelInfo(
                    spec=model.engine.spec,
                    since=model.since,
                    names=aliases,
                    expires=model.expires,
                    tokens_per_second=model.engine.stats().tokens_per_second,
                )
                models.append(info)
                by_name |= dict.fromkeys(names - by_name.keys(), info)
            elif model.pinned:
                unavailable |= dict.fromkeys(names, self._why_not_running(model))
        for info in models:  # a kind is a name for its first model, unless a model has that name
            if not self.index.is_alias(kind_of(info.spec)):
                by_name.setdefault(kind_of(info.spec), info)
        return LoadedSnapshot(
            models=models, by_name=by_name, unavailable=unavailable, first=next(iter(self._own_names(self.first)))
        )

    async def take_over(self, settings: Settings) -> None:
        """Use the limits and names of these settings from now on. Models that get a name are loaded before they do.

        Raises ModelNotFoundError if there is no such model.
        """
        targets = [name.partition("=")[2] for name in settings.served_model_name]
        with ExitStack() as held:
            for target in filter(None, targets):
                held.enter_context(await self.acquire(target, settings.bulk_timeout))
        self.settings = settings
        self._limit = _weights_limit(settings)
        self.index.take_over(settings)
        self._by_name.clear()
        for model in self.loaded():
            model.engine.change_limits(settings)

    # -- use -----------------------------------------------------------------------------------------------------

    async def acquire(self, name: str | None, seconds: float, suits: Callable[[ModelSpec], bool] | None = None) -> ModelUse:
        """Return the model for a request, loading it first if that is allowed. It is not unloaded before the ModelUse ends.

        suits: if no name is given, the first model of the settings that suits is used, or else the first of all.

        Raises UnknownModelError, StoppedError, DeadlineError if loading takes longer than ``seconds``, or UnavailableError if
        there is no room.
        """
        model, role = self._by_name.get(name, (None, None)) if name else (self._first_suitable(suits), None)
        load_seconds = 0.0
        if model is None or not model.running:
            own_name, role = await self._without_role(name) if name else (name, None)
            model = self.running(own_name)
            if model is None:
                start = time.monotonic()
                model = await self._load_on_demand(str(own_name), seconds)
                load_seconds = time.monotonic() - start
            if name and len(self._by_name) < _REMEMBERED_NAMES:
                self._by_name[name] = (model, role)
        model.uses += 1
        engine = model.engine
        served = ServedModel(
            spec=engine.spec,
            tokenizer=engine.tokenizer,
            settings=self.settings,
            requested_name=name or engine.spec.name,
            load_seconds=load_seconds,
            cl100k=self._cl100k_decoder,
            role=role,
        )
        return ModelUse(self, model, served)

    async def _without_role(self, name: str) -> tuple[str, str | None]:
        """Split `NAME:query` or `NAME:document` into the name and the role. A model that has the whole name comes first."""
        own_name, role = split_role(name)
        if role is None or self.named(normalize_name(name)) is not None:
            return name, None
        return (name, None) if await self.in_thread(self.index.has, name) else (own_name, role)

    def release(self, model: LoadedModel, keep_alive: float | None) -> None:
        """End a request's use of the model. keep_alive: seconds to keep it loaded, negative for forever; None uses the setting."""
        model.uses -= 1
        model.last_used = time.monotonic()
        if not model.pinned:
            self._schedule_unload(model, self.settings.keep_alive if keep_alive is None else keep_alive)

    def running(self, name: str | None) -> LoadedModel | None:
        """Return the running model with that name, or None if it must be loaded first. Raises StoppedError while it is loading."""
        model = self.named(normalize_name(name)) if name else self.first
        if model is not None and not model.running and model.pinned:
            raise StoppedError(self._why_not_running(model))
        return model if model is not None and model.running else None

    def named(self, wanted: str) -> LoadedModel | None:
        """Return the model with this normalized name that is in memory or being loaded, or None.

        A kind (`embedding`, `reranker`, ...) is a name for its first model, unless a model has that name.
        """
        loaded = self.loaded()
        named = (model for model in loaded if wanted in self._names(model))
        if (found := next(named, None)) is not None or wanted not in KINDS or self.index.is_alias(wanted):
            return found
        return next((model for model in loaded if model.running and kind_of(model.engine.spec) == wanted), None)

    async def first_suiting(self, name: str | None, choices: Sequence[Callable[[ModelSpec], bool]]) -> int:
        """Return the index of the first of ``choices`` that suits the model with that name, or any model if there is no name.

        0 if none does, or if the name is unknown, which is an error later.
        """
        if name is None:
            return next((number for number, suits in enumerate(choices) if self._first_suitable(suits) is not None), 0)
        own_name, _ = await self._without_role(name)
        model = self.named(normalize_name(own_name))
        if model is not None and model.running:
            spec: ModelSpec | None = model.engine.spec
        else:
            spec = await self.in_thread(self.index.spec_of, own_name)
        return next((number for number, suits in enumerate(choices) if spec is not None and suits(spec)), 0)

    def _first_suitable(self, suits: Callable[[ModelSpec], bool] | None) -> LoadedModel | None:
        running = (model for model in self._loaded.values() if model.pinned and model.running)
        return next((model for model in running if suits is not None and suits(model.engine.spec)), None)

    def _why_not_running(self, model: LoadedModel) -> str:
        return self.failure or _NOT_RUNNING.get(model.engine.state, "the engine has stopped")

    def _aliases(self, model: LoadedModel) -> Sequence[str]:
        """Return the model's names in the setting `served_model_name`, as they are written there."""
        return self.index.aliases(self._own_names(model), first=model is self.first)

    def _own_names(self, model: LoadedModel) -> set[str]:
        names = {normalize_name(model.name), normalize_name(Path(model.name).name)}
        return names | {normalize_name(model.engine.spec.name)} if model.running else names

    def _names(self, model: LoadedModel) -> set[str]:
        return self._own_names(model) | set(map(normalize_name, self._aliases(model)))

    # -- loading and unloading -----------------------------------------------------------------------------------

    async def _load_on_demand(self, name: str, seconds: float) -> LoadedModel:
        """Load a stored model, or wait for it if another request is already loading it."""
        model = self.named(normalize_name(name))
        if model is None:
            stored = await self.in_thread(self.index.find, name)
            model = self.named(normalize_name(stored.name)) or self._begin(stored)  # another request may have begun
        model.uses += 1  # so that it is not unloaded before its first use
        try:
            if model.task is not None:
                await asyncio.wait_for(asyncio.shield(model.task), seconds)
        except TimeoutError:
            raise DeadlineError(f"model `{model.name}` is still loading after {seconds:g} seconds; try again") from None
        finally:
            model.uses -= 1
        if not model.running:
            raise UnavailableError(f"model `{model.name}` was unloaded in the meantime; try again")
        return model

    def _begin(self, stored: StoredModel) -> LoadedModel:
        size = _weight_bytes(stored.folder)
        unloading = self._make_room(stored.name, size)
        engine = self._make(settings_of(self.settings, stored.name), self.cache)
        model = self._loaded[stored.name] = LoadedModel(name=stored.name, engine=engine, pinned=False, size=size)
        model.task = asyncio.create_task(self._load(model, unloading))
        self._tasks.add(model.task)
        model.task.add_done_callback(self._task_done)
        return model

    async def _load(self, model: LoadedModel, unloading: Sequence[asyncio.Task[None]]) -> None:
        """Load the model after the models that make room for it have been unloaded."""
        _log.info("loading %s", model.name)
        try:
            if unloading:
                await asyncio.wait(unloading)
            if self._stopping:
                raise StoppedError("the server is stopping")
            await self.in_thread(model.engine.start)
        except BaseException:
            self._forget(model)
            raise
        model.last_used = time.monotonic()
        self._schedule_unload(model, self.settings.keep_alive)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:  # waiting requests get it as well
            _log.warning("loading or unloading failed: %s", error)

    def _make_room(self, name: str, size: int) -> Sequence[asyncio.Task[None]]:
        chosen = unloadable(self.loaded(), size, self._limit)
        if chosen is None:
            message = f"model `{name}` ({size / 1e6:.0f} MB of weights) does not fit into `models_mb` ({self._limit / 1e6:.0f} MB)"
            pinned = sum(model.size for model in self._loaded.values() if model.pinned)
            if pinned + size > self._limit:  # unloading others cannot help
                raise InputError(
                    f"{message} together with the models of the settings; raise `models_mb` on the server", param="model"
                )
            raise UnavailableError(f"{message} together with the loaded models; try again when those are idle")
        return [self.unload(model) for model in chosen]

    def _schedule_unload(self, model: LoadedModel, keep_alive: float) -> None:
        """Unload the model when it has been idle for ``keep_alive`` seconds; negative for never."""
        model.keep_alive = math.inf if keep_alive < 0 else keep_alive
        if model.timer is not None:
            model.timer.cancel()
            model.timer = None
        if not math.isinf(model.keep_alive):
            model.timer = asyncio.get_running_loop().call_later(model.keep_alive, self._expire, model)

    def _expire(self, model: LoadedModel) -> None:
        if not model.uses and model.running:
            self.unload(model)

    def unload(self, model: LoadedModel) -> asyncio.Task[None]:
        """Unload a model that no request uses. Returns the task that unloads it."""
        _log.info("unloading %s", model.name)
        self._forget(model)
        self.unloaded += 1
        task: asyncio.Task[None] = asyncio.create_task(self.in_thread(model.engine.stop, 0.0))
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _forget(self, model: LoadedModel) -> None:
        if model.timer is not None:
            model.timer.cancel()
        self._loaded.pop(model.name, None)
        self._by_name = {name: known for name, known in self._by_name.items() if known[0] is not model}

    def _cl100k_decoder(self) -> Cl100k:
        """Return the decoder of cl100k_base ids. Raises InputError with instructions if it has not been downloaded."""
        if self._cl100k is None:
            stored = self.index.store.find(NAME)
            if stored is None:
                raise InputError(
                    "these token ids belong to cl100k_base, not to this model's vocabulary (langchain-openai sends them unless"
                    " check_embedding_ctx_length=False), and this server has not downloaded cl100k_base: run"
                    f" `npu-proxy pull {NAME.partition('/')[2]}` on the server, or send text",
                    param="input",
                )
            self._cl100k = Cl100k(stored.folder / FILE)
            _log.warning("a client sends token ids of cl100k_base; they are decoded to text (setting `token_ids`)")
        return self._cl100k


def _weight_bytes(folder: Path) -> int:
    """Return the size of a model's weights in bytes."""
    files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    return sum((folder / file).stat().st_size for file in model_files(files) if not file.endswith(".json"))
