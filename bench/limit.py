"""The machine's own limit: the best float32 matrix product it does, and the useful work of a text in the model."""

import queue
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import openvino as ov
from openvino import opset15 as op

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
"""Processors with bfloat16 would use it by themselves."""
WIDTH, INNER, LAYERS = 384, 1536, 6
"""all-MiniLM-L6-v2."""


def useful_flops(tokens: Sequence[int]) -> float:
    """FLOPs of the model's matrix products for texts of so many tokens: linear layers and attention among own tokens."""
    linear = 2 * LAYERS * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER)
    return float(sum(count * linear + LAYERS * 4 * count * count * WIDTH for count in tokens))


def best_flops(threads: int, seconds: float = 1.0) -> dict[str, float]:
    """FLOPs per second of candidates, one after the other: numpy's BLAS, and OpenVINO at the model's own shapes."""
    side = 2048
    square = np.random.default_rng(0).random((side, side), np.float32)
    found = {f"numpy {side}x{side}x{side}": _rate(lambda: square @ square, 2 * side**3, seconds)}
    for rows, depth, columns in ((512, WIDTH, INNER), (512, INNER, WIDTH), (512, WIDTH, 3 * WIDTH), (1024, 1024, 1024)):
        found[f"openvino {rows}x{depth}x{columns}"] = _openvino(rows, depth, columns, threads, seconds)
    return found


def _rate(call: Callable[[], object], flops: float, seconds: float) -> float:
    call()
    begun, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - begun) < seconds:
        call()
        calls += 1
    return calls * flops / spent


def _openvino(rows: int, depth: int, columns: int, threads: int, seconds: float) -> float:
    """A chain of eight products, so that calls cost nothing, in as many streams as threads."""
    rng = np.random.default_rng(0)
    given = op.parameter([rows, depth], np.float32)
    x, flops = given, 0.0
    for _ in range(4):
        for inner, outer in ((depth, columns), (columns, depth)):
            x = op.matmul(x, op.constant(rng.random((outer, inner), np.float32) / inner), False, True)
            flops += 2 * rows * inner * outer
    model = ov.Model([op.result(x)], [given], "products")  # pyright: ignore[reportGeneralTypeIssues] - a wrong stub
    compiled = ov.Core().compile_model(model, "CPU", {**EXACT, "NUM_STREAMS": threads, "INFERENCE_NUM_THREADS": threads})
    begin: queue.SimpleQueue[float] = queue.SimpleQueue()
    total: queue.SimpleQueue[float] = queue.SimpleQueue()

    def work() -> None:
        request = compiled.create_infer_request()
        total.put(_rate(lambda: request.infer([np.ones((rows, depth), np.float32)]), flops, seconds))

    workers = [threading.Thread(target=work) for _ in range(threads)]
    begin.put(time.perf_counter())
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(total.get() for _ in workers)
