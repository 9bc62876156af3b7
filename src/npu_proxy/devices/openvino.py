"""OpenVINO: the CPU in this process as a Device, and the static graphs that worker processes compile for accelerators."""

from __future__ import annotations

import math
import os
import queue
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openvino as ov

from npu_proxy.devices.base import GoldenRow, Report, check_vectors
from npu_proxy.devices.blobs import import_blob, stored
from npu_proxy.devices.cache import Cache
from npu_proxy.devices.failure import Failure, RowError, first_line
from npu_proxy.devices.faults import with_faults
from npu_proxy.devices.kinds import TARGETS, Target, supported
from npu_proxy.devices.shapes import dynamic_shapes
from npu_proxy.errors import DeviceError
from npu_proxy.graph.packed import CPU, Form, RowShape
from npu_proxy.models.graphs import Graphs
from npu_proxy.types import ModelSpec, Output, Pack, Shaped

ROOM_SECONDS = 60.0
"""How long a row waits for a free infer request; as long as a row can take on a slow machine."""


def available_threads() -> int:
    """Cores this process may use: its affinity, and the processor share of its cgroup (version 2) where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))


def open_core(target: Target) -> ov.Core:
    """A Core that knows the target. Raises RuntimeError, as everything of OpenVINO does."""
    core = ov.Core()
    if target.plugin:
        core.register_plugin(target.plugin, target.openvino)
    return core


def compile_static(
    core: ov.Core,
    target: Target,
    spec: ModelSpec,
    shapes: Sequence[RowShape],
    properties: Mapping[str, object],
    *,
    cache: Cache | None = None,
    store: Path | None = None,
    demanded: Mapping[str, object] | None = None,
    faults: npt.NDArray[np.uint64] | None = None,
) -> dict[RowShape, ov.CompiledModel]:
    """One static graph a row shape, compiled one after the other with those of ``properties`` that the plugin lists.

    cache: where OpenVINO keeps blobs; without it, or where its disk is full, each graph is compiled anew. store: where
    blobs made ahead of time may lie. demanded: properties that are set whether the plugin lists them or not. faults: the
    control block of the arena; then devices/faults.py stands in the graph, which cannot be cached.
    """
    listed = core.get_property(target.openvino, "SUPPORTED_PROPERTIES")
    wanted = {**supported({**target.asked(spec.precision, properties), **_compiler()}, listed), **(demanded or {})}
    folder = None if cache is None or faults is not None else cache.folder(_versions(core, target))
    if folder is not None:
        core.set_property({"CACHE_DIR": str(folder)})
    graphs = Graphs(spec)
    models: dict[RowShape, ov.CompiledModel] = {}
    for shape in shapes:
        ready = store and faults is None and import_blob(core, target, stored(store, target, spec, shape), wanted)
        if ready:
            models[shape] = ready
            continue
        model = graphs(Form.of(shape), target.kind.style)
        if target.kind.static and model.is_dynamic():  # the processor behind npu-sim would take it
            raise RuntimeError(f"the graph for rows of {shape} is dynamic; {target.name} takes static shapes only")
        if faults is not None:
            model = with_faults(model, faults)
        try:
            models[shape] = core.compile_model(model, target.openvino, wanted)
        except RuntimeError:
            if folder is None:
                raise
            folder = None
            core.set_property({"CACHE_DIR": ""})  # a blob that cannot be read or written must not stop anybody
            models[shape] = core.compile_model(model, target.openvino, wanted)
    graphs.release()
    if cache is not None:
        cache.prune()
    return models


def _versions(core: ov.Core, target: Target) -> list[str]:
    """All that a blob depends on besides the graph."""
    found = [ov.get_version(), target.name]
    for name in ("FULL_DEVICE_NAME", "NPU_DRIVER_VERSION", "NPU_COMPILER_VERSION", "GPU_DRIVER_VERSION"):
        try:
            found.append(str(core.get_property(target.openvino, name)))
        except RuntimeError:  # not every plugin has every property
            continue
    return found


def _compiler() -> dict[str, object]:
    """Linux wheels carry no NPU compiler; the driver has one."""
    libraries = Path(ov.__file__).parent / "libs"
    return {} if any(libraries.glob("*npu_compiler_loader*")) else {"NPU_COMPILER_TYPE": "DRIVER"}


class OpenVinoCpu:
    """A Device on the processor, in this process.

    The full rows of a deep queue share a graph of fixed size, in which only attention depends on the bins; it is up to
    a fifth faster than the graph of no fixed size that the small rows of a shallow queue share. There are no more
    graphs, because each holds the weights again in its own layout. Rows of any other shape are taken too: they come
    from accelerators that failed.
    """

    name = "cpu"
    kind = "cpu"
    ready = True

    def __init__(
        self,
        spec: ModelSpec,
        *,
        threads: int = 0,
        streams: int = 0,
        row_tokens: int = 512,
        packed: bool = True,
        golden: GoldenRow | None = None,
    ) -> None:
        """threads: 0 takes what affinity and cgroup allow. streams: rows at once, 0 is one a thread."""
        self._threads = threads or available_threads()
        self.streams = self.most_streams = streams or self._threads
        self.shapes: Sequence[RowShape] = dynamic_shapes(spec.max_length, row_tokens, packed=packed)
        self._row_tokens = row_tokens
        self._golden = golden
        self._precision = spec.precision
        self._failing = ""
        graphs = Graphs(spec)
        try:
            core = ov.Core()
            with ThreadPoolExecutor(2) as pool:  # compiling leaves cores idle; two at once take little longer than one
                # Small rows are computed one at a time by all threads, full rows one a thread.
                full = pool.submit(self._compile, core, spec, graphs(Form(tokens=row_tokens), CPU), self.streams)
                small = pool.submit(self._compile, core, spec, graphs(Form(), CPU), 1)
            self._full, self._small = full.result(), small.result()
            graphs.release()
        except RuntimeError as error:
            raise DeviceError(f"the CPU could not compile {spec.name}: {first_line(error)}") from error

    def _compile(self, core: ov.Core, spec: ModelSpec, model: ov.Model, streams: int) -> queue.SimpleQueue[ov.InferRequest]:
        """An infer request a stream; the compiled graph lives as long as they do."""
        wanted = {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": self._threads}
        compiled = core.compile_model(model, "CPU", TARGETS["cpu"].asked(spec.precision, wanted))
        requests: queue.SimpleQueue[ov.InferRequest] = queue.SimpleQueue()
        for _ in range(streams):
            requests.put(compiled.create_infer_request())
        return requests

    def takes(self, shape: Shaped) -> bool:
        """Any row."""
        return True

    def infer(self, pack: Pack, late: float = math.inf) -> Output:
        """Vectors [bins, segments, width] float32. Raises DeviceError."""
        shape = pack.shape
        requests = self._full if shape.bins * shape.positions == self._row_tokens else self._small
        try:
            request = requests.get(timeout=ROOM_SECONDS)
        except queue.Empty:
            raise RowError(Failure.BUSY, f"the CPU had no room for a row within {ROOM_SECONDS:g} seconds") from None
        start = time.perf_counter()
        try:
            # The inputs are shared, not copied: the pack holds them until the run is over.
            results = request.infer(dict(pack.inputs), share_inputs=True)
            vectors = np.array(results[0], np.float32)
        except RuntimeError as error:
            raise RowError(Failure.ERROR, f"the CPU failed: {first_line(error)}") from error
        finally:
            requests.put(request)
        return Output(vectors, self.name, time.perf_counter() - start)

    def reports(self) -> Sequence[Report]:
        """The CPU serves, or its last probe failed."""
        return [
            Report(
                name=self.name,
                kind=self.kind,
                state="failing" if self._failing else "serving",
                reason=self._failing,
                precision=self._precision,
            )
        ]

    def probe(self) -> None:
        """Run the smallest golden row. Raises DeviceError."""
        if self._golden is None:
            return
        row = self._golden(min(self.shapes, key=lambda shape: shape.tokens))
        try:
            check_vectors(self.name, row, self.infer(row).vectors)
        except DeviceError as error:
            self._failing = str(error)
            raise
        self._failing = ""

    def close(self) -> None:
        """Nothing is held outside this object."""
