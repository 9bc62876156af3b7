"""Fresh processes of the product, from their first request on: every answer compared, nothing wrong, nothing hung.

Each start loads a model on npu-sim in a new process, and four threads send their first texts at the same time. Starts alternate
between three models, a new and a used compile cache, and an idle and a busy machine. Results are added to the output file, so a run
can be stopped and continued. At the end it says which rate of faulty starts so many clean ones can exclude.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from npu_proxy import Engine, OutputType, Settings

ROOT = Path(__file__).parents[1]
MODELS = (
    "sentence-transformers/all-MiniLM-L6-v2",
    str(ROOT / "examples/models/scifact-reranker"),
    str(ROOT / "examples/models/banking77-classifier"),
)
LEAST = 0.9999
"""Cosine to the CPU's vectors, or 1 minus the difference of scores, below which an answer is wrong."""
SECONDS = 90.0
"""After so long a start hangs."""
THREADS = 4
WORDS = tuple("the cat dog house red green blue runs sleeps eats one two three four five moon star".split())  # noqa: SIM905


def texts(thread: int) -> list[str]:
    """Some texts of different lengths, the same in every process."""
    chosen = random.Random(thread)
    return [" ".join(chosen.choices(WORDS, k=chosen.choice((3, 10, 40, 120)))) + f" {thread} {number}" for number in range(24)]


def answers(engine: Engine, thread: int) -> np.ndarray:
    """Vectors [texts, width], or scores [texts, labels], of a thread's texts."""
    own = texts(thread)
    if engine.spec.output_type is not OutputType.SCORES:
        return engine.embed(own)
    if engine.spec.labels and len(engine.spec.labels) > 1:
        return np.array([[label.score for label in sorted(found, key=lambda label: label.label)] for found in engine.classify(own)])
    scores = {result.index: result.score for result in engine.rerank(own[0], own[1:])}
    return np.array([[scores[index]] for index in range(len(own) - 1)])


def least(found: np.ndarray, expected: np.ndarray) -> float:
    """The lowest similarity of an answer to what is expected; -1 if any number is not finite."""
    if not np.isfinite(found).all():
        return -1.0
    if found.shape[1] < 100:
        return float(1 - np.abs(found - expected).max())
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((found * expected).sum(1) / lengths).min())


def one(model: str, device: str, cache: str, expected: Path) -> None:
    """One start, in this process; prints its outcome as JSON. Without ``expected`` on disk, it writes it."""
    settings = Settings(
        model=(model,), device=device, fallback=False, profile=False, cache_mb=0, compile_cache=Path(cache), probe_interval=0.0
    )
    begun = time.monotonic()
    engine = Engine(settings=settings).start()
    started = time.monotonic() - begun
    gate = threading.Barrier(THREADS)

    def first_requests(thread: int) -> np.ndarray:
        gate.wait()
        return np.concatenate([answers(engine, thread) for _ in range(2)])

    with ThreadPoolExecutor(THREADS) as threads:
        found = np.stack(list(threads.map(first_requests, range(THREADS))))
    if not expected.exists():
        np.save(expected, found)
    known = np.load(expected)
    report: Any = engine.device.reports()[0]
    similarity = min(least(a, b) for a, b in zip(found, known, strict=True))
    reason = report.reason if report.state == "serving" else f"{report.state}: {report.reason}"
    guards = {name: getattr(report, name, None) for name in ("slots", "guarded", "canary_failures")}
    print(json.dumps({"least": similarity, "start": started, "reason": reason, **guards}), flush=True)
    os._exit(0)


def start(model: str, device: str, cache: str, expected: Path, environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "one", model, device, cache, str(expected)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"outcome": "hung"}
    if done.returncode:
        return {"outcome": "failed", "error": done.stderr.strip().splitlines()[-1:]}
    found = json.loads(done.stdout.splitlines()[-1])
    return {"outcome": "right" if found["least"] >= LEAST else "wrong", **found}


def excluded(clean: int, confidence: float) -> float:
    """The rate of faulty starts that would have shown itself in so many starts with this confidence."""
    return 1 - (1 - confidence) ** (1 / clean) if clean else 1.0


def report(results: list[dict[str, Any]]) -> str:
    """A table of the outcomes by condition, and what they can exclude."""
    outcomes = ("right", "wrong", "hung", "failed")
    lines = [f"| model | cache | load | {' | '.join(outcomes)} | start, median |", f"|{' --- |' * (len(outcomes) + 4)}"]
    for key in sorted({(each["model"], each["cache"], each["load"]) for each in results}):
        rows = [each for each in results if (each["model"], each["cache"], each["load"]) == key]
        counts = Counter(each["outcome"] for each in rows)
        median = np.median([each["start"] for each in rows if "start" in each] or [0])
        lines.append(f"| {' | '.join(key)} | {' | '.join(str(counts[each]) for each in outcomes)} | {median:.2f} s |")
    clean = sum(each["outcome"] == "right" for each in results)
    bad = len(results) - clean
    rates = ", ".join(f"{100 * excluded(clean, sure):.2f} % with {100 * sure:g} % confidence" for sure in (0.95, 0.999))
    lines.append(f"\n{len(results)} starts, {bad} of them faulty." + ("" if bad else f" Rates of faulty starts excluded: {rates}."))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1200.0, help="how long to go on")
    parser.add_argument(
        "--source", type=Path, default=ROOT / "src", help="sources of the product to start, such as an older checkout's"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "stress.json")
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    environment = {**os.environ, "PYTHONPATH": str(arguments.source)}
    end = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for model in MODELS:
            start(model, "cpu", str(folder / "none"), folder / f"{Path(model).name}.npy", environment)
        for number, (load, kind, model) in enumerate(itertools.cycle(itertools.product(("idle", "busy"), ("new", "used"), MODELS))):
            if time.monotonic() > end:
                break
            cache = folder / (f"cache-{number}" if kind == "new" else "cache")
            burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 if load == "busy" else 0)]
            try:
                found = start(model, "npu-sim", str(cache), folder / f"{Path(model).name}.npy", environment)
            finally:
                for burner in burners:
                    burner.kill()
                    burner.wait()
            results.append({"model": Path(model).name, "cache": kind, "load": load, **found})
            if found["outcome"] != "right":
                print(results[-1], flush=True)
            arguments.output.write_text(json.dumps(results) + "\n")
    page = report(results)
    print(page)
    arguments.output.with_suffix(".md").write_text(f"# Starts\n\n{(__doc__ or '').strip()}\n\n{page}\n")
    raise SystemExit(0 if all(each["outcome"] == "right" for each in results) else 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        one(sys.argv[2], sys.argv[3], sys.argv[4], Path(sys.argv[5]))
    else:
        main()
