"""Futures that pass on what another future gives."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

from npu_proxy.batch import Output


class _Relay(Future[Output]):
    """A future whose run can be cancelled only if it has not started."""

    def __init__(self, run: Future[Output]) -> None:
        super().__init__()
        self._run = run

    def cancel(self) -> bool:
        return self._run.cancel()

    def settle(self, run: Future[Output]) -> None:
        """Take over what the run gave; too late if the owner has given up on it."""
        with suppress(InvalidStateError):
            if run.cancelled():
                super().cancel()
                self.set_running_or_notify_cancel()
            elif (error := run.exception()) is not None:
                self.set_exception(error)
            else:
                self.set_result(run.result())


def relay(
    run: Future[Output],
    receive: Callable[[Output], Output] = lambda output: output,
    failed: Callable[[BaseException], Future[Output] | None] = lambda _: None,
) -> Future[Output]:
    """A future of what ``receive`` makes of a run's output. Cancelling it cancels the run.

    failed: called with the error of the run or of ``receive``; a future that it returns takes the run's place.
    """
    future = _Relay(run)

    def finish(run: Future[Output]) -> None:
        if run.cancelled():
            future.settle(run)
            return
        try:
            output = receive(run.result())
        except BaseException as error:  # passed on through the future
            if (again := failed(error)) is not None:
                again.add_done_callback(future.settle)
                return
            with suppress(InvalidStateError):
                future.set_exception(error)
        else:
            with suppress(InvalidStateError):
                future.set_result(output)

    run.add_done_callback(finish)
    return future
