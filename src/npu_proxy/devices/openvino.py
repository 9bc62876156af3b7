"""The CPU through OpenVINO: one compiled graph, one infer request a stream, a bounded set of row shapes."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino as ov

from npu_proxy.errors import DeviceError
from npu_proxy.graph.build import build, family
from npu_proxy.graph.packed import CPU, DYNAMIC, RowShape
from npu_proxy.models.weights import Tensors
from npu_proxy.types import ModelSpec, Output, Pack

SMALL_BINS = (32, 64, 128)
"""Bin lengths besides the base length; short texts in short bins spend less on attention."""
BASE_POSITIONS = 256
"""The row length every model has, and its own limit beside it."""


def row_shapes(max_length: int, row_tokens: int, *, packed: bool) -> list[RowShape]:
    """The rows of a device: full rows of ``row_tokens`` for a deep queue, single bins for a shallow one.

    packed: whether a bin takes several texts.
    Bin lengths are those of SMALL_BINS and BASE_POSITIONS below the model's limit, and the limit itself.
    """
    lengths = [length for length in (*SMALL_BINS, BASE_POSITIONS) if length < max_length] + [max_length]
    shapes = {(bins, length): None for length in lengths for bins in (1, max(1, row_tokens // length))}
    return [RowShape(bins=bins, positions=length, segments=max(1, length // 8) if packed else 1) for bins, length in shapes]


def available_threads() -> int:
    """Cores this process may use: its affinity, and the processor share of its cgroup (version 2) where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))


class OpenVinoCpu:
    """A Device on the processor, in this process."""

    name = "cpu"
    kind = "cpu"

    def __init__(self, spec: ModelSpec, *, threads: int = 0, streams: int = 0, row_tokens: int = 512, packed: bool = True) -> None:
        """threads: 0 takes what affinity and cgroup allow. streams: rows at once, 0 is one a thread."""
        threads = threads or available_threads()
        self.streams = streams or threads
        self.shapes: Sequence[RowShape] = row_shapes(spec.max_length, row_tokens, packed=packed)
        self._threads = threads
        try:
            self._compiled = self._compile(spec)
            self._requests: queue.SimpleQueue[ov.InferRequest] = queue.SimpleQueue()
            for _ in range(self.streams):
                self._requests.put(self._compiled.create_infer_request())
        except RuntimeError as error:
            raise DeviceError(f"the CPU could not compile {spec.name}: {_first_line(error)}") from error

    def _compile(self, spec: ModelSpec) -> ov.CompiledModel:
        weights = Tensors(spec.weight_files, family(spec).canonical_name)
        model = build(spec, weights, DYNAMIC, CPU)
        properties: dict[str, object] = {
            "PERFORMANCE_HINT": "THROUGHPUT",
            "NUM_STREAMS": self.streams,
            "INFERENCE_NUM_THREADS": self._threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,  # the tokenizer and HTTP share these cores
        }
        return ov.Core().compile_model(model, "CPU", properties)

    def infer(self, pack: Pack) -> Output:
        """Vectors [bins, segments, width] float32. Raises DeviceError."""
        request = self._requests.get()
        start = time.perf_counter()
        try:
            # The inputs are shared, not copied: the pack holds them until the run is over.
            results = request.infer(dict(pack.inputs), share_inputs=True)
            vectors = np.array(results[0], np.float32)
        except RuntimeError as error:
            raise DeviceError(f"the CPU failed: {_first_line(error)}") from error
        finally:
            self._requests.put(request)
        return Output(vectors, self.name, time.perf_counter() - start)

    def close(self) -> None:
        """Nothing is held outside this object."""


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
