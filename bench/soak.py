"""Load with a random fault every few seconds, corruptions among them: nothing may be lost or wrong, and memory must stay flat.

Memory is the resident set of this process and of its worker, the median of each minute; the last minute is compared
with the third.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "faults"))

from load import Load, accelerator, expected_vectors, faulty_engine, texts  # noqa: E402

from npu_proxy import Engine, Settings  # noqa: E402
from npu_proxy.devices.worker.faults import Fault  # noqa: E402

CORRUPTIONS = (
    Fault.SLOT_WEIGHTS,
    Fault.SLOT_BIT,
    Fault.SLOT_OVERFLOW,
    Fault.SLOT_STALE,
    Fault.SLOT_SOMETIMES,
    Fault.SWAPPED,
    Fault.SHIFTED,
)
INJECTED = (Fault.ERROR, Fault.LOST, Fault.NAN, Fault.CRASH, Fault.HANG, Fault.SLOW, *CORRUPTIONS)
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)


def strike(engine: Engine) -> str:
    """Cause one random fault; returns what it was."""
    device = accelerator(engine)
    pid = device.reports()[0].worker_pid
    fault = random.choice([*INJECTED, *SIGNALS])
    if pid is None or not device.ready:
        return "device was down"
    if isinstance(fault, signal.Signals):
        os.kill(pid, fault)
    else:
        device.inject(fault)
    return fault.name


def memory(engine: Engine) -> tuple[float, float]:
    """Megabytes of this process and of its worker, 0 where there is none."""
    own = psutil.Process().memory_info().rss / 1e6
    pid = accelerator(engine).reports()[0].worker_pid
    try:
        return own, psutil.Process(pid).memory_info().rss / 1e6 if pid and accelerator(engine).ready else 0.0
    except psutil.NoSuchProcess:
        return own, 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=Settings().model[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between faults")
    parser.add_argument("--concurrent", type=int, default=100)
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "soak.json")
    arguments = parser.parse_args()
    expected = expected_vectors(arguments.model, Settings().store, texts(2000))
    with tempfile.TemporaryDirectory() as cache:
        engine = faulty_engine(
            model=arguments.model,
            compile_cache=Path(cache),
            cache_mb=0,
            row_timeout=3.0,
            heartbeat_timeout=2.0,
            breaker_longest=0.5,
            probe_interval=10.0,
        )
        load = Load(engine, expected, concurrent=arguments.concurrent, timeout=30.0)
        start, pause, faults = time.monotonic(), threading.Event(), Counter()
        own: dict[int, list[float]] = {}
        worker: dict[int, list[float]] = {}
        next_fault = arguments.every
        while (now := time.monotonic() - start) < arguments.minutes * 60:
            if now >= next_fault:
                next_fault += arguments.every
                faults[strike(engine)] += 1
            own_mb, worker_mb = memory(engine)
            own.setdefault(int(now // 60), []).append(own_mb)
            if worker_mb:
                worker.setdefault(int(now // 60), []).append(worker_mb)
            if int(now) % 60 == 0 and len(own[int(now // 60)]) == 1:
                print(
                    f"{now:5.0f} s  {load.answered()} results, {own_mb:.0f} MB, worker {worker_mb:.0f} MB, {dict(faults)}",
                    flush=True,
                )
            pause.wait(0.5)
        load.wait_back(60)
        found = load.finish()
        restarts, canary_failures = (getattr(engine.device.reports()[0], name) for name in ("restarts", "canary_failures"))
        engine.stop(0)
    minutes = [statistics.median(values) for values in own.values()]
    workers = [statistics.median(worker.get(minute, [0.0])) for minute in own]
    third, last = minutes[min(2, len(minutes) - 1)], minutes[-1]
    result = {
        "model": arguments.model,
        "minutes": arguments.minutes,
        "faults": dict(faults),
        "restarts": restarts,
        "canary_failures": canary_failures,
        "requests": found.requests,
        "right": found.right,
        "wrong": found.wrong,
        "twice": found.twice,
        "lost": found.lost,
        "errors": dict(found.errors),
        "devices": dict(found.devices),
        "least_cosine": found.least_cosine,
        "slowest_seconds": found.slowest,
        "owner_mb_by_minute": [round(value, 1) for value in minutes],
        "worker_mb_by_minute": [round(value, 1) for value in workers],
        "last_over_third": last / third,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    good = not (found.wrong or found.twice or found.lost or found.errors) and last / third <= 1.05
    print("nothing was lost, memory is flat" if good else "FAILED: see above")
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
