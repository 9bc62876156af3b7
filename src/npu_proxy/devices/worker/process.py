"""The owner's side of a worker process: start it, pass batches to its slots, check that it is alive, kill it."""

from __future__ import annotations

import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from npu_proxy.batch import Batch, Output
from npu_proxy.devices.failure import BatchError, Failure
from npu_proxy.devices.slots import SlotPool
from npu_proxy.devices.threads import DeviceThreads
from npu_proxy.devices.worker.compile_cache import CompileCache
from npu_proxy.devices.worker.faults import Fault
from npu_proxy.devices.worker.messages import ALL_SLOTS, CONTROL, Hello, WorkerJob, receive
from npu_proxy.devices.worker.shared_memory import MemoryLayout, SharedMemory
from npu_proxy.devices.worker.slot import SEND_SECONDS, WorkerSlot
from npu_proxy.spec import ModelSpec
from npu_proxy.system import child_environment, python_command
from npu_proxy.targets import Target

_START_SECONDS = 60.0
_POLL_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class WorkerLimits:
    """Time limits in seconds: to compile a model, to compute a batch, and between two heartbeats."""

    compile: float
    batch: float
    heartbeat: float


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """What a worker compiles, and how.

    slots: batches at once; None uses what the plugin recommends. cache, store: where to look for compiled models. faults: see
    faults.py.
    """

    target: Target
    spec: ModelSpec
    properties: Mapping[str, object]
    slots: int | None = None
    cache: CompileCache | None = None
    store: Path | None = None
    faults: bool = False


class WorkerProcess:
    """A worker process and its resources. The thread that creates it must outlive it (Linux kills it with that thread)."""

    def __init__(self, task: WorkerTask, layout: MemoryLayout, *, fault: Fault) -> None:
        """Start the process; ``hello`` waits until it has compiled."""
        self._memory = SharedMemory(layout)
        self._memory.control[1] = fault
        self._control, control = socket.socketpair()
        self.slots: list[WorkerSlot] = [
            WorkerSlot(task.target.name, number, self._memory, layout) for number in range(layout.slots)
        ]
        self._pool: SlotPool[WorkerSlot] = SlotPool()
        self._threads = DeviceThreads(2 * layout.slots, task.target.name)
        theirs = [control, *(slot.theirs for slot in self.slots)]
        command = python_command("from npu_proxy.devices.worker.main import main; main()")
        inherit = {} if sys.platform == "win32" else {"pass_fds": [self._memory.handle, *(end.fileno() for end in theirs)]}
        environment = {**child_environment(), "OPENBLAS_NUM_THREADS": "1"}
        self.process: subprocess.Popen[bytes] = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, **inherit)  # noqa: S603  # type: ignore[call-overload]
        self._beats = (0, time.monotonic())
        self._open: Sequence[WorkerSlot] = ()
        """The slots that serve; they are in the pool, or compute a batch."""
        self._overdue: BatchError | None = None
        job = WorkerJob(
            target=task.target,
            spec=task.spec,
            layout=layout,
            properties=task.properties,
            slots=task.slots,
            cache=task.cache,
            store=task.store,
            faults=task.faults,
            memory=self._memory.handle,
            sockets=[_shared(end, self.process.pid) for end in theirs],
            owner=os.getpid(),
        )
        self._send_job(job)
        for end in theirs:
            end.close()

    def _send_job(self, job: WorkerJob) -> None:
        assert self.process.stdin is not None
        # The job is larger than a pipe's buffer, and the process may be stopped.
        guard = threading.Timer(_START_SECONDS, self.process.kill)
        guard.daemon = True
        guard.start()
        with suppress(OSError):  # it has died; hello() reports that
            pickle.dump(job, self.process.stdin)
            self.process.stdin.flush()
        guard.cancel()

    def hello(self, seconds: float) -> Hello:
        """Return the worker's message after compiling. Raises BatchError if it fails, dies, or takes longer than ``seconds``."""
        end = time.monotonic() + seconds
        head = None
        while head is None:
            dead = self.process.poll() is not None  # checked before reading: its last message may still arrive
            self._control.settimeout(max(0.001, min(_POLL_SECONDS, end - time.monotonic())))
            try:
                head = receive(self._control, 4)
            except TimeoutError:
                if dead:
                    head = b""
                elif time.monotonic() >= end:
                    text = f"compiling took longer than {seconds:g} seconds; increase `compile_timeout`"
                    raise BatchError(Failure.COMPILE, text) from None
            except OSError:
                head = b""
        content = receive(self._control, struct.unpack("<I", head)[0]) if len(head) == 4 else b""
        if not content:
            raise BatchError(Failure.CRASH, f"the worker process died while compiling (exit code {self.process.poll()})")
        hello = msgspec.json.decode(content, type=Hello)
        if hello.failure:
            raise BatchError(Failure(hello.failure), hello.error)
        return hello

    def open(self, numbers: Sequence[int]) -> None:
        """Accept batches in these slots."""
        self._open = [self.slots[number] for number in numbers]
        for slot in self._open:
            self._pool.put(slot)
        self._beats = (int(self._memory.control[0]), time.monotonic())

    def recompile(self, seconds: float) -> None:
        """Ask the worker to drop everything and compile again, once no batch is in progress; ``hello`` waits for it."""
        self._check_overdue()
        end = time.monotonic() + seconds
        taken = [slot for slot in self._open if self._pool.take(end - time.monotonic(), slot) is not None]
        if len(taken) < len(self._open):
            for slot in taken:
                self._pool.put(slot)
            raise BatchError(Failure.HANG, f"a batch did not finish within {seconds:g} seconds")
        self._open = ()
        self._check_overdue()
        self._ask(ALL_SLOTS)

    def recompile_slot(self, number: int) -> None:
        """Ask the worker to compile a slot that is not open again, without stored blobs; ``hello`` waits for it."""
        self._ask(number)

    def _ask(self, slot: int) -> None:
        with suppress(OSError):  # it has died; hello() reports that
            self._control.sendall(CONTROL.pack(slot))

    def submit(self, batch: Batch, limit: float, number: int | None = None) -> Future[Output]:
        """Compute a batch within ``limit`` seconds, in a slot that is free or in a certain one, open or not.

        Fails with BatchError, of kind BUSY if no slot becomes free.
        """
        return self._threads.submit(self._infer, batch, limit, None if number is None else self.slots[number])

    def _infer(self, batch: Batch, limit: float, wanted: WorkerSlot | None) -> Output:
        if wanted is not None and wanted not in self._open:
            return self._compute(wanted, batch, limit)
        slot = self._pool.take(limit, wanted)
        if slot is None:
            if self._pool.closed:
                raise BatchError(Failure.CRASH, "the worker process has ended")
            raise BatchError(Failure.BUSY, "no slot became free in time")
        try:
            return self._compute(slot, batch, limit)
        finally:
            self._pool.put(slot)

    def _compute(self, slot: WorkerSlot, batch: Batch, limit: float) -> Output:
        self._check_overdue()
        slot.begin(batch)
        output = slot.wait(batch, limit)
        if output is None:  # the worker may still write into that slot, so no batch may use this process again
            self._overdue = BatchError(Failure.HANG, f"a batch did not finish within {limit:g} seconds")
            raise self._overdue
        return output

    def _check_overdue(self) -> None:
        if self._overdue is not None:
            raise BatchError(self._overdue.failure, str(self._overdue))

    def trouble(self, limits: WorkerLimits) -> BatchError | None:
        """What is wrong with the process (dead, no heartbeat, a batch overdue), or None. Never blocks."""
        now = time.monotonic()
        if (code := self.process.poll()) is not None:
            return BatchError(Failure.CRASH, f"the worker process died ({_exit_reason(code)})")
        beat = int(self._memory.control[0])
        if beat != self._beats[0]:
            self._beats = (beat, now)
        elif now - self._beats[1] > limits.heartbeat:
            return BatchError(Failure.HANG, f"the worker process sent no heartbeat for {limits.heartbeat:g} seconds")
        if any(slot.since and now - slot.since > limits.batch for slot in self.slots):
            return BatchError(Failure.HANG, f"a batch did not finish within {limits.batch:g} seconds")
        return None

    def inject(self, fault: Fault) -> None:
        """Inject a fault. Requires a worker created with ``faults``."""
        self._memory.control[1] = fault

    def kill(self, reason: BatchError | None = None) -> None:
        """Kill the process. Threads that wait for its batches get ``reason``."""
        self.process.kill()
        for slot in self.slots:
            slot.cut(reason)
        try:
            self.process.wait(timeout=SEND_SECONDS)
        finally:
            self._release()

    def _release(self) -> None:
        """Release the slots (once the threads waiting for them have woken), the threads, the sockets and the memory."""
        end = time.monotonic() + SEND_SECONDS
        for slot in self._open:
            self._pool.take(end - time.monotonic(), slot)
        self._pool.close()
        self._threads.close()
        for slot in self.slots:
            slot.mine.close()
        if self.process.stdin is not None:
            with suppress(OSError):  # data left unwritten because the worker died early
                self.process.stdin.close()
        self._control.close()
        self._memory.close()


def _shared(end: socket.socket, process: int) -> int | bytes:
    return end.share(process) if sys.platform == "win32" else end.fileno()


def _exit_reason(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
