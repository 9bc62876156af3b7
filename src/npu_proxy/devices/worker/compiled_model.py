"""The compiled graphs of a worker, and the infer requests of each of its slots."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import openvino as ov

from npu_proxy.batch import BatchShape
from npu_proxy.devices.openvino import open_core
from npu_proxy.devices.slots import slots_that_fit
from npu_proxy.devices.worker.compile import StaticGraphs, compile_static
from npu_proxy.devices.worker.faults import Faults, damage
from npu_proxy.devices.worker.messages import Hello, WorkerJob
from npu_proxy.devices.worker.shared_memory import OUTPUT, SharedMemory
from npu_proxy.system import available_memory
from npu_proxy.targets import Target


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
