"""Two faults of OpenVINO at the start of a process, with OpenVINO and numpy alone. See openvino-races.md.

    python openvino_races.py make FOLDER                   # write a model like a small BERT with random weights (43 MB)
    python openvino_races.py run FOLDER WAY                # one start: good, BAD (and which inferences: X), or it hangs
    python openvino_races.py count FOLDER SECONDS WAY ...  # fresh processes, the ways in turn: how many good, BAD, hung

A WAY is made of words: streams (one compiled model with two streams), slots (two compiled models with one stream each), cold (two
threads make their first calls into the bindings at the same time; otherwise one thread makes them on a tiny model before), prior
(the same model was compiled with one stream, run and dropped before), cpu (GELU and attention in plain operations; otherwise the
operations Gelu and ScaledDotProductAttention).
"""

import collections
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops

LAYERS, BINS, TOKENS, WIDTH, HEADS = 6, 4, 128, 384, 12
ASKED = {"INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": False}


def make(folder: Path) -> None:
    """Write the model in both styles, its input, and what one stream computes."""
    folder.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(1).standard_normal((BINS, TOKENS, WIDTH)).astype(np.float32)
    np.save(folder / "x.npy", x)
    for style in ("native", "cpu"):
        ov.save_model(bert(style), folder / f"{style}.xml", compress_to_fp16=False)
        one = ov.Core().compile_model(folder / f"{style}.xml", "CPU", {**ASKED, "NUM_STREAMS": 1})
        np.save(folder / f"{style}.npy", one.create_infer_request().infer([x])[0])


def bert(style: str) -> ov.Model:
    """Encoder layers with random weights, [BINS, TOKENS, WIDTH] -> the same."""
    rng = np.random.default_rng(0)

    def linear(x, wide, narrow):
        weight = ops.constant((rng.standard_normal((wide, narrow)) / narrow**0.5).astype(np.float32))
        bias = ops.constant(rng.standard_normal((1, wide)).astype(np.float32) * 0.02)
        return ops.add(ops.matmul(x, weight, False, True), bias)

    def heads(x):
        return ops.transpose(ops.reshape(x, [BINS, TOKENS, HEADS, WIDTH // HEADS], False), [0, 2, 1, 3])

    def attention(q, k, v):
        if style == "native":
            return ops.scaled_dot_product_attention(q, k, v)
        scores = ops.multiply(ops.matmul(q, k, False, True), ops.constant(np.float32((WIDTH // HEADS) ** -0.5)))
        return ops.matmul(ops.softmax(scores, 3), v, False, False)

    def gelu(x):
        if style == "native":
            return ops.gelu(x, "erf")
        return ops.multiply(
            x, ops.multiply(ops.add(ops.erf(ops.multiply(x, np.float32(0.5**0.5))), np.float32(1)), np.float32(0.5))
        )

    def norm(x):
        return ops.mvn(x, ops.constant(np.array([1])), True, 1e-12, "inside_sqrt")

    parameter = ops.parameter([BINS, TOKENS, WIDTH], np.float32, name="x")
    hidden = norm(ops.reshape(parameter, [BINS * TOKENS, WIDTH], False))
    for _ in range(LAYERS):
        q, k, v = (heads(linear(hidden, WIDTH, WIDTH)) for _ in range(3))
        mixed = ops.reshape(ops.transpose(attention(q, k, v), [0, 2, 1, 3]), [BINS * TOKENS, WIDTH], False)
        hidden = norm(ops.add(hidden, linear(mixed, WIDTH, WIDTH)))
        hidden = norm(ops.add(hidden, linear(gelu(linear(hidden, 4 * WIDTH, WIDTH)), WIDTH, 4 * WIDTH)))
    return ov.Model([ops.reshape(hidden, [BINS, TOKENS, WIDTH], False)], [parameter], "bert")


def run(folder: Path, way: list[str]) -> None:
    """One start of a process."""
    style = "cpu" if "cpu" in way else "native"
    x, right = np.load(folder / "x.npy"), np.load(folder / f"{style}.npy")
    core, model = ov.Core(), folder / f"{style}.xml"
    if "cold" not in way:
        parameter = ops.parameter([1, 4], np.float32, name="p")
        tiny = core.compile_model(ov.Model([ops.relu(parameter)], [parameter], "tiny"), "CPU")
        np.array(tiny.create_infer_request().infer([np.zeros((1, 4), np.float32)])[0])
    if "prior" in way:
        before = core.compile_model(model, "CPU", {**ASKED, "NUM_STREAMS": 1})
        np.array(before.create_infer_request().infer([x])[0])
        del before
    if "slots" in way:
        one = {**ASKED, "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": 1}
        compiled = [core.compile_model(model, "CPU", one) for _ in range(2)]
    else:
        compiled = [core.compile_model(model, "CPU", {**ASKED, "NUM_STREAMS": 2, "INFERENCE_NUM_THREADS": 2})] * 2
    requests = [each.create_infer_request() for each in compiled]
    seen: list[list[str]] = [[], []]
    gate = threading.Barrier(2)

    def work(number: int) -> None:
        gate.wait()
        for _ in range(5):
            wrong = not np.abs(np.array(requests[number].infer([x])[0]) - right).max() < 1e-3
            seen[number].append("X" if wrong else ".")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("BAD" if "X" in str(seen) else "good", *("".join(one) for one in seen))


def count(folder: Path, seconds: float, ways: list[str]) -> None:
    """Fresh processes, until the time is over."""
    found: dict[str, collections.Counter[str]] = {way: collections.Counter() for way in ways}
    end = time.time() + seconds
    while time.time() < end:
        for way in ways:
            command = [sys.executable, __file__, "run", str(folder), *way.split("-")]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=25, check=False)
                found[way][done.stdout.strip() or f"exit {done.returncode} {done.stderr[-80:]}"] += 1
            except subprocess.TimeoutExpired:
                found[way]["hung"] += 1
    for way, outcomes in found.items():
        print(way, dict(outcomes), flush=True)


if __name__ == "__main__":
    verb, place, *rest = sys.argv[1:]
    if verb == "make":
        make(Path(place))
    elif verb == "run":
        run(Path(place), rest)
    else:
        count(Path(place), float(rest[0]), rest[1:])
