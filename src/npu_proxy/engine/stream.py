"""Results of any number of texts, in order and in bounded memory: a few requests are in progress at a time."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from npu_proxy.errors import OverloadedError
from npu_proxy.types import EmbedResult, TextInput

STREAM_TEXTS = 1024
"""Number of texts that a stream keeps in progress."""

Submit = Callable[[Sequence[TextInput]], Future[EmbedResult]]
Wait = Callable[[Future[EmbedResult]], EmbedResult]


def batches(texts: Iterable[TextInput], size: int) -> Iterator[Sequence[TextInput]]:
    """Split texts into lists of ``size``."""
    source = iter(texts)
    while batch := list(itertools.islice(source, size)):
        yield batch


def stream_results(
    texts: Iterable[Sequence[TextInput]], submit: Submit, wait: Wait, *, batch_size: int, patience: float
) -> Iterator[EmbedResult]:
    """Yield one EmbedResult per list of texts, in order.

    patience: seconds to wait while the queue is full. Raises OverloadedError after that time.
    """
    futures: deque[Future[EmbedResult]] = deque()
    try:
        for batch in texts:
            futures.append(_submit_patiently(batch, submit, futures, patience))
            while futures and (futures[0].done() or len(futures) * batch_size > STREAM_TEXTS):
                yield wait(futures.popleft())
        while futures:
            yield wait(futures.popleft())
    finally:
        for future in futures:
            future.cancel()


def _submit_patiently(
    batch: Sequence[TextInput], submit: Submit, futures: Iterable[Future[EmbedResult]], patience: float
) -> Future[EmbedResult]:
    """Submit a batch; while the queue is full, wait until a batch of this stream finishes or a retry may help."""
    end = time.monotonic() + patience
    while True:
        try:
            return submit(batch)
        except OverloadedError as error:
            remaining = end - time.monotonic()
            if remaining <= 0:
                raise
            pending = next((future for future in futures if not future.done()), None) or Future[EmbedResult]()
            try:
                pending.exception(timeout=min(remaining, error.retry_after))
            except FutureTimeoutError:
                continue
