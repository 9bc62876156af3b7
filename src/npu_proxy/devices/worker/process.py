"""The owner's side of a worker process: start it, pass batches to its slots, check that it is alive, kill it."""

from __future__ import annotations

import os
import pickle
import queue
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from npu_proxy.batch import Batch, Output
from npu_proxy.devices.failure import BatchError, Failure
from npu_proxy.devices.threads import DeviceThreads
from npu_proxy.devices.worker.compile_cache import CompileCache
from npu_proxy.devices.worker.faults import Fault
from npu_proxy.devices.worker.main import Hello, WorkerJob, receive
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
    """What a worker compiles, and how. cache, store: where to look for compiled models. faults: see faults.py."""

    target: Target
    spec: ModelSpec
    properties: Mapping[str, object]
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
        self.free: queue.LifoQueue[WorkerSlot | None] = queue.LifoQueue()
        self._threads = DeviceThreads(2 * layout.slots, task.target.name)
        theirs = [control, *(slot.theirs for slot in self.slots)]
        command = python_command("from npu_proxy.devices.worker.main import main; main()")
        inherit = {} if sys.platform == "win32" else {"pass_fds": [self._memory.handle, *(end.fileno() for end in theirs)]}
        environment = {**child_environment(), "OPENBLAS_NUM_THREADS": "1"}
        self.process: subprocess.Popen[bytes] = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, **inherit)  # noqa: S603  # type: ignore[call-overload]
        self._beats = (0, time.monotonic())
        self._opened = 0
        self._overdue: BatchError | None = None
        job = WorkerJob(
            target=task.target,
            spec=task.spec,
            layout=layout,
            properties=task.properties,
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

    def open(self, count: int) -> None:
        """Accept batches, up to ``count`` at a time."""
        if not self._opened:
            for slot in self.slots[:count]:
                self.free.put(slot)
            self._opened = count
        self._beats = (int(self._memory.control[0]), time.monotonic())

    def recompile(self, seconds: float) -> None:
        """Ask the worker to drop everything and compile again, once no batch is in progress; ``hello`` waits for it."""
        slots: list[WorkerSlot | None] = []
        try:
            self._check_overdue()
            slots.extend(self.free.get(timeout=seconds) for _ in range(self._opened))
        except queue.Empty:
            raise BatchError(Failure.HANG, f"a batch did not finish within {seconds:g} seconds") from None
        finally:
            for slot in slots:
                self.free.put(slot)
        self._check_overdue()
        with suppress(OSError):  # it has died; hello() reports that
            self._control.sendall(b"c")

    def submit(self, batch: Batch, limit: float) -> Future[Output]:
        """Compute a batch within ``limit`` seconds. Fails with BatchError, of kind BUSY if no slot becomes free."""
        return self._threads.submit(self._infer, batch, limit)

    def _infer(self, batch: Batch, limit: float) -> Output:
        try:
            slot = self.free.get(timeout=limit)
        except queue.Empty:
            raise BatchError(Failure.BUSY, "no slot became free in time") from None
        if slot is None:
            self.free.put(None)
            raise BatchError(Failure.CRASH, "the worker process has ended")
        try:
            self._check_overdue()
            slot.begin(batch)
            output = slot.wait(batch, limit)
            if output is None:  # the worker may still write into that slot, so no batch may use this process again
                self._overdue = BatchError(Failure.HANG, f"a batch did not finish within {limit:g} seconds")
                raise self._overdue
            return output
        finally:
            self.free.put(slot)

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
        with suppress(queue.Empty):
            for _ in range(self._opened):
                self.free.get(timeout=SEND_SECONDS)
        self.free.put(None)
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
