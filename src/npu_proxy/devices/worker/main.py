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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import openvino as ov

from npu_proxy.batch import BatchShape
from npu_proxy.devices.failure import Failure, classify_failure, first_line
from npu_proxy.devices.openvino import open_core
from npu_proxy.devices.worker.compile import compile_static
from npu_proxy.devices.worker.compile_cache import CompileCache
from npu_proxy.devices.worker.shared_memory import OUTPUT, MemoryLayout, SharedMemory
from npu_proxy.spec import ModelSpec
from npu_proxy.targets import Target

_log = logging.getLogger("npu_proxy.worker")

HEARTBEAT_SECONDS = 0.05
REQUEST = struct.Struct("<QI")
"""Owner to worker: number of the batch, index of its shape."""
REPLY = struct.Struct("<QdI")
"""Worker to owner: number of the batch, seconds on the device, bytes of the error message that follows (0: success)."""


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """Everything a worker needs. sockets: control, then one per slot; file descriptors, or the results of `socket.share`."""

    target: Target
    spec: ModelSpec
    layout: MemoryLayout
    properties: Mapping[str, object]
    cache: CompileCache | None
    store: Path | None
    faults: bool
    memory: int | str
    sockets: Sequence[int | bytes]
    owner: int


class Hello(msgspec.Struct, kw_only=True, array_like=True):
    """A worker's message after compiling: its properties, or why compiling failed."""

    infer_requests: int = 0
    """How many concurrent batches the plugin recommends."""
    device: str = ""
    driver: str = ""
    openvino: str = ""
    seconds: float = 0.0
    failure: str = ""
    error: str = ""


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
        """Compile, then serve until the owner is gone. Each byte on the control socket is a request to compile again."""
        self._compile()
        for number, slot in enumerate(self._slots):
            _thread(self._serve, number, slot)
        while self._control.recv(1):
            if self._model is not None:
                self._model.drop()
            self._model = None
            self._compile()
        exit_now()

    def _compile(self) -> None:
        start = time.perf_counter()
        try:
            self._model = CompiledModel(self._job, self._memory)
            hello = self._model.hello
            hello.seconds = time.perf_counter() - start
        except Exception as error:  # reported to the owner, which decides what to do
            _log.debug("compiling failed", exc_info=True)
            hello = Hello(failure=classify_failure(str(error), Failure.COMPILE), error=first_line(error))
        content = msgspec.json.encode(hello)
        self._control.sendall(struct.pack("<I", len(content)) + content)

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


class CompiledModel:
    """One compiled graph per batch shape, and one infer request per slot and shape, bound to the slot's memory."""

    def __init__(self, job: WorkerJob, memory: SharedMemory) -> None:
        self._job = job
        self._memory = memory
        self._core = open_core(job.target)
        self._graphs = compile_static(
            self._core,
            job.target,
            job.spec,
            job.layout.shapes,
            job.properties,
            cache=job.cache,
            store=job.store,
            faults=memory.control if job.faults else None,
        )
        self._infer_requests: dict[tuple[int, BatchShape], ov.InferRequest] = {}
        self.hello: Hello = self._describe()

    def _describe(self) -> Hello:
        def query(name: str) -> str:
            try:
                return str(self._core.get_property(self._job.target.openvino, name))
            except RuntimeError:  # not every plugin has every property
                return ""

        first = next(iter(self._graphs.values()))
        return Hello(
            infer_requests=int(first.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")),
            device=query("FULL_DEVICE_NAME"),
            driver=query("NPU_DRIVER_VERSION") or query("GPU_DRIVER_VERSION"),
            openvino=ov.get_version(),
        )

    def infer(self, slot: int, shape: BatchShape) -> None:
        """Compute the batch in a slot's memory, and write the output there too."""
        key = (slot, shape)
        infer_request = self._infer_requests.get(key)
        if infer_request is None:
            infer_request = self._graphs[shape].create_infer_request()
            for name, array in self._memory.views(slot, shape).items():
                tensor = ov.Tensor(array, shared_memory=True)
                if name == OUTPUT:
                    infer_request.set_output_tensor(tensor)
                else:
                    infer_request.set_tensor(name, tensor)
            self._infer_requests[key] = infer_request
        try:
            infer_request.infer()
        except Exception:
            del self._infer_requests[key]  # the next batch gets a new infer request
            raise

    def drop(self) -> None:
        """Release everything the plugin holds, and unload the plugin."""
        self._infer_requests.clear()
        self._graphs.clear()
        self._core.unload_plugin(self._job.target.openvino)


def receive(source: socket.socket, count: int) -> bytes:
    """Read exactly ``count`` bytes, or fewer if the other side has closed. Raises TimeoutError after the socket's timeout."""
    content = source.recv(count)
    while 0 < len(content) < count:
        more = source.recv(count - len(content))
        if not more:
            break
        content += more
    return content


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
