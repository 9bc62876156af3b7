"""Run what an interrupt (Ctrl-C) must not leave half done: a signal interrupts the main thread only, so it runs in another one."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

Made = TypeVar("Made")


_CHECK_SECONDS = 0.5
"""A signal that arrives just before a wait begins does not end it, so waits are at most this long."""


def interruptible(future: Future[Made], seconds: float = math.inf) -> Made:
    """Wait for a future's result in a way that Ctrl-C always ends. Raises TimeoutError after ``seconds``."""
    end = time.monotonic() + seconds
    while not future.done() and (remaining := end - time.monotonic()) > 0:
        wait([future], timeout=min(_CHECK_SECONDS, remaining))
    return future.result(timeout=0)


def uninterrupted(call: Callable[[], Made], undo: Callable[[Made], object] = lambda _: None) -> Made:
    """Return what ``call`` returns. If the caller is interrupted, the call still ends, and what it made is undone.

    The thread is not a daemon, so Python waits for it at exit: native code that is still running then would abort the process.
    """
    made: Future[Made] = Future()

    def run() -> None:
        try:
            made.set_result(call())
        except BaseException as error:  # raised in the caller's thread
            made.set_exception(error)

    try:
        try:
            threading.Thread(target=run, name="npu-proxy-uninterrupted", daemon=False).start()
        except RuntimeError:  # the interpreter is shutting down
            return call()
        return interruptible(made)
    except BaseException:
        made.add_done_callback(lambda made: None if made.exception() else undo(made.result()))
        raise
