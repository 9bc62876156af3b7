"""The worker process: one accelerator, one model, a thread a slot. It ends with its owner, however that ends.

Started by process.py with a pickled WorkerJob on its standard input. Rows come and go through shared memory (arena.py);
a socket a slot carries a few bytes a row.
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

from npu_proxy.devices.arena import OUTPUT, Arena, Layout
from npu_proxy.devices.cache import Cache
from npu_proxy.devices.failure import Failure, classify, first_line
from npu_proxy.devices.kinds import Target
from npu_proxy.devices.openvino import compile_static, open_core
from npu_proxy.graph.packed import RowShape
from npu_proxy.types import ModelSpec

log = logging.getLogger("npu_proxy.worker")

HEARTBEAT_SECONDS = 0.05
ASK = struct.Struct("<QI")
"""Owner to worker: number of the row, index of its shape."""
ANSWER = struct.Struct("<QdI")
"""Worker to owner: number of the row, seconds on the device, bytes of the error text that follows (0: it is done)."""


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """All that a worker must know. sockets: control, then one a slot; a descriptor or what `socket.share` gave."""

    target: Target
    spec: ModelSpec
    layout: Layout
    properties: Mapping[str, object]
    cache: Cache | None
    store: Path | None
    faults: bool
    arena: int | str
    sockets: Sequence[int | bytes]
    owner: int


class Hello(msgspec.Struct, kw_only=True, array_like=True):
    """What a worker says once it has compiled, or why it could not."""

    requests: int = 0
    """Rows the plugin likes to have under way."""
    device: str = ""
    driver: str = ""
    openvino: str = ""
    seconds: float = 0.0
    failure: str = ""
    error: str = ""


def main() -> None:
    """The life of a worker process."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    job: WorkerJob = pickle.load(sys.stdin.buffer)  # noqa: S301 (our own parent wrote it)
    die_with(job.owner)
    os.dup2(2, 1)  # native code prints where it likes; nothing reads our standard output
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # they reach the whole group; the owner drains first, then kills
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    arena = Arena(job.layout, job.arena)
    control, *slots = (_socket(shared) for shared in job.sockets)
    _thread(_beat, arena)
    Worker(job, arena, control, slots).run()


class Worker:
    """Compiles the rows, answers the slots, compiles again when told to."""

    def __init__(self, job: WorkerJob, arena: Arena, control: socket.socket, slots: Sequence[socket.socket]) -> None:
        self._job = job
        self._arena = arena
        self._control = control
        self._slots = slots
        self._device: CompiledRows | None = None

    def run(self) -> None:
        """Compile, then serve until the owner is gone; every word on the control socket means: compile again."""
        self._compile()
        for number, slot in enumerate(self._slots):
            _thread(self._serve, number, slot)
        while self._control.recv(1):
            if self._device is not None:
                self._device.drop()
            self._device = None
            self._compile()
        leave()

    def _compile(self) -> None:
        start = time.perf_counter()
        try:
            self._device = CompiledRows(self._job, self._arena)
            hello = self._device.hello
            hello.seconds = time.perf_counter() - start
        except Exception as error:  # whatever it is, the owner decides what follows
            log.debug("compiling failed", exc_info=True)
            hello = Hello(failure=classify(str(error), Failure.COMPILE), error=first_line(error))
        content = msgspec.json.encode(hello)
        self._control.sendall(struct.pack("<I", len(content)) + content)

    def _serve(self, number: int, slot: socket.socket) -> None:
        """Answer the rows of one slot, one after the other."""
        while len(asked := receive(slot, ASK.size)) == ASK.size:
            row, index = ASK.unpack(asked)
            start = time.perf_counter()
            text = b""
            try:
                if self._device is None:
                    raise RuntimeError("the worker is compiling")
                self._device.infer(number, self._job.layout.shapes[index])
            except Exception as error:  # this row fails, the slot goes on
                text = first_line(error).encode()
            slot.sendall(ANSWER.pack(row, time.perf_counter() - start, len(text)) + text)
        leave()


class CompiledRows:
    """One compiled model a row shape, and an infer request a slot and shape, bound to the slot's memory."""

    def __init__(self, job: WorkerJob, arena: Arena) -> None:
        self._job = job
        self._arena = arena
        self._core = open_core(job.target)
        self._models = compile_static(
            self._core,
            job.target,
            job.spec,
            job.layout.shapes,
            job.properties,
            cache=job.cache,
            store=job.store,
            faults=arena.control if job.faults else None,
        )
        self._requests: dict[tuple[int, RowShape], ov.InferRequest] = {}
        self.hello = self._describe()

    def _describe(self) -> Hello:
        def ask(name: str) -> str:
            try:
                return str(self._core.get_property(self._job.target.openvino, name))
            except RuntimeError:  # not every plugin has every property
                return ""

        first = next(iter(self._models.values()))
        return Hello(
            requests=int(first.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")),
            device=ask("FULL_DEVICE_NAME"),
            driver=ask("NPU_DRIVER_VERSION") or ask("GPU_DRIVER_VERSION"),
            openvino=ov.get_version(),
        )

    def infer(self, slot: int, shape: RowShape) -> None:
        """Run the row that lies in a slot's memory; the vectors land there too."""
        key = (slot, shape)
        request = self._requests.get(key)
        if request is None:
            request = self._models[shape].create_infer_request()
            for name, array in self._arena.views(slot, shape).items():
                tensor = ov.Tensor(array, shared_memory=True)
                if name == OUTPUT:
                    request.set_output_tensor(tensor)
                else:
                    request.set_tensor(name, tensor)
            self._requests[key] = request
        try:
            request.infer()
        except Exception:
            del self._requests[key]  # the next row gets a new request
            raise

    def drop(self) -> None:
        """Let go of everything the plugin holds, and of the plugin."""
        self._requests.clear()
        self._models.clear()
        self._core.unload_plugin(self._job.target.openvino)


def receive(source: socket.socket, count: int) -> bytes:
    """Exactly ``count`` bytes, or fewer when the other side has closed. Raises TimeoutError by the socket's own limit."""
    content = source.recv(count)
    while 0 < len(content) < count:
        more = source.recv(count - len(content))
        if not more:
            break
        content += more
    return content


def _beat(arena: Arena) -> None:
    pause = threading.Event()
    while not pause.wait(HEARTBEAT_SECONDS):
        arena.control[0] += 1


def _thread(work: object, *arguments: object) -> None:
    threading.Thread(target=work, args=arguments, daemon=True).start()  # type: ignore[arg-type]


def _socket(shared: int | bytes) -> socket.socket:
    return socket.fromshare(shared) if isinstance(shared, bytes) else socket.socket(fileno=shared)  # type: ignore[attr-defined]


def die_with(owner: int) -> None:
    """End when the owner ends, also while stopped or stuck in native code (Linux; elsewhere the sockets tell)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != owner:
            leave()


def leave() -> None:
    """End at once: destructors of a driver that hangs would hang too."""
    os._exit(0)
