"""ONNX Runtime as a Device: a second runtime behind OpenVINO's devices, which computes the same graph from the same weights.

It takes the same batches as the CPU, with packing and canaries, but shares no code with OpenVINO below graph/. So it answers when
OpenVINO cannot, and where its vectors differ, one of the two is wrong. It is slower than the CPU device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from npu_proxy.batch import NATIVE_STYLE, Batch, BatchShape, GraphShape, Output, output_for
from npu_proxy.devices.base import DeviceReport, GoldenBatch
from npu_proxy.devices.canary import Guard
from npu_proxy.devices.certify import KnownOutputs
from npu_proxy.devices.failure import BatchError, Failure, first_line
from npu_proxy.devices.graphs import Graphs
from npu_proxy.devices.onnx_graph import to_onnx
from npu_proxy.devices.shapes import dynamic_shapes
from npu_proxy.devices.threads import WAITING, DeviceThreads, Turn
from npu_proxy.errors import DeviceError, SettingsError
from npu_proxy.spec import ModelSpec
from npu_proxy.targets import TARGETS


class OnnxRuntime:
    """The model in ONNX Runtime on the CPU, in fp32."""

    name = kind = "onnx"
    ready = True
    streams = max_streams = 1

    def __init__(self, spec: ModelSpec, *, threads: int, batch_tokens: int, packed: bool, golden: GoldenBatch) -> None:
        """threads: per batch. Raises SettingsError if the packages are missing, DeviceError if it cannot compute the model."""
        self._spec = spec
        self._golden = golden
        self.shapes: Sequence[BatchShape] = dynamic_shapes(spec.max_length, batch_tokens, packed=packed)
        self._session = _open(spec, threads)
        self._inputs = [port.name for port in self._session.get_inputs()]
        self._turn = Turn(self.name)
        self._threads = DeviceThreads(WAITING, self.name)
        least = TARGETS["cpu"].kind.least_cosine["fp32"]
        self._guard = Guard(self.name, least)
        self._known = KnownOutputs(golden, least)

    @property
    def busy_since(self) -> float | None:
        """When its current batch began."""
        return self._turn.since

    def takes(self, shape: BatchShape) -> bool:
        """Any shape."""
        return True

    def submit(self, batch: Batch) -> Future[Output]:
        """Compute vectors [bins, segments, width] float32. Fails with BatchError."""
        return self._threads.submit(self._checked, batch)

    def _checked(self, batch: Batch) -> Output:
        if batch.canaries and not self._guard.canaries:
            self._learn_canaries(batch.shape)
        output = self._compute(batch)
        self._guard.check(batch, output.vectors)
        return output

    def _learn_canaries(self, shape: BatchShape) -> None:
        """Compute the canaries once, so that batches can be checked."""
        batch = self._golden.canary_batch(shape)
        vectors = self._compute(batch).vectors
        self._guard.canaries = [output_for(batch, index, vectors) for index in range(len(batch.encodings))]

    def _compute(self, batch: Batch) -> Output:
        with self._turn:
            start = time.perf_counter()
            try:
                (vectors,) = self._session.run(["output"], {name: batch.inputs[name] for name in self._inputs})
            except Exception as error:  # the runtime raises its own exception classes
                raise BatchError(Failure.ERROR, f"{self.name} failed: {first_line(error)}") from error
            seconds = time.perf_counter() - start
        shape = batch.shape
        expected = self._spec.batch_layout.output(shape.bins, shape.positions, shape.segments)
        return Output(np.asarray(vectors, np.float32).reshape(expected), self.name, seconds)

    def reports(self) -> Sequence[DeviceReport]:
        """One report."""
        return [
            DeviceReport(
                name=self.name,
                kind=self.kind,
                state="serving",
                guarded=self._guard.passed,
                canary_failures=self._guard.failures,
            )
        ]

    def probe(self) -> None:
        """Compute golden texts, and compare them with what they gave first. Raises DeviceError."""
        self._known.compare(self)

    def doubt(self, reason: str) -> None:
        """Its batches carry their own proof; there is nothing else to examine."""

    def close(self) -> None:
        """Stop the threads; the session is freed with this object."""
        self._threads.close()


def _open(spec: ModelSpec, threads: int) -> Any:
    try:
        import onnxruntime

        onnxruntime.disable_telemetry_events()

        content = to_onnx(Graphs(spec)(GraphShape(), NATIVE_STYLE))
    except ImportError as error:
        message = f"device `onnx` needs {error.name}: pip install 'npu-proxy[onnx]'"
        raise SettingsError(message, param="device") from None
    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        raise DeviceError(f"ONNX Runtime cannot load the graph of {spec.name}: {first_line(error)}") from error
