"""The CPU through OpenVINO: one compiled graph, one infer request a stream, a bounded set of row shapes."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import numpy as np
import openvino as ov

from npu_proxy.errors import DeviceError
from npu_proxy.graph.build import build, family
from npu_proxy.graph.packed import CPU, Form, RowShape
from npu_proxy.models.weights import Tensors
from npu_proxy.types import ModelSpec, Output, Pack

SHORTEST_BIN = 32
"""Bins double from here until one holds the model's longest text; short bins spend less on attention."""
SHORTEST_IN_FULL_ROW = 64
"""Shorter bins are for a few short texts alone: in a full row they would leave too much of themselves empty."""


def row_shapes(max_length: int, row_tokens: int, *, packed: bool) -> list[RowShape]:
    """The rows of a device: for a deep queue rows of ``row_tokens`` in bins of each length, for a shallow one single bins.

    packed: whether a bin takes several texts. A text longer than ``row_tokens`` is a single bin.
    """
    lengths = [SHORTEST_BIN]
    while lengths[-1] < max_length:
        lengths.append(2 * lengths[-1])
    full = [(row_tokens // length, length) for length in lengths if length >= SHORTEST_IN_FULL_ROW and row_tokens % length == 0]
    bins = [*full, *((1, length) for length in lengths)]
    return [
        RowShape(bins=count, positions=length, segments=max(1, length // 8) if packed else 1)
        for count, length in dict.fromkeys(bins)
    ]


def _graphs(shapes: Sequence[RowShape], row_tokens: int) -> dict[int, list[RowShape]]:
    """Which shapes share a graph, by its fixed number of tokens: the full rows, and -1 for all others."""
    grouped: dict[int, list[RowShape]] = {}
    for shape in shapes:
        grouped.setdefault(row_tokens if shape.tokens == row_tokens else -1, []).append(shape)
    return grouped


def available_threads() -> int:
    """Cores this process may use: its affinity, and the processor share of its cgroup (version 2) where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))


class OpenVinoCpu:
    """A Device on the processor, in this process.

    The full rows of a deep queue share a graph of fixed size, in which only attention depends on the bins; it is up to
    a fifth faster than the graph of no fixed size that the small rows of a shallow queue share. There are no more
    graphs, because each holds the weights again in its own layout.
    """

    name = "cpu"
    kind = "cpu"

    def __init__(self, spec: ModelSpec, *, threads: int = 0, streams: int = 0, row_tokens: int = 512, packed: bool = True) -> None:
        """threads: 0 takes what affinity and cgroup allow. streams: rows at once, 0 is one a thread."""
        self._threads = threads or available_threads()
        self.streams = streams or self._threads
        self.shapes: Sequence[RowShape] = row_shapes(spec.max_length, row_tokens, packed=packed)
        self._requests: dict[RowShape, queue.SimpleQueue[ov.InferRequest]] = {}
        weights = Tensors(spec.weight_files, family(spec).canonical_name)
        try:
            core = ov.Core()
            graphs = _graphs(self.shapes, row_tokens)
            with ThreadPoolExecutor(len(graphs)) as pool:  # compiling leaves cores idle; two at once take little longer than one
                # Small rows are computed one at a time by all threads, full rows one a thread.
                made = {
                    tokens: pool.submit(self._compile, core, spec, weights, Form(tokens=tokens), self.streams if tokens > 0 else 1)
                    for tokens in graphs
                }
            for tokens, shapes in graphs.items():
                self._requests |= dict.fromkeys(shapes, made[tokens].result())
            weights.release()
        except RuntimeError as error:
            raise DeviceError(f"the CPU could not compile {spec.name}: {_first_line(error)}") from error

    def _compile(
        self, core: ov.Core, spec: ModelSpec, weights: Tensors, form: Form, streams: int
    ) -> queue.SimpleQueue[ov.InferRequest]:
        """An infer request a stream; the compiled graph lives as long as they do."""
        properties: dict[str, object] = {
            "PERFORMANCE_HINT": "THROUGHPUT",
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": self._threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,  # the tokenizer and HTTP share these cores
        }
        compiled = core.compile_model(build(spec, weights, form, CPU), "CPU", properties)
        requests: queue.SimpleQueue[ov.InferRequest] = queue.SimpleQueue()
        for _ in range(streams):
            requests.put(compiled.create_infer_request())
        return requests

    def infer(self, pack: Pack) -> Output:
        """Vectors [bins, segments, width] float32. Raises DeviceError."""
        requests = self._requests[cast("RowShape", pack.shape)]
        request = requests.get()
        start = time.perf_counter()
        try:
            # The inputs are shared, not copied: the pack holds them until the run is over.
            results = request.infer(dict(pack.inputs), share_inputs=True)
            vectors = np.array(results[0], np.float32)
        except RuntimeError as error:
            raise DeviceError(f"the CPU failed: {_first_line(error)}") from error
        finally:
            requests.put(request)
        return Output(vectors, self.name, time.perf_counter() - start)

    def close(self) -> None:
        """Nothing is held outside this object."""


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
