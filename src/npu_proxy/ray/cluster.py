"""Compute the texts of a job on a Ray cluster: units of work go to actors, results come back in order, lost work is done again.

The job itself (reading, duplicates, parts, output) stays in this process, as without a cluster.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from npu_proxy.engine.options import RequestOptions
from npu_proxy.engine.parallel import SameModel
from npu_proxy.errors import DeviceError, InputError, NpuProxyError
from npu_proxy.ray.worker import Worker, make_work, units
from npu_proxy.settings import Settings
from npu_proxy.types import EmbedResult, OutputType, TextInput

_AHEAD = 3
"""Units per worker that may be waiting or in progress."""
_ATTEMPTS = 8
"""How often a unit is tried before the job gives up."""
_START_SECONDS = 300.0
"""How long the first worker may take to load the model."""
_CHECK_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """address: of the cluster; `local` starts one on this machine. workers: fewest and most actors. cpus: per actor.

    resources: that an actor needs in addition, such as {"NPU": 1}.
    """

    address: str
    workers: tuple[int, int] = (1, 1)
    cpus: int = 1
    resources: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(eq=False)
class _Unit:
    texts: Sequence[TextInput]
    attempts: int = 0
    reference: Any = None
    actor: Any = None
    since: float = 0.0


class Cluster:
    """Actors of a cluster. A context manager that connects to it, and leaves nothing running there."""

    def __init__(self, options: ClusterOptions, settings: Settings, output_type: OutputType, request: RequestOptions) -> None:
        """Raises InputError if Ray is not installed, or the numbers make no sense."""
        least, most = options.workers
        if not 1 <= least <= most:
            raise InputError(f"workers must be 1 or more, fewest first, not {least}:{most}", param="workers")
        self._options = options
        self._work = make_work(settings, output_type, request, options.cpus)
        self._limit = 2 * settings.bulk_timeout + 60
        self._actors: dict[Any, Any] = {}
        """Actors, each with the reference that is ready when its model is loaded."""
        self._ready: set[Any] = set()
        self._load: dict[Any, int] = {}
        self._was_connected = False

    def __enter__(self) -> Self:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray  # type: ignore[import-not-found]  # an optional package

        self._ray: Any = ray
        self._was_connected = ray.is_initialized()
        if not self._was_connected:
            address = None if self._options.address == "local" else self._options.address
            try:
                ray.init(
                    address=address, log_to_driver=False, logging_level="warning", include_dashboard=False if not address else None
                )
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise InputError(f"no Ray cluster at `{self._options.address}`: {error}", param="ray") from error
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            self._ray.kill(actor, no_restart=True)
        if not self._was_connected:
            self._ray.shutdown()

    def __call__(self, texts: Iterable[TextInput], /) -> Iterator[EmbedResult]:
        """Compute texts; yields results in order."""
        waiting: deque[_Unit] = deque()
        source = units(texts)
        same_model = SameModel()
        exhausted = False
        while True:
            while not exhausted and (actor := self._free_actor()) is not None:
                unit = next(source, None)
                exhausted = unit is None
                if unit is not None:
                    waiting.append(_Unit(unit))
                    self._submit(waiting[-1], actor)
            if not waiting:
                if exhausted:
                    return
                self._await_actor()
                continue
            result = self._take(waiting)
            if result is not None:
                yield from same_model([result])

    # -- actors ----------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        least, most = self._options.workers
        for _ in range(most):
            self._add_actor()
        end = time.monotonic() + _START_SECONDS
        while len(self._ready) < least:
            self._see_who_is_ready(_CHECK_SECONDS)
            if time.monotonic() > end:
                free = self._ray.available_resources().get("CPU", 0)
                message = f"only {len(self._ready)} of {least} workers started within {_START_SECONDS:.0f} seconds"
                raise DeviceError(f"{message}; the cluster has {free:.0f} free CPUs, and each worker needs {self._options.cpus}")

    def _add_actor(self) -> None:
        # Ray restarts an actor that dies, on another node if need be; its tasks are submitted again here, so that each is counted.
        remote = self._ray.remote(Worker).options(
            num_cpus=self._options.cpus, resources=self._options.resources or None, max_restarts=-1, max_task_retries=0
        )
        actor = remote.remote(self._work)
        self._actors[actor] = actor.describe.remote()
        self._load[actor] = 0

    def _see_who_is_ready(self, seconds: float) -> None:
        """Note which actors have loaded their model. Raises the error of one that cannot."""
        open_ = {reference: actor for actor, reference in self._actors.items() if actor not in self._ready}
        if not open_:
            return
        done, _ = self._ray.wait(list(open_), num_returns=1, timeout=seconds)
        for reference in done:
            actor = open_[reference]
            try:
                self._ray.get(reference)
                self._ready.add(actor)
            except self._ray.exceptions.RayTaskError as error:
                raise _cause(error) from error
            except self._ray.exceptions.ActorDiedError as error:
                if isinstance(cause := _cause(error), NpuProxyError):
                    raise cause from error
                self._replace(actor)
            except self._ray.exceptions.RayError:
                self._actors[actor] = actor.describe.remote()

    def _free_actor(self) -> Any:
        """The actor with the least to do, if it may take more."""
        self._see_who_is_ready(0)
        actor = min(self._ready, key=lambda actor: self._load[actor], default=None)
        return actor if actor is not None and self._load[actor] < _AHEAD else None

    def _await_actor(self) -> None:
        end = time.monotonic() + _START_SECONDS
        while not self._ready:
            self._see_who_is_ready(_CHECK_SECONDS)
            if time.monotonic() > end:
                raise DeviceError(f"no worker came back within {_START_SECONDS:.0f} seconds")

    def _replace(self, actor: Any) -> None:
        """Give an actor up, and make another one."""
        self._ray.kill(actor, no_restart=True)
        self._actors.pop(actor, None)
        self._ready.discard(actor)
        self._load.pop(actor, None)
        self._add_actor()

    # -- units -----------------------------------------------------------------------------------------------------------

    def _submit(self, unit: _Unit, actor: Any) -> None:
        unit.attempts += 1
        unit.actor = actor
        unit.since = time.monotonic()
        unit.reference = actor.embed.remote(unit.texts)
        self._load[actor] += 1

    def _take(self, waiting: deque[_Unit]) -> EmbedResult | None:
        """The result of the first unit; None if it is not there yet, or was lost."""
        done, _ = self._ray.wait([unit.reference for unit in waiting], num_returns=1, timeout=_CHECK_SECONDS)
        first = waiting[0]
        ready, _ = self._ray.wait([first.reference], timeout=0 if done else _CHECK_SECONDS)
        if not ready:
            if time.monotonic() - first.since > self._limit:
                self._lost(waiting, first, "it did not answer in time")
            return None
        try:
            result = self._ray.get(first.reference)
        except self._ray.exceptions.RayTaskError as error:
            raise _cause(error) from error
        except self._ray.exceptions.RayError as error:  # the actor, its node or the object has gone
            self._lost(waiting, first, str(error).splitlines()[0])
            return None
        waiting.popleft()
        if first.actor in self._load:
            self._load[first.actor] -= 1
        return result

    def _lost(self, waiting: deque[_Unit], first: _Unit, why: str) -> None:
        """Send all units of the actor of the first one to others."""
        if first.attempts >= _ATTEMPTS:
            raise DeviceError(f"a unit of {len(first.texts)} texts was lost {first.attempts} times, at last because {why}")
        gone = first.actor
        lost = [unit for unit in waiting if unit.actor is gone]
        if gone in self._actors:
            self._replace(gone)
        for unit in lost:
            self._await_actor()
            self._submit(unit, min(self._ready, key=lambda actor: self._load[actor]))


def _cause(error: Any) -> Exception:
    """What went wrong in an actor: one of our own errors if it was one."""
    found: Any = error
    for _ in range(5):
        cause = getattr(found, "cause", None) or getattr(found, "__cause__", None)
        if cause is None:
            break
        found = cause
    return found if isinstance(found, NpuProxyError) else DeviceError(str(error).strip().splitlines()[-1])
