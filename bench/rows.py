"""One model on npu-sim, packed against padded: rows, waste and time over texts of the corpus, in one run.

npu-sim obeys an NPU's rules (static shapes, a worker process, shared memory) on the processor, so the seconds are this
machine's; what carries over to an NPU are rows and waste. Padded: one text a row, batch 1, in the shortest bucket that
holds it, as an NPU is used without packing. Both run the same texts in every round, one after the other.

A second table says what the worker process costs a row: the same graph, asked in this process and through the worker, in
turns. With the real model npu-sim computes on the very cores whose caches hold our code and data, and each row finds them
cold; the golden model (two layers of 32) leaves them warm, as a device of its own does.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino as ov

from npu_proxy import Engine, Settings
from npu_proxy.devices.accelerator import Accelerator
from npu_proxy.devices.certify import Certificates
from npu_proxy.devices.chain import _plan, _Reference
from npu_proxy.devices.fallback import Fallback
from npu_proxy.devices.kinds import TARGETS
from npu_proxy.devices.openvino import compile_static, open_core
from npu_proxy.devices.profile import settled
from npu_proxy.engine.golden import GoldenRows
from npu_proxy.engine.parts import Parts
from npu_proxy.engine.tokenize import TextEncoder
from npu_proxy.graph.packed import RowShape
from npu_proxy.models.layout import read_spec
from npu_proxy.models.store import Store
from npu_proxy.types import Output, Pack

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "mean"
BUCKETS = (32, 64, 128, 256, 512)


class Counted(Fallback):
    """The device, counting what goes through it."""

    rows = positions = 0
    _count = threading.Lock()

    def infer(self, pack: Pack, late: float = math.inf) -> Output:
        with self._count:
            self.rows += 1
            self.positions += pack.shape.bins * pack.shape.positions
        return super().infer(pack, late)


def engine_of(settings: Settings, shapes: Sequence[RowShape] | None, limit: int, scratch: Path) -> Engine:
    """An engine on npu-sim alone; shapes: in place of its own. limit: tokens of a text."""

    def parts(settings: Settings, _stopping: threading.Event) -> Parts:
        name, folder = Store(settings.store).resolve(settings.model[0])
        spec = replace(read_spec(folder, name=name), max_length=limit)
        chosen = settled(replace(settings, profile="off"), spec)
        encoder = TextEncoder(spec)
        golden = GoldenRows(encoder, spec)
        plan = _plan(chosen, spec, "npu-sim")
        plan = replace(plan, shapes=shapes or plan.shapes)
        device = Accelerator(plan, golden, _Reference(chosen, spec, golden), Certificates(scratch))
        device.settle(300)
        return Parts(spec=spec, encoder=encoder, device=Counted([device], probe_every=0))

    return Engine(settings=settings, parts=parts).start()


def corpus(data: Path, tokens: int, encoder: TextEncoder) -> list[str]:
    """Texts of the corpus, chosen at random, until they hold so many tokens."""
    texts = [json.loads(line)["text"] for line in (data / "corpus.jsonl").read_text(encoding="utf-8").split("\n") if line]
    chosen, held = [], 0
    for index in np.random.default_rng(0).permutation(len(texts)):
        if held >= tokens:
            break
        chosen.append(texts[index])
        held += encoder.encode([texts[index]], "", "end")[0].tokens
    return chosen


def overhead(settings: Settings, scratch: Path, rounds: int) -> list[tuple[str, float, float, float, float]]:
    """For each row shape: microseconds in this process, through the worker, their difference, and of it outside the worker."""
    name, folder = Store(settings.store).resolve(settings.model[0])
    spec = read_spec(folder, name=name)
    chosen = settled(replace(settings, profile="off"), spec)
    golden = GoldenRows(TextEncoder(spec), spec)
    plan = _plan(chosen, spec, "npu-sim")
    target = TARGETS["npu-sim"]
    core = open_core(target)
    models = compile_static(core, target, spec, plan.shapes, plan.task.properties)
    device = Accelerator(plan, golden, _Reference(chosen, spec, golden), Certificates(scratch))
    device.settle(300)
    found = []
    for shape in plan.shapes:
        row = golden(shape)
        request = models[shape].create_infer_request()
        for key, array in row.inputs.items():
            request.set_tensor(key, ov.Tensor(array, shared_memory=True))
        here, there, outside = [], [], []
        for number in range(rounds + 3):
            start = time.perf_counter()
            request.infer()
            here.append(time.perf_counter() - start)
            start = time.perf_counter()
            output = device.infer(row)
            there.append(time.perf_counter() - start)
            outside.append(there[-1] - output.seconds)
            if number < 3:  # warm
                here.clear(), there.clear(), outside.clear()
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
        "| limit | rows of | rows | positions a useful token | seconds | padded / packed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for limit in map(int, arguments.limits.split(",")):
            padded = [RowShape(bins=1, positions=length, segments=1) for length in BUCKETS if length <= limit]
            engines = {
                "packed, bins": engine_of(settings, None, limit, Path(scratch)),
                f"padded buckets {', '.join(str(shape.positions) for shape in padded)}": engine_of(
                    settings, padded, limit, Path(scratch)
                ),
            }
            texts = corpus(arguments.data, arguments.tokens, TextEncoder(next(iter(engines.values())).spec))
            seconds: dict[str, list[float]] = {way: [] for way in engines}
            counts = {}
            vectors = {}
            for _ in range(arguments.rounds):
                for way, engine in engines.items():
                    before = engine.device.rows, engine.device.positions
                    start = time.perf_counter()
                    results = list(engine.results(texts))
                    seconds[way].append(time.perf_counter() - start)
                    useful = sum(sum(result.tokens) for result in results)
                    counts[way] = (engine.device.rows - before[0], (engine.device.positions - before[1]) / useful)
                    vectors[way] = np.concatenate([result.raise_first().embeddings for result in results])
            one, other = vectors.values()
            ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
            for way, engine in engines.items():
                ratio = (
                    f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if way.startswith("packed") else ""
                )
                rows, waste = counts[way]
                lines.append(f"| {limit} | {way} | {rows} | {waste:.3f} | {statistics.median(seconds[way]):.1f} | {ratio} |")
                print(lines[-1], flush=True)
                engine.stop(0)
            lines.append(f"| | {len(texts)} texts, {useful} tokens, least cosine {(one * other).sum(1).min():.7f} | | | | |")
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
