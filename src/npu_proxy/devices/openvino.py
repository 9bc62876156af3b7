"""Opens OpenVINO's core for a target, and runs the CPU in this process as a Device."""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import openvino as ov

from npu_proxy.batch import CPU_STYLE, Batch, BatchShape, GraphShape, Output
from npu_proxy.devices.base import DeviceReport, GoldenBatch, check_vectors
from npu_proxy.devices.failure import BatchError, Failure, first_line
from npu_proxy.devices.graphs import Graphs
from npu_proxy.devices.shapes import dynamic_shapes
from npu_proxy.devices.threads import DeviceThreads
from npu_proxy.errors import DeviceError
from npu_proxy.spec import ModelSpec
from npu_proxy.system import available_threads
from npu_proxy.targets import TARGETS, Target

WAIT_SECONDS = 60.0
"""How long a batch waits for a free infer request: as long as a batch can take on a slow machine."""
_WAITING = 4
"""Threads per stream: one computes, and batches from devices that failed wait in the others."""


def open_core(target: Target) -> ov.Core:
    """Create a Core with the target's plugin registered. Raises RuntimeError, as all of OpenVINO does."""
    core = ov.Core()
    if target.plugin:
        core.register_plugin(target.plugin, target.openvino)
    return core


class OpenVinoCpu:
    """The CPU as a Device, in this process.

    It has two graphs. Full batches, from a deep queue, use one of fixed size, in which only attention depends on the bins; it is
    up to a fifth faster than the graph of dynamic size, which small batches from a shallow queue use. There are no more graphs
    because each holds another copy of the weights in its own layout. Batches of any other shape, which come from accelerators
    that failed, are accepted too.
    """

    name = "cpu"
    kind = "cpu"
    ready = True

    def __init__(
        self,
        spec: ModelSpec,
        *,
        threads: int | None = None,
        streams: int | None = None,
        batch_tokens: int = 512,
        packed: bool = True,
        golden: GoldenBatch | None = None,
    ) -> None:
        """threads: None uses as many as affinity and cgroup allow. streams: batches computed at once; None means one per thread."""
        self._threads = threads or available_threads()
        self.streams: int = streams or self._threads
        self.max_streams: int = self.streams
        self.shapes: Sequence[BatchShape] = dynamic_shapes(spec.max_length, batch_tokens, packed=packed)
        self._batch_tokens = batch_tokens
        self._golden = golden
        self._precision = spec.precision
        self._failing = ""
        graphs = Graphs(spec)
        try:
            core = ov.Core()
            with ThreadPoolExecutor(2) as pool:  # compiling leaves cores idle; two at once take little longer than one
                # Small batches are computed one at a time by all threads, full batches one per stream.
                full = pool.submit(self._compile, core, spec, graphs(GraphShape(tokens=batch_tokens), CPU_STYLE), self.streams)
                small = pool.submit(self._compile, core, spec, graphs(GraphShape(), CPU_STYLE), 1)
            self._full, self._small = full.result(), small.result()
            graphs.release()
        except RuntimeError as error:
            raise DeviceError(f"the CPU could not compile {spec.name}: {first_line(error)}") from error
        self._workers = DeviceThreads(_WAITING * self.streams, self.name)

    def _compile(self, core: ov.Core, spec: ModelSpec, model: ov.Model, streams: int) -> queue.SimpleQueue[ov.InferRequest]:
        """Compile a graph; returns one infer request per stream, which keep it alive."""
        wanted = {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": self._threads}
        compiled = core.compile_model(model, "CPU", TARGETS["cpu"].requested(spec.precision, wanted))
        infer_requests: queue.SimpleQueue[ov.InferRequest] = queue.SimpleQueue()
        for _ in range(streams):
            infer_requests.put(compiled.create_infer_request())
        return infer_requests

    def takes(self, shape: BatchShape) -> bool:
        """Any shape."""
        return True

    def submit(self, batch: Batch) -> Future[Output]:
        """Compute vectors [bins, segments, width] float32. Fails with DeviceError."""
        return self._workers.submit(self._infer, batch)

    def _infer(self, batch: Batch) -> Output:
        infer_requests = self._full if batch.shape.tokens == self._batch_tokens else self._small
        try:
            infer_request = infer_requests.get(timeout=WAIT_SECONDS)
        except queue.Empty:
            raise BatchError(Failure.BUSY, f"the CPU could not start a batch within {WAIT_SECONDS:g} seconds") from None
        start = time.perf_counter()
        try:
            # The inputs are shared, not copied: the batch keeps them alive until inference ends.
            results = infer_request.infer(dict(batch.inputs), share_inputs=True)
            vectors = np.array(results[0], np.float32)
        except RuntimeError as error:
            raise BatchError(Failure.ERROR, f"the CPU failed: {first_line(error)}") from error
        finally:
            infer_requests.put(infer_request)
        return Output(vectors, self.name, time.perf_counter() - start)

    def reports(self) -> Sequence[DeviceReport]:
        """One report: serving, or failing if the last probe failed."""
        return [
            DeviceReport(
                name=self.name,
                kind=self.kind,
                state="failing" if self._failing else "serving",
                reason=self._failing,
                precision=self._precision,
            )
        ]

    def probe(self) -> None:
        """Compute the smallest golden batch. Raises DeviceError."""
        if self._golden is None:
            return
        batch = self._golden(min(self.shapes, key=lambda shape: shape.tokens))
        try:
            check_vectors(self.name, batch, self.submit(batch).result().vectors)
        except DeviceError as error:
            self._failing = str(error)
            raise
        self._failing = ""

    def close(self) -> None:
        """Stop the threads; the compiled graphs are freed with this object."""
        self._workers.close()
