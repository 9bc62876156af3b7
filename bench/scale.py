"""What a cluster of any size would do, by a discrete-event simulation of ``npu_proxy.ray.cluster``. Writes nothing; prints a table.

    .venv/bin/python bench/scale.py

Units of work go to workers that have room (three each), results come back through one driver, which reads, hashes, assembles and
stores rows. Constants are measured (bench/results/bulk.json and docs/scale.md); everything assumed stands in ``Machines``.
"""

import argparse
import heapq
import json
import random
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "bulk.json"
AHEAD = 3


@dataclass(frozen=True, kw_only=True)
class Machines:
    """texts_per_second: of one worker. unit_texts: texts per unit. driver_seconds: of the driver per text.

    spread: of a unit's time, as a share of its mean. result_bytes: that come back per text. network_bytes: per second into the
    driver. delay: seconds between a result and the next unit.
    """

    workers: int
    texts_per_second: float
    texts: float = 1e9
    unit_texts: int = 1024
    driver_seconds: float = 10e-6
    spread: float = 0.5
    result_bytes: float = 1700
    network_bytes: float = 1.1e9
    delay: float = 0.005


def simulate(machines: Machines, units: int, seed: int = 1) -> dict[str, float]:
    """Run so many units; returns texts per second, and the share of time in which workers, driver and network were busy."""
    numbers = random.Random(seed)
    mean = machines.unit_texts / machines.texts_per_second
    driver_free = network_free = busy = driver_busy = network_busy = 0.0
    sent = done = 0
    queues = [deque[float]() for _ in range(machines.workers)]
    free = [0.0] * machines.workers
    events: list[tuple[float, int]] = []  # a result arrives from a worker

    def service() -> float:
        return mean * max(0.05, numbers.gauss(1, machines.spread))

    def send(worker: int, now: float) -> None:
        nonlocal sent, driver_free, driver_busy, busy
        begun = max(now, driver_free)
        share = 0.5 * machines.driver_seconds * machines.unit_texts  # reading and hashing
        driver_free = begun + share
        driver_busy += share
        seconds = service()
        start = max(free[worker], driver_free + machines.delay)
        free[worker] = start + seconds
        busy += seconds
        queues[worker].append(free[worker])
        heapq.heappush(events, (free[worker], worker))
        sent += 1

    for _ in range(AHEAD):
        for worker in range(machines.workers):
            if sent < units:
                send(worker, 0.0)
    now = 0.0
    while events:
        now, worker = heapq.heappop(events)
        queues[worker].popleft()
        transfer = machines.unit_texts * machines.result_bytes / machines.network_bytes
        network_free = max(now, network_free) + transfer
        network_busy += transfer
        share = 0.5 * machines.driver_seconds * machines.unit_texts  # assembling and storing
        driver_free = max(network_free, driver_free) + share
        driver_busy += share
        done += 1
        if sent < units:
            send(worker, driver_free)
    end = max(now, driver_free)
    return {
        "texts_per_second": done * machines.unit_texts / end,
        "workers": busy / end / machines.workers,
        "driver": driver_busy / end,
        "network": network_busy / end,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rates = json.loads(RESULTS.read_text())["cluster"]["rates"]
    alone, one, two = (sum(found) / len(rates) for found in zip(*rates, strict=True))
    for workers, rate in ((1, alone), (2, two)):
        here = Machines(workers=workers, texts_per_second=alone, unit_texts=500)
        found = sum(simulate(here, 6, seed)["texts_per_second"] for seed in range(50)) / 50
        print(f"{workers} workers: measured {rate:.1f} texts/s, simulated {found:.1f} ({found / rate - 1:+.1%})")
    print("| machines | texts/s | 10^9 texts | workers busy | driver busy | network busy |")
    for name, machines in (
        ("1,000 of two cores", Machines(workers=1000, texts_per_second=one)),
        ("2,000 of two cores", Machines(workers=2000, texts_per_second=one)),
        ("2,000 of two cores, 4 shards", replace(Machines(workers=500, texts_per_second=one), texts=2.5e8)),
        ("100 AI PCs", Machines(workers=100, texts_per_second=10 * one)),
    ):
        got = simulate(machines, 40 * machines.workers)
        shards = 4 if "shards" in name else 1
        rate = got["texts_per_second"] * shards
        shares = " | ".join(f"{got[part]:.0%}" for part in ("workers", "driver", "network"))
        print(f"| {name} | {rate:,.0f} | {1e9 / rate / 3600:.1f} h | {shares} |")


if __name__ == "__main__":
    main()
