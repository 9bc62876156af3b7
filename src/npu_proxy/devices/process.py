"""The owner's side of a worker process: start it, hand rows to its slots, see that it lives, kill it."""

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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import numpy as np
import numpy.typing as npt

from npu_proxy.devices.arena import OUTPUT, Arena, Layout
from npu_proxy.devices.base import LateError
from npu_proxy.devices.cache import Cache
from npu_proxy.devices.failure import Failure, RowError, classify
from npu_proxy.devices.faults import Fault
from npu_proxy.devices.kinds import Target
from npu_proxy.devices.system import child_environment, python_command
from npu_proxy.devices.worker import ANSWER, ASK, Hello, WorkerJob, receive
from npu_proxy.graph.packed import RowShape
from npu_proxy.types import ModelSpec, Output, Pack

_SEND_SECONDS = 5.0
_START_SECONDS = 60.0
_LOOK_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Seconds: until a model is compiled, until a row is done, between two heartbeats."""

    compile: float
    row: float
    heartbeat: float


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a worker compiles, and how. cache, store: where compiled models may lie. faults: see faults.py."""

    target: Target
    spec: ModelSpec
    properties: Mapping[str, object]
    cache: Cache | None = None
    store: Path | None = None
    faults: bool = False


class Slot:
    """One row at a time: its part of the shared memory, and the socket that says "there is a row"."""

    def __init__(self, name: str, number: int, arena: Arena, layout: Layout) -> None:
        self._name = name
        self.mine, self.theirs = socket.socketpair()
        self.since = 0.0
        """When the row under way was sent, time.monotonic(); 0 while there is none."""
        self.ended = RowError(Failure.CRASH, f"the worker process of {name} died")
        """What a row gets when the worker goes away under it."""
        self._row = 0
        self._index = {shape: index for index, shape in enumerate(layout.shapes)}
        self._views: dict[RowShape, Mapping[str, npt.NDArray[Any]]] = {shape: arena.views(number, shape) for shape in layout.shapes}

    def begin(self, pack: Pack) -> None:
        """Put a row in. Raises RowError when the worker is gone."""
        shape = pack.shape
        assert isinstance(shape, RowShape)
        views = self._views[shape]
        for name, array in pack.inputs.items():
            np.copyto(views[name], array)
        self._row += 1
        self.since = time.monotonic()
        self.mine.settimeout(_SEND_SECONDS)
        try:
            self.mine.sendall(ASK.pack(self._row, self._index[shape]))
        except OSError as error:
            self._gone(error)

    def wait(self, pack: Pack, seconds: float) -> Output | None:
        """The row's vectors, or None when they are not there after ``seconds``. Raises RowError."""
        took, text = 0.0, ""
        number, end = 0, time.monotonic() + seconds
        try:
            while number != self._row:  # the answer to a row that was given up may come first
                self.mine.settimeout(max(0.001, end - time.monotonic()))
                answer = receive(self.mine, ANSWER.size)
                if len(answer) < ANSWER.size:
                    self._gone(None)
                number, took, length = ANSWER.unpack(answer)
                text = receive(self.mine, length).decode(errors="replace") if length else ""
        except TimeoutError:
            return None
        except OSError as error:
            self._gone(error)
        self.since = 0.0
        if text:
            raise RowError(classify(text), f"{self._name} failed: {text}")
        shape = pack.shape
        assert isinstance(shape, RowShape)
        return Output(self._views[shape][OUTPUT].copy(), self._name, took)

    def _gone(self, error: OSError | None) -> NoReturn:
        self.since = 0.0
        raise RowError(self.ended.failure, str(self.ended)) from error

    def cut(self, reason: RowError | None) -> None:
        """Wake whoever waits here, with the reason."""
        self.ended = reason or self.ended
        try:
            self.mine.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other side was first
            return


class WorkerProcess:
    """A worker and all that belongs to it. The thread that makes it must outlive it (Linux ends it with that thread)."""

    def __init__(self, task: Task, layout: Layout, *, fault: Fault) -> None:
        """Start the process; ``hello`` waits until it has compiled."""
        self._arena = Arena(layout)
        self._arena.control[1] = fault
        self._control, control = socket.socketpair()
        self.slots = [Slot(task.target.name, number, self._arena, layout) for number in range(layout.slots)]
        self.free: queue.LifoQueue[Slot | None] = queue.LifoQueue()
        theirs = [control, *(slot.theirs for slot in self.slots)]
        command = python_command("from npu_proxy.devices.worker import main; main()")
        inherit = {} if sys.platform == "win32" else {"pass_fds": [self._arena.handle, *(end.fileno() for end in theirs)]}
        environment = {**child_environment(), "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, **inherit)  # noqa: S603  # type: ignore[call-overload]
        self._beats = (0, time.monotonic())
        self._opened = 0
        self._overdue: RowError | None = None
        job = WorkerJob(
            target=task.target,
            spec=task.spec,
            layout=layout,
            properties=task.properties,
            cache=task.cache,
            store=task.store,
            faults=task.faults,
            arena=self._arena.handle,
            sockets=[_shared(end, self.process.pid) for end in theirs],
            owner=os.getpid(),
        )
        assert self.process.stdin is not None
        guard = threading.Timer(_START_SECONDS, self.process.kill)  # more than a pipe holds; a stopped process reads none of it
        guard.daemon = True
        guard.start()
        with suppress(OSError):  # it died already; hello() says so
            pickle.dump(job, self.process.stdin)
            self.process.stdin.flush()
        guard.cancel()
        for end in theirs:
            end.close()

    def hello(self, seconds: float) -> Hello:
        """What the worker says after compiling. Raises RowError when it fails, dies, or takes longer than ``seconds``."""
        end = time.monotonic() + seconds
        head = None
        while head is None:
            dead = self.process.poll() is not None  # looked at first: its last words may be on their way
            self._control.settimeout(max(0.001, min(_LOOK_SECONDS, end - time.monotonic())))
            try:
                head = receive(self._control, 4)
            except TimeoutError:
                if dead:
                    head = b""
                elif time.monotonic() >= end:
                    text = f"compiling took longer than {seconds:g} seconds; see `compile_timeout`"
                    raise RowError(Failure.COMPILE, text) from None
            except OSError:
                head = b""
        content = receive(self._control, struct.unpack("<I", head)[0]) if len(head) == 4 else b""
        if not content:
            raise RowError(Failure.CRASH, f"the worker process died while compiling (exit code {self.process.poll()})")
        hello = msgspec.json.decode(content, type=Hello)
        if hello.failure:
            raise RowError(Failure(hello.failure), hello.error)
        return hello

    def open(self, count: int) -> None:
        """Let rows in, ``count`` at a time."""
        if not self._opened:
            for slot in self.slots[:count]:
                self.free.put(slot)
            self._opened = count
        self._beats = (int(self._arena.control[0]), time.monotonic())

    def recompile(self, seconds: float) -> None:
        """Ask the worker to drop everything and compile again, once no row is under way; ``hello`` waits for it."""
        resting: list[Slot | None] = []
        try:
            self._check_overdue()
            resting.extend(self.free.get(timeout=seconds) for _ in range(self._opened))
        except queue.Empty:
            raise RowError(Failure.HANG, f"a row was not done after {seconds:g} seconds") from None
        finally:
            for slot in resting:
                self.free.put(slot)
        self._check_overdue()
        with suppress(OSError):  # it is dead; hello() says so
            self._control.sendall(b"c")

    def infer(self, pack: Pack, late: float, limit: float) -> Output:
        """Run a row. Raises LateError after ``late`` seconds, RowError for what went wrong, BUSY where no slot came free."""
        try:
            slot = self.free.get(timeout=min(late, limit))
        except queue.Empty:
            raise RowError(Failure.BUSY, "no slot came free in time") from None
        if slot is None:
            self.free.put(None)
            raise RowError(Failure.CRASH, "the worker process has ended")
        lent = True
        try:
            self._check_overdue()
            slot.begin(pack)
            output = slot.wait(pack, min(late, limit))
            if output is None and late < limit:
                lent = False
                raise LateError(f"a row was not done after {late:.3g} seconds", lambda: self._resume(slot, pack, limit))
            return self._done(output, limit)
        finally:
            if lent:
                self.free.put(slot)

    def _resume(self, slot: Slot, pack: Pack, limit: float) -> Output:
        """Wait for a late row, which has its slot still."""
        try:
            return self._done(slot.wait(pack, limit), limit)
        finally:
            self.free.put(slot)

    def _done(self, output: Output | None, limit: float) -> Output:
        """The output. Without one, the worker may still write into that slot: no row may use this process again."""
        if output is None:
            self._overdue = RowError(Failure.HANG, f"a row was not done after {limit:g} seconds")
            raise self._overdue
        return output

    def _check_overdue(self) -> None:
        if self._overdue is not None:
            raise RowError(self._overdue.failure, str(self._overdue))

    def trouble(self, limits: Limits) -> RowError | None:
        """What is wrong with the process: dead, no heartbeat, a row overdue. A look, no wait."""
        now = time.monotonic()
        if (code := self.process.poll()) is not None:
            return RowError(Failure.CRASH, f"the worker process died ({_exit_words(code)})")
        beat = int(self._arena.control[0])
        if beat != self._beats[0]:
            self._beats = (beat, now)
        elif now - self._beats[1] > limits.heartbeat:
            return RowError(Failure.HANG, f"the worker process gave no sign of life for {limits.heartbeat:g} seconds")
        if any(slot.since and now - slot.since > limits.row for slot in self.slots):
            return RowError(Failure.HANG, f"a row was not done after {limits.row:g} seconds")
        return None

    def inject(self, fault: Fault) -> None:
        """Let a fault happen, where the worker was made with ``faults``."""
        self._arena.control[1] = fault

    def kill(self, reason: RowError | None = None) -> None:
        """End the process, at once and for certain; those who wait for its rows get ``reason``."""
        self.process.kill()
        for slot in self.slots:
            slot.cut(reason)
        try:
            self.process.wait(timeout=_SEND_SECONDS)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """Of the slots, once those who wait have been woken, the sockets and the memory."""
        with suppress(queue.Empty):
            for _ in range(self._opened):
                self.free.get(timeout=_SEND_SECONDS)
        self.free.put(None)
        for slot in self.slots:
            slot.mine.close()
        if self.process.stdin is not None:
            with suppress(OSError):  # what could not be written when the worker died early
                self.process.stdin.close()
        self._control.close()
        self._arena.close()


def _shared(end: socket.socket, process: int) -> int | bytes:
    return end.share(process) if sys.platform == "win32" else end.fileno()


def _exit_words(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
