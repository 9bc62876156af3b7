"""A Device whose model runs in a worker process. A dedicated thread starts, certifies, watches and restarts the process.

The thread owns the process and the circuit breaker's clock; requests only read ``ready`` and report failures. While the
device is not ready, the next device in the chain computes the batches (fallback.py).

This file is longer than most, because the thread's states and the failures that change them are best read together.
"""

from __future__ import annotations

import logging
import random
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from npu_proxy.batch import Batch, BatchShape, Output
from npu_proxy.devices.accelerator.breaker import Breaker, BreakerPolicy, Circuit, Recovery
from npu_proxy.devices.accelerator.examiner import Examiner, QuarantinedError, Run
from npu_proxy.devices.base import DeviceReport, GoldenBatch, check_finite
from npu_proxy.devices.canary import Guard
from npu_proxy.devices.certify import LEAST_COSINE, Certificates
from npu_proxy.devices.failure import BatchError, Failure
from npu_proxy.devices.futures import relay
from npu_proxy.devices.worker.faults import Fault
from npu_proxy.devices.worker.process import WorkerLimits, WorkerProcess, WorkerTask
from npu_proxy.devices.worker.shared_memory import MemoryLayout

_log = logging.getLogger("npu_proxy.devices")

_POLL_SECONDS = 0.25
_MAX_SLOTS = 16


@dataclass(frozen=True, kw_only=True)
class AcceleratorPlan:
    """How to run a model on an accelerator."""

    task: WorkerTask
    shapes: Sequence[BatchShape]
    limits: WorkerLimits
    policy: BreakerPolicy = field(default_factory=BreakerPolicy)
    first_fault: Fault = Fault.NONE


class Accelerator:
    """A Device in a worker process. Starts in the background; ``reference`` computes a batch in fp32 on the CPU."""

    def __init__(
        self, plan: AcceleratorPlan, golden: GoldenBatch, reference: Callable[[Batch], Output], certificates: Certificates
    ) -> None:
        self._plan = plan
        self._examiner = Examiner(plan.task.target, plan.task.spec, plan.shapes, golden, reference, certificates)
        self.name: str = plan.task.target.name
        self.kind: str = plan.task.target.kind.name
        self.shapes: Sequence[BatchShape] = plan.shapes
        self.max_streams: int = plan.task.slots or _MAX_SLOTS
        self.streams: int = plan.task.slots or 1
        self._slots: int | None = None
        self._guard = Guard(self.name, LEAST_COSINE)
        self._breaker = Breaker(policy=plan.policy)
        self._state = "compiling"
        self._reason = ""
        self._worker: WorkerProcess | None = None
        self._unkillable: subprocess.Popen[bytes] | None = None
        self._restarts = -1
        self._next_fault = plan.first_fault
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._decided = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"npu-proxy-{self.name}", daemon=True)
        self._thread.start()

    # -- what the chain sees -------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether it accepts batches."""
        return self._state == "serving" and self._breaker.state is Circuit.CLOSED

    @property
    def reason(self) -> str:
        """Why it is not ready: the last failure, or its state."""
        return self._reason or self._state

    def wait_decided(self, seconds: float) -> bool:
        """Wait up to ``seconds`` until it serves or has failed to. Returns whether either has happened."""
        return self._decided.wait(seconds)

    def takes(self, shape: BatchShape) -> bool:
        """Whether it has compiled this shape."""
        return shape in self.shapes

    def submit(self, batch: Batch) -> Future[Output]:
        """Compute vectors [bins, segments, width] float32. Fails with BatchError, which counts as a failure of the device."""
        worker = self._worker
        if worker is None or not self.ready:
            future: Future[Output] = Future()
            future.set_exception(self._not_ready())
            return future

        def check(output: Output) -> Output:
            check_finite(self.name, output.vectors)
            self._guard.check(batch, output.vectors)
            return output

        def failed(error: BaseException) -> None:
            if isinstance(error, BatchError):
                self._failed(worker, error)

        return relay(worker.submit(batch, self._plan.limits.batch), check, failed)

    def probe(self) -> None:
        """Compute a golden batch, slots and shapes in turn, and compare it. Raises BatchError, which counts as a failure."""
        worker = self._worker
        if worker is None or not self.ready:
            raise self._not_ready()
        try:
            self._examiner.probe(self._golden_run(worker))
        except BatchError as error:
            self._failed(worker, error)
            raise

    def doubt(self, reason: str) -> None:
        """Take the device out of service; it returns once it has been compiled again and examined."""
        self._failed(self._worker, BatchError(Failure.CANARY, reason))

    def reports(self) -> Sequence[DeviceReport]:
        """Its current state."""
        worker = self._worker
        return [
            DeviceReport(
                name=self.name,
                kind=self.kind,
                state=self._state,
                breaker=self._breaker.state,
                reason=self._reason,
                worker_pid=None if worker is None else worker.process.pid,
                restarts=max(0, self._restarts),
                certified=self._examiner.cosine,
                precision=self._plan.task.spec.precision,
                slots=self.streams if self._slots is not None else None,
                guarded=self._guard.passed,
                canary_failures=self._guard.failures,
                examined=self._examiner.share if self._slots is not None else None,
            )
        ]

    def inject(self, fault: Fault) -> None:
        """Inject a fault now or, for faults in compilation, at the next one. Requires a task with ``faults``."""
        self._next_fault = fault if fault in (Fault.COMPILE_FAIL, Fault.COMPILE_HANG) else Fault.NONE
        if self._worker is not None:
            self._worker.inject(fault)

    def close(self) -> None:
        """Stop the worker and the thread."""
        self._stopping.set()
        self._wake.set()
        worker = self._worker
        if worker is not None:
            worker.process.kill()  # also ends a compilation that the thread may be waiting for
        self._thread.join(timeout=10)

    # -- failures ------------------------------------------------------------------------------------------------

    def _not_ready(self) -> BatchError:
        return BatchError(Failure.BUSY, f"{self.name} is not ready: {self.reason}")

    def _failed(self, worker: WorkerProcess | None, error: BatchError) -> None:
        """Count a failure of this worker. A failure of a worker that has since been replaced is ignored."""
        now = time.monotonic()
        with self._lock:
            if worker is not self._worker or self._stopping.is_set():
                return
            state = self._breaker.state
            if state is Circuit.OPEN or (state is Circuit.HALF_OPEN and threading.current_thread() is not self._thread):
                return  # batches sent before the breaker opened are not counted again
            breaker = self._breaker = self._breaker.failed(error.failure, now, random.random())  # noqa: S311 (jitter)
            if breaker.state is not Circuit.OPEN:
                return
            self._state, self._reason = "recovering", str(error)
        self._wake.set()
        again = error.failure is Failure.ABSENT and breaker.opens > 1
        level = logging.DEBUG if again else logging.WARNING
        _log.log(level, "%s: %s; the circuit breaker is open, next attempt in %.1f s", self.name, error, breaker.until - now)
        if breaker.needs_operator and not again:
            _log.error("%s failed %d times without lasting recovery; %s", self.name, breaker.opens, self._plan.task.target.reload)

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Start the device, watch it, wait out the backoff, and repeat until closed. No error ends the thread early."""
        while not self._stopping.is_set():
            try:
                self._bring_up()
                self._watch()
            except QuarantinedError as error:
                self._quarantine(str(error))
            except BatchError as error:
                busy = error.failure is Failure.BUSY  # the reference device had no capacity; the breaker would ignore that
                self._failed(self._worker, BatchError(Failure.ERROR, str(error)) if busy else error)
            except Exception as error:  # a bug must not end the thread
                _log.exception("%s: unexpected error", self.name)
                self._failed(self._worker, BatchError(Failure.CRASH, f"unexpected error: {type(error).__name__}"))
            if self._breaker.state is not Circuit.CLOSED:
                self._back_off()
        self._kill(None)
        self._state = "stopped"

    def _quarantine(self, reason: str) -> None:
        """Stay out of service until closed: a device that computes wrong vectors does not recover on its own."""
        self._kill(None)
        self._state, self._reason = "quarantined", reason
        _log.error("%s is quarantined: %s", self.name, reason)
        self._decided.set()
        self._stopping.wait()

    def _back_off(self) -> None:
        """After the breaker has opened: kill the process if recovery needs a new one, and wait out the backoff."""
        self._decided.set()
        if self._breaker.last is Failure.ABSENT:
            self._state = "absent"
        if self._breaker.recovery is Recovery.RESTART:
            self._kill(BatchError(self._breaker.last or Failure.CRASH, self._reason))
        self._stopping.wait(max(_POLL_SECONDS, self._breaker.until - time.monotonic()))

    def _bring_up(self) -> None:
        """Compile and certify, in the existing process or in a new one, then accept batches.

        The breaker is half-open meanwhile, so any failure here opens it and starts its backoff.
        """
        with self._lock:
            recovering = self._breaker.state is not Circuit.CLOSED
            self._breaker = self._breaker.probing()
        if missing := self._plan.task.target.missing():
            raise BatchError(Failure.ABSENT, missing)
        self._state = "recovering" if recovering else "compiling"
        worker = self._worker
        if worker is None:
            worker = self._worker = self._start()
            if self._stopping.is_set():  # close() may have run before this worker was set
                worker.process.kill()
        else:
            worker.recompile(self._plan.limits.batch)
        self._examiner.prepare()  # while the worker compiles
        hello = worker.hello(self._plan.limits.compile)
        if not recovering:
            self._state = "certifying"

        def recompile_slot(slot: int) -> None:
            worker.recompile_slot(slot)
            worker.hello(self._plan.limits.compile)

        passed = self._examiner.examine(self._golden_run(worker), hello, recompile_slot)
        self._guard.canaries = self._examiner.canaries
        worker.open(passed)
        self.streams, self._slots = len(passed), hello.slots
        left_out = f"{hello.slots - len(passed)} of {hello.slots} slots compute wrong vectors and were left out"
        with self._lock:
            self._breaker = self._breaker.recovered(time.monotonic())
            self._state, self._reason = "serving", "" if len(passed) == hello.slots else left_out
        self._decided.set()
        message = "%s is ready after compiling for %.1f s; it computes up to %d batches at once%s"
        _log.info(message, self.name, hello.seconds, len(passed), f" ({self._reason})" if self._reason else "")

    def _start(self) -> WorkerProcess:
        plan = self._plan
        if self._unkillable is not None and self._unkillable.poll() is None:
            pid = self._unkillable.pid
            raise BatchError(Failure.HANG, f"the worker process {pid} cannot be killed because it is stuck in its driver")
        layout = MemoryLayout(shapes=plan.shapes, layout=plan.task.spec.batch_layout, slots=self.max_streams)
        self._restarts += 1
        fault, self._next_fault = self._next_fault, Fault.NONE
        return WorkerProcess(plan.task, layout, fault=fault)

    def _golden_run(self, worker: WorkerProcess) -> Run:
        """A function that computes golden batches in a certain slot, bypassing the breaker."""
        return lambda batch, slot: worker.submit(batch, self._plan.limits.batch, slot)

    def _watch(self) -> None:
        """Check the process until the breaker opens or the device is closed."""
        while not self._stopping.is_set() and self._breaker.state is Circuit.CLOSED:
            self._wake.wait(_POLL_SECONDS)
            self._wake.clear()
            worker = self._worker
            assert worker is not None
            if (trouble := worker.trouble(self._plan.limits)) is not None:
                self._failed(worker, trouble)

    def _kill(self, reason: BatchError | None) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            try:
                worker.kill(reason)
            except (OSError, subprocess.TimeoutExpired):  # a driver can keep it stuck in the kernel
                self._unkillable = worker.process
                _log.exception("%s: process %d could not be killed", self.name, worker.process.pid)
