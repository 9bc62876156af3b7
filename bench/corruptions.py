"""Corruptions of vectors, injected while 200 requests are under way: what of them is computed, and what reaches a caller.

Every output of the device is compared with the CPU's vectors (cosine >= 0.99999), before canaries and echoes are looked at, and
every answer of the engine as well. `found` is from the first wrong batch until the device was taken out of service. Each corruption
runs with canaries, and without (then only examinations in turn, here every second, can find it, and `verify_every`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Self

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "faults"))

from load import SAME, Load, accelerator, expected_vectors, faulty_engine, texts  # noqa: E402

from npu_proxy import Engine, Settings  # noqa: E402
from npu_proxy.batch import Batch, Output, output_for  # noqa: E402
from npu_proxy.devices.worker.faults import Fault  # noqa: E402
from npu_proxy.devices.worker.slot import WorkerSlot  # noqa: E402

FAULTS = {
    "a slot with the weights of two layers exchanged": Fault.SLOT_WEIGHTS,
    "one bit flipped in one weight of a slot": Fault.SLOT_BIT,
    "a layer's weights too large by 10,000": Fault.SLOT_OVERFLOW,
    "a slot does not write its output": Fault.SLOT_STALE,
    "a slot wrong in one of ten batches": Fault.SLOT_SOMETIMES,
    "outputs of two slots exchanged": Fault.SWAPPED,
    "outputs of one bin shifted": Fault.SHIFTED,
    "as the first, and every text fills its bin": Fault.SLOT_WEIGHTS,
}
HEAD = ("corruption", "canaries", "batches", "wrong batches", "wrong texts", "reached a caller", "found", "least cosine", "back")
COUNTS = ("batches", "wrong_batches", "wrong_texts", "reached")
SECONDS = 40.0
"""How long a corruption has to be found."""


class Watch:
    """Compares every output of the workers with the truth, before anything else looks at it."""

    def __init__(self, engine: Engine, expected: dict[str, np.ndarray]) -> None:
        encodings = engine.tokenizer.plain(list(expected))
        self._known = dict(zip((encoding.key for encoding in encodings), expected.values(), strict=True))
        self._lock = threading.Lock()
        self.batches = self.wrong_batches = self.wrong_texts = 0
        self.first = 0.0
        self._wait = WorkerSlot.wait

    def __enter__(self) -> Self:
        watch, original = self, self._wait

        def wait(self: WorkerSlot, batch: Batch, seconds: float) -> Output | None:
            output = original(self, batch, seconds)
            if output is not None:
                watch.look(batch, output)
            return output

        WorkerSlot.wait = wait
        return self

    def __exit__(self, *_: object) -> None:
        WorkerSlot.wait = self._wait

    def look(self, batch: Batch, output: Output) -> None:
        wrong = 0
        for index, encoding in enumerate(batch.encodings):
            if encoding.key in self._known:
                vector = output_for(batch, index, output.vectors)[0].astype(np.float64)
                cosine = vector @ self._known[encoding.key] / np.linalg.norm(vector)
                wrong += not cosine >= SAME
        with self._lock:
            self.batches += 1
            self.wrong_batches += wrong > 0
            self.wrong_texts += wrong
            if wrong and not self.first:
                self.first = time.monotonic()


def measure(fault: Fault, *, canaries: bool, model: str, expected: dict[str, np.ndarray]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        engine = faulty_engine(
            model=model,
            compile_cache=Path(cache),
            cache_mb=0,
            breaker_longest=1.0,
            probe_interval=1.0,
            canaries=canaries,
            verify_every=128,
        )
        with Watch(engine, expected) as watch:
            load = Load(engine, expected, concurrent=200, timeout=60.0)
            load.wait_for(200)
            accelerator(engine).inject(fault)
            end, found = time.monotonic() + SECONDS, 0.0
            while time.monotonic() < end and not found:
                if not accelerator(engine).ready:
                    found = time.monotonic()
                time.sleep(0.002)
            seconds = found - watch.first if found and watch.first else float("inf")
            if not found:
                accelerator(engine).inject(Fault.NONE)
            back = load.wait_back(60)
            load.wait_for(200)
            figures = load.finish()
        engine.stop(0)
    return {
        "canaries": canaries,
        "batches": watch.batches,
        "wrong_batches": watch.wrong_batches,
        "wrong_texts": watch.wrong_texts,
        "reached": figures.wrong,
        "found": seconds,
        "least_cosine": figures.least_cosine,
        "back": back,
        "lost": figures.lost + figures.twice + figures.errors.total(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=Settings().model[0])
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "corruptions.md")
    arguments = parser.parse_args()
    store = Settings().store
    short = expected_vectors(arguments.model, store, texts(2000))
    long = expected_vectors(arguments.model, store, [f"{number} " + " ".join(texts(100)[number:]) for number in range(50)])
    lines = [f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}"]
    rows: list[dict[str, Any]] = []
    for name, fault in FAULTS.items():
        for canaries in (True, False):
            expected = long if "fills" in name else short
            found = measure(fault, canaries=canaries, model=arguments.model, expected=expected)
            rows.append({"corruption": name, **found})
            cells = [name, "yes" if canaries else "no", *(str(found[key]) for key in COUNTS)]
            cells.append("not found" if found["found"] == float("inf") else f"{max(0.0, found['found']):.2f} s")
            cells += [f"{found['least_cosine']:.6f}", f"{found['back']:.1f} s"]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    arguments.output.write_text(
        f"# Corruptions\n\n{(__doc__ or '').strip()}\n\nModel {arguments.model}.\n\n" + "\n".join(lines) + "\n"
    )
    arguments.output.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    guarded = [row for row in rows if row["canaries"] and "fills" not in row["corruption"]]
    bad = [row["corruption"] for row in guarded if row["reached"] or row["lost"]]
    print(f"reached a caller in spite of canaries: {', '.join(bad)}" if bad else "with canaries, nothing wrong reached a caller")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
