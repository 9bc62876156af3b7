"""Data-parallel offline work: batches go to worker processes, each with an engine of its own, and come back in order."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import TYPE_CHECKING

from npu_proxy.devices.openvino import available_threads
from npu_proxy.errors import DeviceError, InputError
from npu_proxy.settings import Settings
from npu_proxy.types import EmbedResult, TextInput

if TYPE_CHECKING:
    from npu_proxy.engine.engine import Engine
    from npu_proxy.engine.options import Options

_AHEAD = 3
"""Batches a worker may have under way or waiting."""
_here: list[Engine] = []
"""The engine of a worker process; empty in every other process."""


def results(settings: Settings, batches: Iterable[Sequence[TextInput]], parallel: int, options: Options) -> Iterator[EmbedResult]:
    """One EmbedResult a batch, in order. parallel: worker processes, 0 for one a core.

    Raises DeviceError when a worker dies; the other workers end with it.
    """
    if parallel < 0:
        raise InputError(f"parallel must be None, 0 or a number of processes, not {parallel}", param="parallel")
    cores = available_threads()
    workers = parallel or cores
    own = replace(settings, threads=max(1, (settings.threads or cores) // workers))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(own,))
    under_way: deque[Future[list[EmbedResult]]] = deque()
    try:
        same = _Same()
        for batch in batches:
            under_way.append(pool.submit(_embed, batch, options))
            if len(under_way) >= _AHEAD * workers:
                yield from same(under_way.popleft().result())
        while under_way:
            yield from same(under_way.popleft().result())
    except BrokenProcessPool as error:
        raise DeviceError("a worker process died or could not start; its own message is above") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Same:
    """Lets results of one fingerprint through: each worker reads the model for itself, and it may have changed meanwhile."""

    def __init__(self) -> None:
        self._fingerprint: str | None = None

    def __call__(self, results: Sequence[EmbedResult]) -> Sequence[EmbedResult]:
        for result in results:
            self._fingerprint = self._fingerprint or result.fingerprint
            if result.fingerprint != self._fingerprint:
                both = f"{self._fingerprint} and {result.fingerprint}"
                raise DeviceError(f"the workers read different versions of the model ({both}); was it quantized or pulled anew?")
        return results


def _start(settings: Settings) -> None:
    """Load this worker's engine."""
    from npu_proxy.engine.engine import Engine

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _here.append(Engine(settings=settings).start())


def _embed(batch: Sequence[TextInput], options: Options) -> list[EmbedResult]:
    return list(_here[0].results(batch, batch_size=max(1, len(batch)), **options))
