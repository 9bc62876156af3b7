"""npu-proxy against its peers, in one run: the same texts, the same 256-token limit, rounds interleaved.

    make bench                      # five rounds; peers that cannot be installed are left out with a note
    python bench/run.py --rounds 2 --tokens 10000 --systems npu-proxy fastembed

Writes bench/results/: bench.json (every number), bench.md (the table), bench.png (the plot).
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from latency import latency, server_seconds, start_server
from limit import best_flops, useful_flops
from npu_proxy import Settings
from npu_proxy.models.store import ModelStore
from npu_proxy.system import available_threads
from peers import ROOT, onnx_folder, python_of, version_of
from report import write
from worker import LIMIT, SYSTEMS

SERVERS = ("npu-proxy", "infinity")


class Worker:
    """A system's process. ``start_seconds``: from the start of the process to its first vector."""

    def __init__(self, system: str, python: str, model: Path, onnx: Path) -> None:
        begun = time.perf_counter()
        command = [python, str(ROOT / "bench" / "worker.py"), system, str(model), str(onnx)]
        log = tempfile.TemporaryFile("w+")
        self._log = log
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment()
        )
        self.last = self._answer()
        self.start_seconds = time.perf_counter() - begun

    def run(self, texts: Path, vectors: Path | None = None) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"texts": str(texts), "vectors": str(vectors) if vectors else None}) + "\n")
        self.process.stdin.flush()
        self.last = self._answer()
        return self.last["seconds"]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError((self._log.read().strip().splitlines() or ["it ended without a word"])[-1])
        return json.loads(line)


def environment() -> dict[str, str]:
    """Offline, and without settings that slow a BLAS down."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OPENBLAS_", "OMP_", "MKL_"))}
    return clean | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--tokens", type=int, default=25_000, help="useful tokens of a round, truncated texts counted as cut")
    arguments.add_argument("--systems", nargs="*", default=list(SYSTEMS))
    arguments.add_argument("--no-servers", action="store_true", help="leave out the HTTP figures")
    arguments.add_argument("--output", type=Path, default=ROOT / "bench" / "results")
    given = arguments.parse_args()
    os.environ.update(environment())
    stored = ModelStore(Settings().store).find(Settings().model[0])
    assert stored is not None, "make weights"
    texts, tokens = sample(given.data / "corpus.jsonl", stored.folder, given.tokens)
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(given, stored.folder, texts, tokens, Path(scratch))
    write(results, given.output)


def sample(corpus: Path, model: Path, budget: int) -> tuple[list[str], list[int]]:
    """Random texts of the corpus up to a budget of tokens as they are embedded."""
    every = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").split("\n") if line]
    random.Random(0).shuffle(every)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LIMIT)
    counts = [len(encoding.ids) for encoding in tokenizer.encode_batch(every[: budget // 20])]
    total = 0
    for number, count in enumerate(counts):
        total += count
        if total >= budget:
            return every[: number + 1], counts[: number + 1]
    return every[: len(counts)], counts


def measure(given: argparse.Namespace, model: Path, texts: list[str], tokens: list[int], scratch: Path) -> dict:
    onnx = onnx_folder(model)
    listed = scratch / "texts.json"
    listed.write_text(json.dumps(texts))
    workers: dict[str, Worker] = {}
    results: dict = {"texts": len(texts), "tokens": sum(tokens), "systems": {}, "left_out": {}, "rounds": []}
    results["threads"] = threads = available_threads()
    for system in given.systems:
        python, why = python_of(system)
        try:
            if python is None:
                raise RuntimeError(why)
            workers[system] = Worker(system, python, model, onnx)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            results["left_out"][system] = str(error)
            print(f"left out {system}: {error}", file=sys.stderr)
            continue
        version = version_of(python, system)
        results["systems"][system] = {"version": version, "start_seconds": workers[system].start_seconds}
        print(f"{system} {version} started in {workers[system].start_seconds:.1f} s", file=sys.stderr)
    for system, worker in workers.items():  # warm up, and see that all compute the same
        worker.run(listed, scratch / f"{system}.npy")
        ours, theirs = (np.load(scratch / f"{name}.npy") for name in ("npu-proxy", system))
        results["systems"][system]["smallest_cosine"] = float((ours * theirs).sum(1).min())
    servers = (
        {} if given.no_servers else {name: start_server(name, python_of(name)[0], model) for name in SERVERS if name in workers}
    )
    flops = useful_flops(tokens)
    for number in range(given.rounds):
        best = best_flops(threads)
        measured: dict = {"matrix_product": max(best.values()), "matrix_products": best, "seconds": {}}
        for system in sorted(workers, key=lambda _: random.random()):
            measured["seconds"][system] = workers[system].run(listed)
        for name, server in servers.items():
            measured["seconds"][f"{name} server"] = server_seconds(server, texts)
        best = best_flops(threads)
        measured["matrix_product"] = max(measured["matrix_product"], *best.values())
        measured["of_limit"] = flops / measured["seconds"]["npu-proxy"] / measured["matrix_product"]
        results["rounds"].append(measured)
        shown = ", ".join(f"{name} {sum(tokens) / seconds:.0f}" for name, seconds in measured["seconds"].items())
        print(f"round {number + 1}: tokens/s {shown}; {measured['of_limit']:.2f} of the limit", file=sys.stderr)
    for system, worker in workers.items():
        results["systems"][system]["peak_mb"] = worker.last["peak_mb"]
        worker.close()
    if servers:
        batch_seconds = statistics.median(
            512 / (sum(tokens) / measured["seconds"]["npu-proxy"] / threads) for measured in results["rounds"]
        )
        results["row_seconds"] = batch_seconds
        results["latency"] = {name: latency(server, texts) for name, server in servers.items()}
        for server in servers.values():
            server.close()
    return results


if __name__ == "__main__":
    main()
