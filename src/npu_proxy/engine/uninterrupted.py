"""Run what an interrupt (Ctrl-C) must not leave half done: a signal interrupts the main thread only, so it runs in another one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Made = TypeVar("Made")


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
        return made.result()
    except BaseException:
        made.add_done_callback(lambda made: None if made.exception() else undo(made.result()))
        raise
