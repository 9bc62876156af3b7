"""A Device whose model runs in a worker process: brought up, certified, watched, and brought back by a thread of its own.

The thread owns the process and the circuit breaker's clock; requests only read ``ready`` and report failures. While the
device is not ready, whoever stands behind it in the chain answers (fallback.py).
"""

from __future__ import annotations

import logging
import math
import random
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from npu_proxy.devices.arena import Layout
from npu_proxy.devices.base import GoldenRow, LateError, Report, check_finite
from npu_proxy.devices.breaker import Breaker, Circuit, Policy, Rung
from npu_proxy.devices.certify import Certificates
from npu_proxy.devices.examiner import Examiner, QuarantinedError
from npu_proxy.devices.failure import Failure, RowError
from npu_proxy.devices.faults import Fault
from npu_proxy.devices.process import Limits, Task, WorkerProcess
from npu_proxy.graph.packed import RowFormat, RowShape
from npu_proxy.types import Output, Pack, Shaped

log = logging.getLogger("npu_proxy.devices")

_LOOK_SECONDS = 0.25
_MOST_SLOTS = 16


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to run a model on an accelerator. streams: rows under way, 0 for what the plugin likes."""

    task: Task
    shapes: Sequence[RowShape]
    limits: Limits
    streams: int = 0
    policy: Policy = field(default_factory=Policy)
    first_fault: Fault = Fault.NONE


class Accelerator:
    """A Device. Starts at once in the background; ``reference`` gives the CPU's fp32 vectors of a row."""

    def __init__(self, plan: Plan, golden: GoldenRow, reference: Callable[[Pack], Output], certificates: Certificates) -> None:
        self._plan = plan
        self._examiner = Examiner(plan.task.target, plan.task.spec, plan.shapes, golden, reference, certificates)
        self.name = plan.task.target.name
        self.kind = plan.task.target.kind.name
        self.shapes = plan.shapes
        self.most_streams = plan.streams or _MOST_SLOTS
        self.streams = plan.streams or 1
        self._breaker = Breaker(policy=plan.policy)
        self._state = "compiling"
        self._reason = ""
        self._worker: WorkerProcess | None = None
        self._stuck: subprocess.Popen[bytes] | None = None
        self._restarts = -1
        self._next_fault = plan.first_fault
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._settled = threading.Event()
        self._thread = threading.Thread(target=self._live, name=f"npu-proxy-{self.name}", daemon=True)
        self._thread.start()

    # -- what the chain sees -------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether rows go to it."""
        return self._state == "serving" and self._breaker.state is Circuit.CLOSED

    @property
    def reason(self) -> str:
        """Why it is not ready, or what failed last."""
        return self._reason or self._state

    def settle(self, seconds: float) -> bool:
        """Wait until it serves or it is known that it does not; returns whether that is known."""
        return self._settled.wait(seconds)

    def takes(self, shape: Shaped) -> bool:
        """The shapes it has compiled."""
        return shape in self.shapes

    def infer(self, pack: Pack, late: float = math.inf) -> Output:
        """Vectors [bins, segments, width] float32. Raises LateError after ``late`` seconds, and RowError."""
        worker = self._worker
        if worker is None or not self.ready:
            raise RowError(Failure.BUSY, f"{self.name} is not ready: {self.reason}")
        try:
            output = worker.infer(pack, late, self._plan.limits.row)
            check_finite(self.name, output.vectors)
        except LateError as error:
            pending = error.pending
            raise LateError(str(error), lambda: self._watched(worker, pending)) from error
        except RowError as error:
            self._failed(worker, error)
            raise
        return output

    def probe(self) -> None:
        """Run the golden row of the smallest shape against its reference. Raises RowError, and counts it as a failure."""
        worker = self._worker
        if worker is None or not self.ready:
            raise RowError(Failure.BUSY, f"{self.name} is not ready: {self.reason}")
        try:
            self._examiner.probe(self._golden_run(worker))
        except RowError as error:
            self._failed(worker, error)
            raise

    def reports(self) -> Sequence[Report]:
        """Its state at this moment."""
        worker = self._worker
        return [
            Report(
                name=self.name,
                kind=self.kind,
                state=self._state,
                breaker=self._breaker.state,
                reason=self._reason,
                worker_pid=None if worker is None else worker.process.pid,
                restarts=max(0, self._restarts),
                certified=self._examiner.cosine,
                precision=self._plan.task.spec.precision,
            )
        ]

    def inject(self, fault: Fault) -> None:
        """Let a fault happen now, or at the next compilation, where the plan has ``faults``."""
        self._next_fault = fault if fault in (Fault.COMPILE_FAIL, Fault.COMPILE_HANG) else Fault.NONE
        if self._worker is not None:
            self._worker.inject(fault)

    def close(self) -> None:
        """End the worker and the thread."""
        self._stopping.set()
        self._wake.set()
        worker = self._worker
        if worker is not None:
            worker.process.kill()  # also ends a compilation the thread may be waiting for
        self._thread.join(timeout=10)

    # -- failures ------------------------------------------------------------------------------------------------

    def _watched(self, worker: WorkerProcess, pending: Callable[[], Output]) -> Output:
        try:
            output = pending()
            check_finite(self.name, output.vectors)
        except RowError as error:
            self._failed(worker, error)
            raise
        return output

    def _failed(self, worker: WorkerProcess | None, error: RowError) -> None:
        """Count a failure of this worker; one of a worker that was replaced meanwhile says nothing about the new one."""
        now = time.monotonic()
        with self._lock:
            if worker is not self._worker or self._stopping.is_set():
                return
            state = self._breaker.state
            if state is Circuit.OPEN or (state is Circuit.HALF_OPEN and threading.current_thread() is not self._thread):
                return  # the failure that opened the breaker speaks for the rows of before, too
            breaker = self._breaker = self._breaker.failed(error.failure, now, random.random())  # noqa: S311 (jitter)
            if breaker.state is not Circuit.OPEN:
                return
            self._state, self._reason = "recovering", str(error)
        self._wake.set()
        again = error.failure is Failure.ABSENT and breaker.opens > 1
        level = logging.DEBUG if again else logging.WARNING
        log.log(level, "%s: %s; the breaker is open, next try in %.1f s", self.name, error, breaker.until - now)
        if breaker.hopeless and not again:
            log.error("%s failed %d times without staying up; %s", self.name, breaker.opens, self._plan.task.target.reload)

    # -- the thread ----------------------------------------------------------------------------------------------

    def _live(self) -> None:
        """Bring up, watch, wait out the backoff, again; until closed. Nothing that happens here ends the thread early."""
        while not self._stopping.is_set():
            try:
                self._bring_up()
                self._watch()
            except QuarantinedError as error:
                self._quarantine(str(error))
            except RowError as error:
                busy = error.failure is Failure.BUSY  # the reference had no room, which is as good as an error here
                self._failed(self._worker, RowError(Failure.ERROR, str(error)) if busy else error)
            except Exception as error:  # a fault of ours must not leave the device without its thread
                log.exception("%s: unexpected error", self.name)
                self._failed(self._worker, RowError(Failure.CRASH, f"unexpected error: {type(error).__name__}"))
            if self._breaker.state is not Circuit.CLOSED:
                self._rest()
        self._kill(None)
        self._state = "stopped"

    def _quarantine(self, reason: str) -> None:
        """Stay out until closed: nothing that happens by itself makes wrong vectors right."""
        self._kill(None)
        self._state, self._reason = "quarantined", reason
        log.error("%s is quarantined: %s", self.name, reason)
        self._settled.set()
        self._stopping.wait()

    def _rest(self) -> None:
        """After the breaker has opened: end the process where the next rung says so, and wait out the backoff."""
        self._settled.set()
        if self._breaker.last is Failure.ABSENT:
            self._state = "absent"
        if self._breaker.rung is Rung.RESTART:
            self._kill(RowError(self._breaker.last or Failure.CRASH, self._reason))
        self._stopping.wait(max(_LOOK_SECONDS, self._breaker.until - time.monotonic()))

    def _bring_up(self) -> None:
        """Compile and certify, in the process that is there or in a new one; then let rows in.

        The breaker is half-open meanwhile, so that whatever fails here opens it, and its backoff follows.
        """
        with self._lock:
            recovering = self._breaker.state is not Circuit.CLOSED
            self._breaker = self._breaker.probing()
        if missing := self._plan.task.target.missing():
            raise RowError(Failure.ABSENT, missing)
        self._state = "recovering" if recovering else "compiling"
        worker = self._worker
        if worker is None:
            worker = self._worker = self._start()
            if self._stopping.is_set():  # close() has looked for a worker already, or sees this one
                worker.process.kill()
        else:
            worker.recompile(self._plan.limits.row)
        hello = worker.hello(self._plan.limits.compile)
        count = self._plan.streams or max(1, min(hello.requests, _MOST_SLOTS))
        if not recovering:
            self._state = "certifying"
        worker.open(count)
        self._examiner.examine(self._golden_run(worker), hello)
        self.streams = count
        with self._lock:
            self._breaker = self._breaker.recovered(time.monotonic())
            self._state, self._reason = "serving", ""
        self._settled.set()
        log.info("%s serves after %.1f s of compiling, %d rows at once", self.name, hello.seconds, count)

    def _start(self) -> WorkerProcess:
        plan = self._plan
        if self._stuck is not None and self._stuck.poll() is None:
            raise RowError(Failure.HANG, f"the worker process {self._stuck.pid} cannot be killed; its driver holds it")
        layout = Layout(shapes=plan.shapes, format=RowFormat.of(plan.task.spec), slots=self.most_streams)
        self._restarts += 1
        fault, self._next_fault = self._next_fault, Fault.NONE
        return WorkerProcess(plan.task, layout, fault=fault)

    def _golden_run(self, worker: WorkerProcess) -> Callable[[Pack], Output]:
        """How a golden row is run: past the breaker, without a hedge."""
        return lambda row: worker.infer(row, math.inf, self._plan.limits.row)

    def _watch(self) -> None:
        """Until the breaker opens or the device is closed: look at the process."""
        while not self._stopping.is_set() and self._breaker.state is Circuit.CLOSED:
            self._wake.wait(_LOOK_SECONDS)
            self._wake.clear()
            worker = self._worker
            assert worker is not None
            if (trouble := worker.trouble(self._plan.limits)) is not None:
                self._failed(worker, trouble)

    def _kill(self, reason: RowError | None) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            try:
                worker.kill(reason)
            except (OSError, subprocess.TimeoutExpired):  # the kernel does not let go of it; drivers do that
                self._stuck = worker.process
                log.exception("%s: process %d does not end", self.name, worker.process.pid)
