"""One model on npu-sim, packed against padded: rows (batches), waste and time over texts of the corpus, in one run.

npu-sim obeys an NPU's rules (static shapes, a worker process, shared memory) on the processor, so the seconds are this
machine's; rows and waste are the same on an NPU. Padded: one text per row, in the shortest bucket that holds it, as an NPU
is used without packing. Both run the same texts in every round, one after the other.

A second table says what the worker process costs per row: the same graph, run in this process and through the worker, in
turns. With the real model npu-sim computes on the very cores whose caches hold our code and data, and each row finds them
cold; the golden model (two layers of 32) leaves them warm, as a real device does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino as ov

from npu_proxy import Engine, Settings
from npu_proxy.batch import Batch, BatchShape, Output
from npu_proxy.devices.accelerator.accelerator import Accelerator
from npu_proxy.devices.certify import Certificates
from npu_proxy.devices.chain import _plan, _Reference
from npu_proxy.devices.fallback import Fallback
from npu_proxy.devices.openvino import open_core
from npu_proxy.devices.worker.compile import compile_static
from npu_proxy.engine.components import EngineComponents
from npu_proxy.engine.golden import GoldenBatches
from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.models.resolve import read_model
from npu_proxy.models.tuning import apply_profile
from npu_proxy.targets import TARGETS

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "mean"
BUCKETS = (32, 64, 128, 256, 512)


class Counted(Fallback):
    """The device, counting what goes through it."""

    rows = positions = 0
    _count = threading.Lock()

    def submit(self, batch: Batch) -> Future[Output]:
        with self._count:
            self.rows += 1
            self.positions += batch.shape.tokens
        return super().submit(batch)


def counts_of(engine: Engine) -> tuple[int, int]:
    """The rows and positions that have gone through an engine's device."""
    assert isinstance(engine.device, Counted)
    return engine.device.rows, engine.device.positions


def engine_of(settings: Settings, shapes: Sequence[BatchShape] | None, limit: int, scratch: Path) -> Engine:
    """An engine on npu-sim alone. shapes: in place of its own. limit: tokens of a text."""

    def components(settings: Settings, _stopping: threading.Event) -> EngineComponents:
        spec = replace(read_model(settings), max_length=limit)
        chosen = apply_profile(replace(settings, profile=False), spec)
        tokenizer = RequestTokenizer(spec)
        golden = GoldenBatches(tokenizer, spec)
        plan = _plan(chosen, spec, "npu-sim")
        plan = replace(plan, shapes=shapes or plan.shapes)
        device = Accelerator(plan, golden, _Reference(chosen, spec, golden), Certificates(scratch))
        device.wait_decided(300)
        return EngineComponents(spec=spec, tokenizer=tokenizer, device=Counted([device], probe_every=0))

    return Engine(settings=settings, components=components).start()


def corpus(data: Path, tokens: int, tokenizer: RequestTokenizer) -> list[str]:
    """Texts of the corpus, chosen at random, until they have ``tokens`` tokens."""
    texts = [json.loads(line)["text"] for line in (data / "corpus.jsonl").read_text(encoding="utf-8").split("\n") if line]
    chosen, held = [], 0
    for index in np.random.default_rng(0).permutation(len(texts)):
        if held >= tokens:
            break
        chosen.append(texts[index])
        held += tokenizer.plain([texts[index]])[0].tokens
    return chosen


def overhead(settings: Settings, scratch: Path, rounds: int) -> list[tuple[str, float, float, float, float]]:
    """For each batch shape: microseconds in this process, through the worker, their difference, and how much of it is outside."""
    spec = read_model(settings)
    chosen = apply_profile(replace(settings, profile=False), spec)
    golden = GoldenBatches(RequestTokenizer(spec), spec)
    plan = _plan(chosen, spec, "npu-sim")
    target = TARGETS["npu-sim"]
    core = open_core(target)
    models = compile_static(core, target, spec, plan.shapes, plan.task.properties).models
    device = Accelerator(plan, golden, _Reference(chosen, spec, golden), Certificates(scratch))
    device.wait_decided(300)
    found: list[tuple[str, float, float, float, float]] = []
    for shape in plan.shapes:
        batch = golden(shape)
        request = models[shape].create_infer_request()
        for key, array in batch.inputs.items():
            request.set_tensor(key, ov.Tensor(array, shared_memory=True))
        here: list[float] = []
        there: list[float] = []
        outside: list[float] = []
        for number in range(rounds + 3):
            start = time.perf_counter()
            request.infer()
            here.append(time.perf_counter() - start)
            start = time.perf_counter()
            output = device.submit(batch).result()
            there.append(time.perf_counter() - start)
            outside.append(there[-1] - output.seconds)
            if number < 3:  # warm
                for times in (here, there, outside):
                    times.clear()
        differences = [1e6 * (b - a) for a, b in zip(here, there, strict=True)]
        found.append(
            (
                str(shape),
                1e6 * statistics.median(here),
                1e6 * statistics.median(there),
                statistics.median(differences),
                1e6 * statistics.median(outside),
            )
        )
    device.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of corpus.jsonl")
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limits", default="256,512", help="tokens of a text; the model's own limit is 256")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "rows.md")
    arguments = parser.parse_args()
    settings = Settings(device="npu-sim", compile_cache_mb=0, cache_mb=0, bulk_timeout=3600)
    lines = ["# Rows on npu-sim", "", (__doc__ or "").strip(), ""]
    lines += [
        "| limit | rows of | rows | positions per useful token | seconds | padded / packed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for limit in map(int, arguments.limits.split(",")):
            padded = [BatchShape(bins=1, positions=length, segments=1) for length in BUCKETS if length <= limit]
            engines = {
                "packed, bins": engine_of(settings, None, limit, Path(scratch)),
                f"padded buckets {', '.join(str(shape.positions) for shape in padded)}": engine_of(
                    settings, padded, limit, Path(scratch)
                ),
            }
            texts = corpus(arguments.data, arguments.tokens, RequestTokenizer(next(iter(engines.values())).spec))
            seconds: dict[str, list[float]] = {way: [] for way in engines}
            counts: dict[str, tuple[int, float]] = {}
            vectors: dict[str, np.ndarray] = {}
            useful = 0
            for _ in range(arguments.rounds):
                for way, engine in engines.items():
                    before = counts_of(engine)
                    start = time.perf_counter()
                    results = list(engine.results(texts))
                    seconds[way].append(time.perf_counter() - start)
                    useful = sum(sum(result.tokens) for result in results)
                    rows, positions = counts_of(engine)
                    counts[way] = (rows - before[0], (positions - before[1]) / useful)
                    vectors[way] = np.concatenate([result.raise_first().embeddings for result in results])
            packed, unpacked = vectors.values()
            ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
            for way, engine in engines.items():
                ratio = (
                    f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if way.startswith("packed") else ""
                )
                rows, waste = counts[way]
                lines.append(f"| {limit} | {way} | {rows} | {waste:.3f} | {statistics.median(seconds[way]):.1f} | {ratio} |")
                print(lines[-1], flush=True)
                engine.stop(0)
            lines.append(f"| | {len(texts)} texts, {useful} tokens, least cosine {(packed * unpacked).sum(1).min():.7f} | | | | |")
        print(lines[-1], flush=True)
        lines += ["", "| row | in this process, us | through the worker, us | difference, us | of it outside the worker, us |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for model, rows in ((str(GOLDEN), 400), (settings.model[0], 40)):
            for shape, here, there, difference, outside in overhead(replace(settings, model=model), Path(scratch), rows):
                name = Path(model).name
                lines.append(f"| {name} {shape} | {here:.0f} | {there:.0f} | {difference:.0f} | {outside:.0f} |")
                print(lines[-1], flush=True)
    arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
