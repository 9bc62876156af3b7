"""Every fault of tests/faults under a thousand concurrent requests, with the real model: one line per fault.

Each request is one text; a right result has cosine >= 0.99999 to the CPU's. `back` is from the fault's end until the
device serves again (compiling and certifying included), while the CPU is busy with the requests.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "faults"))

from cases import CASES  # noqa: E402
from load import Figures, Load, expected_vectors, faulty_engine, texts  # noqa: E402

from npu_proxy import Settings  # noqa: E402

HEAD = ("fault", "requests", "right", "wrong", "lost", "twice", "errors", "npu-sim", "cpu", "least cosine", "slowest", "back")


def cells(name: str, found: Figures) -> list[str]:
    return [
        name,
        str(found.requests),
        str(found.right),
        str(found.wrong),
        str(found.lost),
        str(found.twice),
        str(found.errors.total()),
        str(found.devices["npu-sim"]),
        str(found.devices["cpu"]),
        f"{found.least_cosine:.7f}",
        f"{found.slowest:.1f} s",
        f"{found.back:.1f} s",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=Settings().model[0])
    parser.add_argument("--concurrent", type=int, default=1000)
    parser.add_argument("--cases", default="", help="only faults whose name holds this")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "faults.md")
    arguments = parser.parse_args()
    store = Settings().store
    expected = expected_vectors(arguments.model, store, texts(2000))
    rows: dict[str, Figures] = {}
    lines = [f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}"]
    for name, case in CASES.items():
        if arguments.cases not in name:
            continue
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as cache:
            engine = faulty_engine(
                model=arguments.model,
                compile_cache=Path(cache),
                cache_mb=0,
                row_timeout=5.0,
                compile_timeout=60.0,
                breaker_longest=1.0,
                probe_interval=0.0,
            )
            load = Load(engine, expected, concurrent=arguments.concurrent, timeout=60.0)
            load.wait_for(200)
            case(engine, load)
            load.wait_back(180)
            load.wait_for(300)
            found = rows[name] = load.finish()
            engine.stop(0)
        lines.append(f"| {' | '.join(cells(name, found))} |")
        print(lines[-1], f"({time.monotonic() - begun:.0f} s)", flush=True)
    page = f"# Faults\n\n{(__doc__ or '').strip()}\n\nModel {arguments.model}, {arguments.concurrent} requests under way.\n\n"
    arguments.output.write_text(page + "\n".join(lines) + "\n")
    arguments.output.with_suffix(".json").write_text(
        json.dumps({name: vars(figures) for name, figures in rows.items()}, indent=1) + "\n"
    )
    bad = [
        name
        for name, figures in rows.items()
        if figures.wrong or figures.lost or figures.twice or figures.errors or figures.back == float("inf")
    ]
    print(f"failed: {', '.join(bad)}" if bad else "every request was answered once, rightly and in time, and the device came back")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
