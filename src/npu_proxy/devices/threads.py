"""Threads that run a device's inferences.

The executor of concurrent.futures is not used, because its threads are joined before a program's exit handlers run, and the
exit handlers stop an engine that its owner did not close.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

from npu_proxy.devices.failure import BatchError, Failure

T = TypeVar("T")
_JOIN_SECONDS = 10.0
WAIT_SECONDS = 60.0
"""How long a batch waits for its turn: as long as a batch can take on a slow machine."""
WAITING = 4
"""Threads per batch that a device computes at once: one computes, and batches from devices that failed wait in the others."""


class DeviceThreads:
    """Up to ``count`` daemon threads, started on demand and ended by ``close``."""

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, call: Callable[..., T], *arguments: Any) -> Future[T]:
        """Run ``call(*arguments)`` in a thread. After ``close`` the future fails with BatchError."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                future.set_exception(self._is_closed())
                return future
            self._work.put((future, call, arguments))
            if len(self._threads) < self._count and not self._idle.acquire(blocking=False):
                thread = threading.Thread(target=self._run, name=f"npu-proxy-{self._name}", daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def close(self) -> None:
        """Fail calls that have not started, and wait a limited time for the others."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            while True:
                try:
                    work = self._work.get_nowait()
                except queue.Empty:
                    break
                if work is not None and work[0].set_running_or_notify_cancel():
                    work[0].set_exception(self._is_closed())
            for _ in self._threads:
                self._work.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_JOIN_SECONDS)

    def _is_closed(self) -> BatchError:
        return BatchError(Failure.BUSY, f"{self._name} is closed")

    def _run(self) -> None:
        while True:
            work = self._work.get()
            if work is None:
                return
            future, call, arguments = work
            if future.set_running_or_notify_cancel():
                try:
                    result = call(*arguments)
                except BaseException as error:  # passed on through the future
                    future.set_exception(error)
                else:
                    future.set_result(result)
            del work, future, call, arguments  # an idle thread must not keep a batch alive
            self._idle.release()


class Turn:
    """Lets one batch at a time be computed. since: when the current one began, in time.monotonic() seconds, if there is one."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._busy = threading.Lock()
        self.since: float | None = None

    def __enter__(self) -> None:
        """Wait for the turn. Raises BatchError (BUSY) if it does not come."""
        if not self._busy.acquire(timeout=WAIT_SECONDS):
            raise BatchError(Failure.BUSY, f"{self._device} could not start a batch within {WAIT_SECONDS:g} seconds")
        self.since = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.since = None
        self._busy.release()
