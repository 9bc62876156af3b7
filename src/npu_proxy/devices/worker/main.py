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
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import openvino as ov

from npu_proxy.batch import BatchShape
from npu_proxy.devices.failure import Failure, classify_failure, first_line
from npu_proxy.devices.openvino import open_core
from npu_proxy.devices.slots import slots_that_fit
from npu_proxy.devices.worker.compile import StaticGraphs, compile_static
from npu_proxy.devices.worker.compile_cache import CompileCache
from npu_proxy.devices.worker.faults import Faults, damage
from npu_proxy.devices.worker.shared_memory import OUTPUT, MemoryLayout, SharedMemory
from npu_proxy.spec import ModelSpec
from npu_proxy.system import available_memory
from npu_proxy.targets import Target

_log = logging.getLogger("npu_proxy.worker")

HEARTBEAT_SECONDS = 0.05
CONTROL = struct.Struct("<i")
"""Owner to worker, on the control socket: the slot to compile again, without stored blobs; -1 for all slots, with them."""
ALL_SLOTS = -1
REQUEST = struct.Struct("<QI")
"""Owner to worker: number of the batch, index of its shape."""
REPLY = struct.Struct("<QdI")
"""Worker to owner: number of the batch, seconds on the device, bytes of the error message that follows (0: success)."""


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """Everything a worker needs. sockets: control, then one per slot; file descriptors, or the results of `socket.share`.

    slots: how many to compile; None means as many as the plugin recommends.
    """

    target: Target
    spec: ModelSpec
    layout: MemoryLayout
    properties: Mapping[str, object]
    slots: int | None
    cache: CompileCache | None
    store: Path | None
    faults: bool
    memory: int | str
    sockets: Sequence[int | bytes]
    owner: int


class Hello(msgspec.Struct, kw_only=True, array_like=True):
    """A worker's message after compiling: its properties, or why compiling failed."""

    slots: int = 0
    """How many batches it computes at once."""
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


class CompiledModel:
    """The graphs of every slot, one per batch shape, and their infer requests, which are bound to the slot's memory.

    If the plugin builds a graph per stream and gives batches to whichever stream is free, each slot has compiled graphs of its own,
    with one stream: so every slot can be examined, and none shares its weights. Otherwise a slot consists of infer requests.
    """

    def __init__(self, job: WorkerJob, memory: SharedMemory) -> None:
        self._job = job
        self._memory = memory
        self._faults = Faults(memory.control) if job.faults else None
        if self._faults:
            self._faults.compiling()
        self._core = open_core(job.target)
        self._graphs: dict[int, StaticGraphs] = {}
        self._infer_requests: dict[tuple[int, BatchShape], ov.InferRequest] = {}
        self._damaged: dict[tuple[int, BatchShape], ov.InferRequest] = {}
        """Infer requests of graphs with a fault in their weights, used in place of the others."""
        own_graphs = job.target.graphs_per_slot
        slots = job.slots or (self._recommended_slots() if own_graphs else None)
        self._properties = dict(job.properties)
        if own_graphs:
            assert slots is not None
            slots = min(slots, job.layout.slots)
            threads = self._properties.get("INFERENCE_NUM_THREADS")
            self._properties |= {"NUM_STREAMS": 1}
            if isinstance(threads, int):
                self._properties["INFERENCE_NUM_THREADS"] = max(1, threads // slots)
        self.compile_slot(0)
        if slots is None:
            first = next(iter(self._graphs[0].models.values()))
            slots = int(first.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        slots = max(1, min(slots, job.layout.slots))
        for slot in range(1, slots):
            self.compile_slot(slot)
        self.hello: Hello = self._describe(slots)

    def _recommended_slots(self) -> int:
        """As many streams as the plugin offers, but no more than threads, or copies of the weights that fit into memory."""
        if self._job.properties.get("PERFORMANCE_HINT") == "LATENCY":
            return 1
        offered = _query(self._core, self._job.target, "RANGE_FOR_STREAMS")
        most = int(offered[1]) if isinstance(offered, Sequence) and len(offered) > 1 else 1
        threads = self._job.properties.get("INFERENCE_NUM_THREADS")
        weights = sum(file.stat().st_size for file in self._job.spec.weight_files)
        return slots_that_fit(min(most, threads) if isinstance(threads, int) else most, weights, available_memory())

    def _describe(self, slots: int) -> Hello:
        def query(name: str) -> str:
            return str(_query(self._core, self._job.target, name) or "")

        return Hello(
            slots=slots,
            device=query("FULL_DEVICE_NAME"),
            driver=query("NPU_DRIVER_VERSION") or query("GPU_DRIVER_VERSION"),
            openvino=ov.get_version(),
        )

    def compile_slot(self, slot: int, *, fresh: bool = False) -> None:
        """Compile a slot's graphs, and create its infer requests. fresh: without the blobs of earlier compilations."""
        job = self._job
        if self._faults and fresh:
            self._faults.compiling(slot=slot)
        for shape in job.layout.shapes:
            self._infer_requests.pop((slot, shape), None)
            self._damaged.pop((slot, shape), None)
        if job.target.graphs_per_slot or not self._graphs:
            self._graphs.pop(slot, None)
            self._graphs[slot] = compile_static(
                self._core,
                job.target,
                job.spec,
                job.layout.shapes,
                self._properties,
                cache=job.cache,
                store=job.store,
                fresh=fresh,
            )
        else:
            self._graphs[slot] = self._graphs[0]
        for shape in job.layout.shapes:
            self._infer_requests[slot, shape] = self._new_request(slot, shape, self._graphs[slot].models[shape])

    def _new_request(self, slot: int, shape: BatchShape, graph: ov.CompiledModel) -> ov.InferRequest:
        infer_request = graph.create_infer_request()
        for name, array in self._memory.views(slot, shape).items():
            tensor = ov.Tensor(array, shared_memory=True)
            if name == OUTPUT:
                infer_request.set_output_tensor(tensor)
            else:
                infer_request.set_tensor(name, tensor)
        return infer_request

    def infer(self, slot: int, shape: BatchShape) -> None:
        """Compute the batch in a slot's memory, and write the output there too."""
        try:
            if self._faults is None:
                self._infer_requests[slot, shape].infer()
            else:
                self._infer_with_faults(slot, shape)
        except Exception:
            self._infer_requests[slot, shape] = self._new_request(
                slot, shape, self._graphs[slot].models[shape]
            )  # the old one is lost
            raise

    def _infer_with_faults(self, slot: int, shape: BatchShape) -> None:
        assert self._faults is not None
        infer_request = self._infer_requests[slot, shape]
        if fault := self._faults.damages(slot):
            if (slot, shape) not in self._damaged:
                job, change = self._job, partial(damage, fault=fault)
                graph = compile_static(self._core, job.target, job.spec, [shape], self._properties, change=change)
                self._damaged[slot, shape] = self._new_request(slot, shape, graph.models[shape])
            infer_request = self._damaged[slot, shape]
        if self._faults.before(slot):
            infer_request.infer()
        self._faults.after(slot, self._memory.views(slot, shape)[OUTPUT])

    def save(self) -> None:
        """Store the graphs that were compiled, once per shape."""
        if self._job.cache is not None:
            for graphs in self._graphs.values():
                graphs.save(self._job.cache)

    def drop(self) -> None:
        """Release everything the plugin holds, and unload the plugin."""
        self._infer_requests.clear()
        self._damaged.clear()
        self._graphs.clear()
        self._core.unload_plugin(self._job.target.openvino)


def _query(core: ov.Core, target: Target, name: str) -> Any:
    """A property of a device, or None: not every plugin has every property."""
    try:
        return core.get_property(target.openvino, name)
    except RuntimeError:
        return None


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
