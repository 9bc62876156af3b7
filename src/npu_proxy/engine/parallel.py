"""Data-parallel offline work: batches are computed by worker processes, each with its own engine, and returned in order."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import connection
from typing import Any

from npu_proxy.engine.options import RequestOptions
from npu_proxy.errors import DeviceError, InputError
from npu_proxy.settings import Settings
from npu_proxy.system import available_threads
from npu_proxy.types import EmbedResult, OutputType, TextInput

_AHEAD = 3
"""Batches per worker that may be waiting or in progress."""


_engines: list[Any] = []
"""The engine of a worker process; empty in every other process."""


def parallel_results(
    engine_class: Callable[..., Any],
    settings: Settings,
    batches: Iterable[Sequence[TextInput]],
    parallel: int,
    options: RequestOptions,
    output_type: OutputType = OutputType.DENSE,
) -> Iterator[EmbedResult]:
    """Yield one EmbedResult per batch, in order. parallel: number of worker processes; 0 starts one per core.

    engine_class: called with ``settings=`` to make each worker's engine. Raises DeviceError if a worker dies, which ends the
    other workers too.
    """
    if parallel < 0:
        raise InputError(f"parallel must be None, 0 or a positive number of processes, not {parallel}", param="parallel")
    cores = available_threads()
    workers = parallel or cores
    settings = replace(settings, threads=max(1, (settings.threads or cores) // workers))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(engine_class, settings))
    futures: deque[Future[list[EmbedResult]]] = deque()
    try:
        same_model = SameModel()
        for batch in batches:
            futures.append(pool.submit(_embed, batch, output_type, options))
            if len(futures) >= _AHEAD * workers:
                yield from same_model(futures.popleft().result())
        while futures:
            yield from same_model(futures.popleft().result())
    except BrokenProcessPool as error:
        raise DeviceError("a worker process died or could not start; see its error message above") from error
    except BaseException:  # the caller no longer waits for what the workers compute
        _kill(pool)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _kill(pool: ProcessPoolExecutor) -> None:
    """End the worker processes now. The pool has a method for it from Python 3.14 on."""
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.kill()


class SameModel:
    """Checks that all results have the same fingerprint: each worker loads the model, which may change in between."""

    def __init__(self) -> None:
        self._fingerprint: str | None = None

    def __call__(self, results: Sequence[EmbedResult]) -> Sequence[EmbedResult]:
        for result in results:
            self._fingerprint = self._fingerprint or result.fingerprint
            if result.fingerprint != self._fingerprint:
                fingerprints = f"{self._fingerprint} and {result.fingerprint}"
                raise DeviceError(f"the workers loaded different versions of the model ({fingerprints}); was it changed?")
        return results


def _start(engine_class: Callable[..., Any], settings: Settings) -> None:
    """Load this worker's engine. The worker ends with its parent, however that ends."""
    threading.Thread(target=_end_with_parent, name="npu-proxy-parent", daemon=True).start()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _engines.append(engine_class(settings=settings).start())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _embed(batch: Sequence[TextInput], output_type: OutputType, options: RequestOptions) -> list[EmbedResult]:
    return list(_engines[0].results(batch, batch_size=max(1, len(batch)), output_type=output_type, **options))
