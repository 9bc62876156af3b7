"""Results of any number of requests, in order and in bounded memory: a few requests are in progress at a time."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import aclosing
from typing import Any, TypeVar

from npu_proxy.errors import OverloadedError
from npu_proxy.types import EmbedRequest, EmbedResult, TextInput

STREAM_TEXTS = 1024
"""Number of texts that a stream keeps in progress."""

Item = TypeVar("Item")
Submit = Callable[[EmbedRequest], Future[EmbedResult]]
Wait = Callable[[Future[EmbedResult]], EmbedResult]


def batches(texts: Iterable[TextInput], size: int) -> Iterator[Sequence[TextInput]]:
    """Split texts into lists of ``size``."""
    source = iter(texts)
    while batch := list(itertools.islice(source, size)):
        yield batch


def stream_results(requests: Iterable[EmbedRequest], submit: Submit, wait: Wait, patience: float) -> Generator[EmbedResult]:
    """Yield one EmbedResult per request, in order. Cancels what is in progress if it is closed or interrupted.

    patience: seconds to wait while the queue is full. Raises OverloadedError after that time.
    """
    futures: deque[tuple[Future[EmbedResult], int]] = deque()
    try:
        for request in requests:
            futures.append((_submit_patiently(request, submit, futures, patience), len(request.texts)))
            while futures and (futures[0][0].done() or _texts(futures) > STREAM_TEXTS):
                yield wait(futures[0][0])
                futures.popleft()
        while futures:
            yield wait(futures[0][0])
            futures.popleft()
    finally:
        for future, _ in futures:
            future.cancel()


async def stream_results_async(
    requests: AsyncIterable[EmbedRequest] | Iterable[EmbedRequest], submit: Submit, patience: float
) -> AsyncGenerator[EmbedResult]:
    """``stream_results`` for an event loop, which never blocks."""
    futures: deque[tuple[Future[EmbedResult], int]] = deque()
    source = requests if isinstance(requests, AsyncIterable) else _plain(requests)
    try:
        async for request in source:
            end = time.monotonic() + patience
            while True:
                try:
                    futures.append((submit(request), len(request.texts)))
                    break
                except OverloadedError as error:
                    remaining = end - time.monotonic()
                    if remaining <= 0:
                        raise
                    await _until_done(futures, min(remaining, error.retry_after))
            while futures and (futures[0][0].done() or _texts(futures) > STREAM_TEXTS):
                yield await asyncio.wrap_future(futures[0][0])
                futures.popleft()
        while futures:
            yield await asyncio.wrap_future(futures[0][0])
            futures.popleft()
    finally:
        for future, _ in futures:
            future.cancel()


async def _plain(items: Iterable[Item]) -> AsyncIterator[Item]:
    for item in items:
        yield item


async def in_thread(items: Iterator[Item]) -> AsyncGenerator[Item]:
    """Read a blocking iterator in a thread of its own. Cancelling waits for nothing; the iterator is closed after its last step."""
    end = object()
    threads = ThreadPoolExecutor(1, "npu-proxy-reader")
    loop = asyncio.get_running_loop()

    def close() -> None:
        getattr(items, "close", lambda: None)()

    try:
        while (item := await loop.run_in_executor(threads, next, items, end)) is not end:
            yield item  # type: ignore[misc]
    finally:
        threads.submit(close)
        threads.shutdown(wait=False)


async def batches_async(texts: AsyncIterable[Any] | Iterator[TextInput], size: int) -> AsyncGenerator[Sequence[Any]]:
    """Split texts of an asynchronous or a blocking iterator into lists of ``size``."""
    if not isinstance(texts, AsyncIterable):
        async with aclosing(in_thread(batches(texts, size))) as lists:  # type: ignore[type-var]
            async for batch in lists:
                yield batch
        return
    gathered: list[Any] = []
    async for text in texts:
        gathered.append(text)
        if len(gathered) == size:
            yield gathered
            gathered = []
    if gathered:
        yield gathered


def _texts(futures: Iterable[tuple[Future[EmbedResult], int]]) -> int:
    return sum(count for _, count in futures)


def _first_open(futures: Iterable[tuple[Future[EmbedResult], int]]) -> Future[EmbedResult]:
    return next((future for future, _ in futures if not future.done()), None) or Future()


def _submit_patiently(
    request: EmbedRequest, submit: Submit, futures: Iterable[tuple[Future[EmbedResult], int]], patience: float
) -> Future[EmbedResult]:
    """Submit a request; while the queue is full, wait until one of this stream is done or a retry may help."""
    end = time.monotonic() + patience
    while True:
        try:
            return submit(request)
        except OverloadedError as error:
            remaining = end - time.monotonic()
            if remaining <= 0:
                raise
            try:
                _first_open(futures).exception(timeout=min(remaining, error.retry_after))
            except FutureTimeoutError:
                continue


async def _until_done(futures: Iterable[tuple[Future[EmbedResult], int]], seconds: float) -> None:
    """Wait until the first open future is done, for at most so many seconds."""
    waited = asyncio.wrap_future(_first_open(futures))
    await asyncio.wait([waited], timeout=seconds)
