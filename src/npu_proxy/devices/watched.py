"""A device in this process, behind a circuit breaker: taken out of service when it fails, hangs or is wrong, and made anew.

Accelerators have the same breaker, but in worker processes, which can be killed (accelerator/accelerator.py). Here, a batch that
hangs keeps its thread; the device is made anew beside it, with new graphs and threads, examined, and compared with what it
computed at first.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, replace

from npu_proxy.batch import Batch, BatchShape, Output
from npu_proxy.devices.accelerator.breaker import Breaker, BreakerPolicy, Circuit
from npu_proxy.devices.base import Device, DeviceReport, GoldenBatch, InProcessDevice, check_finite
from npu_proxy.devices.certify import KnownOutputs
from npu_proxy.devices.failure import BatchError, Failure
from npu_proxy.devices.futures import relay
from npu_proxy.errors import DeviceError

_POLL_SECONDS = 0.25

_log = logging.getLogger("npu_proxy.devices")


@dataclass(frozen=True, kw_only=True)
class WatchPlan:
    """How to watch a device. make: makes it. batch_seconds: how long a batch may take.

    least_cosine: of golden texts to what ``reference`` computes, or without one, to what the device computed at first.
    """

    make: Callable[[], InProcessDevice]
    golden: GoldenBatch
    policy: BreakerPolicy
    batch_seconds: float
    least_cosine: float
    reference: Callable[[Batch], Output] | None = None


class Watched:
    """A Device that watches another one, which it owns."""

    def __init__(self, plan: WatchPlan) -> None:
        """Make the device. Raises DeviceError or ModelError if that fails."""
        self._plan = plan
        self._inner = inner = plan.make()
        self.name: str = inner.name
        self.kind: str = inner.kind
        self.max_streams: int = inner.max_streams
        self._breaker = Breaker(policy=plan.policy)
        self._reason = ""
        self._restarts = 0
        self._canary_failures = 0
        self._running: set[Future[Output]] = set()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._known = KnownOutputs(plan.golden, plan.least_cosine, plan.reference)
        self._certified: float | None = None
        try:
            self._compare(inner)
        except BaseException:
            inner.close()
            raise
        self._thread = threading.Thread(target=self._run, name=f"npu-proxy-watch-{self.name}", daemon=True)
        self._thread.start()

    # -- what the chain sees -------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether it accepts batches."""
        return self._breaker.state is Circuit.CLOSED and self._inner.ready

    @property
    def streams(self) -> int:
        """How many batches it computes at once now."""
        return self._inner.streams

    @property
    def shapes(self) -> Sequence[BatchShape]:
        """The shapes of the device."""
        return self._inner.shapes

    def takes(self, shape: BatchShape) -> bool:
        """Whether the device takes a shape."""
        return self._inner.takes(shape)

    def submit(self, batch: Batch) -> Future[Output]:
        """Compute a batch. Fails with DeviceError, which counts as a failure of the device."""
        inner = self._inner
        if not self.ready:
            refused: Future[Output] = Future()
            refused.set_exception(BatchError(Failure.BUSY, f"{self.name} is not ready: {self._reason}"))
            return refused

        def check(output: Output) -> Output:
            check_finite(self.name, output.vectors)
            return output

        future = relay(inner.submit(batch), check, lambda error: self._failed(inner, error))
        running = self._running
        running.add(future)
        future.add_done_callback(running.discard)
        return future

    def probe(self) -> None:
        """Compare golden texts in the next slot of the device. Raises DeviceError, which counts as a failure."""
        inner = self._inner
        if not self.ready:
            raise BatchError(Failure.BUSY, f"{self.name} is not ready: {self._reason}")
        try:
            inner.probe()
        except DeviceError as error:
            if not (inner.ready and inner.reports()[0].slots):  # a device with slots has left out the wrong one
                self._failed(inner, error)
            raise

    def doubt(self, reason: str) -> None:
        """Have the device examine itself."""
        self._inner.doubt(reason)

    def reports(self) -> Sequence[DeviceReport]:
        """The device's own report, with the state of the breaker."""
        closed = self._breaker.state is Circuit.CLOSED
        return [
            replace(
                report,
                state=report.state if closed else "recovering",
                reason=report.reason if closed else self._reason,
                breaker=self._breaker.state,
                certified=self._certified,
                restarts=self._restarts + report.restarts,
                canary_failures=self._canary_failures + report.canary_failures,
            )
            for report in self._inner.reports()
        ]

    def close(self) -> None:
        """Close the device and end the thread."""
        self._stopping.set()
        self._wake.set()
        self._thread.join(timeout=10)
        with self._lock:
            inner = self._inner
        inner.close()

    # -- failures ------------------------------------------------------------------------------------------------

    def _failed(self, inner: Device, error: BaseException) -> None:
        """Count a failure, unless the device has been made anew since."""
        failure = error.failure if isinstance(error, BatchError) else Failure.ERROR
        with self._lock:
            if inner is not self._inner or self._stopping.is_set() or self._breaker.state is not Circuit.CLOSED:
                return
            self._breaker = self._breaker.failed(failure, time.monotonic(), random.random())  # noqa: S311 (jitter)
            if self._breaker.state is not Circuit.OPEN:
                return
            self._reason = str(error)
        self._wake.set()
        seconds = self._breaker.until - time.monotonic()
        _log.warning("%s: %s; the circuit breaker is open, next attempt in %.1f s", self.name, error, seconds)

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Look for batches that take too long; when the breaker is open, wait, and make the device anew."""
        while not self._stopping.is_set():
            self._wake.wait(_POLL_SECONDS)
            self._wake.clear()
            if self._breaker.state is not Circuit.CLOSED:
                self._stopping.wait(max(0.0, self._breaker.until - time.monotonic()))
                if not self._stopping.is_set():
                    self._renew()
            elif not self._inner.ready:
                self._failed(self._inner, BatchError(Failure.NUMBERS, self._inner.reports()[0].reason or "it has no slots left"))
            else:
                self._check_hang()

    def _check_hang(self) -> None:
        """Open the breaker if a batch has been computed for too long; then whatever is in progress goes elsewhere."""
        since, seconds = self._inner.busy_since, self._plan.batch_seconds
        if since is not None and time.monotonic() - since > seconds:
            error = BatchError(Failure.HANG, f"{self.name} did not finish a batch within {seconds:g} seconds")
            self._failed(self._inner, error)
            self._fail_running(error)

    def _fail_running(self, error: BatchError) -> None:
        """Fail all batches in progress; their threads may never end."""
        left, self._running = self._running, set()
        for future in list(left):
            with suppress(InvalidStateError):  # done in the meantime
                future.set_exception(error)

    def _renew(self) -> None:
        """Make the device anew, and compare it with what the first one computed."""
        with self._lock:
            self._breaker = self._breaker.probing()
        old = self._inner
        self._fail_running(BatchError(Failure.HANG, f"{self.name} was made anew before it finished a batch"))
        _close_later(old)  # it may hang; until it is closed, its weights take memory
        made: InProcessDevice | None = None
        try:
            made = self._plan.make()
            self._compare(made)
        except Exception as error:  # whatever it is, the next attempt may succeed
            if made is not None:
                _close_later(made)
            self._reason = str(error)
            failure = error.failure if isinstance(error, BatchError) else Failure.COMPILE
            self._breaker = self._breaker.failed(failure, time.monotonic(), random.random())  # noqa: S311 (jitter)
            _log.log(
                logging.ERROR if self._breaker.needs_operator else logging.WARNING,
                "%s: making it anew failed: %s; next attempt in %.1f s",
                self.name,
                error,
                self._breaker.until - time.monotonic(),
            )
            return
        with self._lock:
            if self._stopping.is_set():
                _close_later(made)
                return
            self._inner = made
            self._restarts += 1 + sum(report.restarts for report in old.reports())
            self._canary_failures += sum(report.canary_failures for report in old.reports())
            self._breaker = self._breaker.recovered(time.monotonic())
            self._reason = ""
        _log.warning("%s was made anew and serves again", self.name)

    def _compare(self, device: Device) -> None:
        """Compare golden texts with what is known. Raises DeviceError."""
        cosine = self._known.compare(device, self._plan.batch_seconds)
        self._certified = cosine if self._plan.reference is not None else None


def _close_later(device: Device) -> None:
    """Close a device that may hang, without waiting for it."""
    threading.Thread(target=device.close, name="npu-proxy-closing", daemon=True).start()
