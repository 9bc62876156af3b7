"""The worker process: one accelerator, one model, one thread per slot. It ends when its owner ends, for any reason.

process.py starts it with a pickled WorkerJob on standard input. Batches and outputs are passed in shared memory; one
socket per slot carries a few bytes per batch.
"""

from __future__ import annotations

import ctypes
import logging
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence

import msgspec

from npu_proxy.devices.failure import Failure, classify_failure, first_line
from npu_proxy.devices.worker.compiled_model import CompiledModel
from npu_proxy.devices.worker.messages import ALL_SLOTS, CONTROL, REPLY, REQUEST, Hello, WorkerJob, receive
from npu_proxy.devices.worker.shared_memory import SharedMemory

_log = logging.getLogger("npu_proxy.worker")

HEARTBEAT_SECONDS = 0.05


def main() -> None:
    """Run a worker process."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    job: WorkerJob = pickle.load(sys.stdin.buffer)  # noqa: S301 (written by the parent process)
    end_with(job.owner)
    os.dup2(2, 1)  # native code may print to standard output, which nothing reads
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # the whole process group gets them; the owner drains, then kills this process
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    memory = SharedMemory(job.layout, job.memory)
    control, *slots = (_socket(shared) for shared in job.sockets)
    _thread(_beat, memory)
    Worker(job, memory, control, slots).run()


class Worker:
    """Compiles the graphs, serves the slots, and compiles again on request."""

    def __init__(self, job: WorkerJob, memory: SharedMemory, control: socket.socket, slots: Sequence[socket.socket]) -> None:
        self._job = job
        self._memory = memory
        self._control = control
        self._slots = slots
        self._model: CompiledModel | None = None

    def run(self) -> None:
        """Compile, then serve until the owner is gone, and compile again when it asks for that."""
        for number, slot in enumerate(self._slots):
            _thread(self._serve, number, slot)
        self._compile(ALL_SLOTS)
        while len(message := receive(self._control, CONTROL.size)) == CONTROL.size:
            self._compile(CONTROL.unpack(message)[0])
        exit_now()

    def _compile(self, slot: int) -> None:
        start = time.perf_counter()
        try:
            if slot == ALL_SLOTS or self._model is None:
                if self._model is not None:
                    self._model.drop()
                self._model = None
                self._model = CompiledModel(self._job, self._memory)
            else:
                self._model.compile_slot(slot, fresh=True)
            hello = self._model.hello
            hello.seconds = time.perf_counter() - start
        except Exception as error:  # reported to the owner, which decides what to do
            _log.debug("compiling failed", exc_info=True)
            hello = Hello(failure=classify_failure(str(error), Failure.COMPILE), error=first_line(error))
        content = msgspec.json.encode(hello)
        self._control.sendall(struct.pack("<I", len(content)) + content)
        if self._model is not None:
            self._model.save()  # only now, because it takes time

    def _serve(self, slot: int, channel: socket.socket) -> None:
        """Compute the batches of one slot, one after another."""
        while len(request := receive(channel, REQUEST.size)) == REQUEST.size:
            number, index = REQUEST.unpack(request)
            start = time.perf_counter()
            text = b""
            try:
                if self._model is None:
                    raise RuntimeError("the worker is compiling")
                self._model.infer(slot, self._job.layout.shapes[index])
            except Exception as error:  # only this batch fails
                text = first_line(error).encode()
            channel.sendall(REPLY.pack(number, time.perf_counter() - start, len(text)) + text)
        exit_now()


def _beat(memory: SharedMemory) -> None:
    pause = threading.Event()
    while not pause.wait(HEARTBEAT_SECONDS):
        memory.control[0] += 1


def _thread(work: object, *arguments: object) -> None:
    threading.Thread(target=work, args=arguments, daemon=True).start()  # type: ignore[arg-type]


def _socket(shared: int | bytes) -> socket.socket:
    return socket.fromshare(shared) if isinstance(shared, bytes) else socket.socket(fileno=shared)  # type: ignore[attr-defined]


def end_with(owner: int) -> None:
    """End this process when its owner ends, even while stopped or stuck in native code (Linux; elsewhere the sockets close)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != owner:
            exit_now()


def exit_now() -> None:
    """Exit at once, without running destructors: those of a hanging driver would hang too."""
    os._exit(0)
