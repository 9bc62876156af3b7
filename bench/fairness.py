"""What a short query waits behind many one-text requests, and how clients with different numbers of open requests share the device.

python bench/fairness.py [--before SOURCE]: with the `src` folder of another version, its server is measured too, in turn.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from http_client import Connection, prepared

FLOOD, TOKENS, QUERIES = 256, 180, 12
QUERY = "how do I change the pin of my card"
WORDS = (Path(__file__).parent.parent.parent / "shared/data/corpus.jsonl").read_text().split()
WORDS = [word for word in WORDS if word.isalpha()][:20_000]


def serve(source: Path, **settings: object) -> tuple[subprocess.Popen[bytes], int]:
    """A server of the code in ``source``; ready when this returns."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in {"port": port, "cache_mb": 0, **settings}.items()]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    command = [sys.executable, "-m", "npu_proxy", "serve", *options]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    assert process.stderr is not None
    for line in process.stderr:
        if b"ready" in line:
            return process, port
    raise RuntimeError("the server did not start")


def text(tokens: int) -> str:
    """Random words, about as many tokens."""
    return " ".join(random.choices(WORDS, k=round(tokens / 1.45)))


def post(texts: list[str], agent: str = "bench") -> bytes:
    """The bytes of a request."""
    body = json.dumps({"input": texts}).encode()
    return prepared("/v1/embeddings", body).replace(b"\r\n\r\n", f"\r\nuser-agent: {agent}\r\n\r\n".encode(), 1)


async def ask(port: int, request: bytes) -> tuple[int, float]:
    """Status and seconds of one request."""
    found: list[tuple[int, float]] = []

    def answered(status: int, seconds: float) -> bool:
        found.append((status, seconds))
        return False

    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: Connection(lambda: request, answered), "127.0.0.1", port
    )
    await connection.lost
    return found[0] if found else (0, 0.0)


async def behind_a_flood(port: int) -> tuple[list[float], list[float], int, float]:
    """Seconds of short queries when idle and behind a flood; how many were refused; tokens per second of the flood."""
    query = lambda: post([f"{QUERY} {random.randrange(10**6)}"])  # noqa: E731
    idle = [(await ask(port, query()))[1] for _ in range(20)]
    begun = time.perf_counter()
    flood = asyncio.gather(*(ask(port, post([text(TOKENS)])) for _ in range(FLOOD)))

    async def later(seconds: float) -> tuple[int, float]:
        await asyncio.sleep(seconds)
        return await ask(port, query())

    queries = asyncio.gather(*(later(0.15 + 0.35 * number) for number in range(QUERIES)))
    answered = sum(status == 200 for status, _ in await flood)
    rate = answered * TOKENS / (time.perf_counter() - begun)
    behind = [seconds for status, seconds in await queries if status == 200]
    return idle, behind, QUERIES - len(behind), rate


async def shares(port: int, seconds: float) -> dict[int, int]:
    """Texts that clients with 1, 8 and 64 open requests of 32 texts got done, in the same time."""
    end = time.perf_counter() + seconds
    done: dict[int, int] = dict.fromkeys((1, 8, 64), 0)

    async def client(count: int) -> None:
        while time.perf_counter() < end:
            status, _ = await ask(port, post([text(100) for _ in range(32)], f"client-{count}"))
            done[count] += 32 * (status == 200 and time.perf_counter() < end)

    await asyncio.gather(*(client(count) for count in done for _ in range(count)))
    return done


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    sources = {"now": Path(__file__).parent.parent / "src"} | ({"before": options.before} if options.before else {})
    servers = {name: serve(source, timeout=600) for name, source in sources.items()}
    found: dict[str, list[tuple[list[float], list[float], int, float]]] = {name: [] for name in sources}
    try:
        for turn in range(options.rounds + 1):
            for name, (_, port) in servers.items():
                result = asyncio.run(behind_a_flood(port))
                found[name] += [result] if turn else []  # the first warms up
        for name, results in found.items():
            idle, behind = (np.concatenate([result[number] for result in results]) for number in (0, 1))
            rates = [result[3] for result in results]
            row = 512 * 2 / np.median(rates)
            print(
                f"{name}: idle p50 {np.percentile(idle, 50) * 1e3:.1f} ms, p99 {np.percentile(idle, 99) * 1e3:.1f} ms;"
                f" behind the flood p50 {np.percentile(behind, 50) * 1e3:.0f} ms, p99 {np.percentile(behind, 99) * 1e3:.0f} ms"
                f" ({len(behind)} queries, {sum(result[2] for result in results)} refused); a row takes {row * 1e3:.0f} ms;"
                f" flood {np.median(rates):.0f} tokens/s"
            )
        if "before" in found:
            ratios = [now[3] / before[3] for now, before in zip(found["now"], found["before"], strict=True)]
            print(f"flood, now / before: {np.median(ratios):.3f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})")
        for name, (_, port) in servers.items():
            done = asyncio.run(shares(port, options.seconds))
            mean = sum(done.values()) / len(done)
            print(f"{name}: texts by open requests", {count: f"{texts} ({texts / mean:.2f})" for count, texts in done.items()})
    finally:
        for process, _ in servers.values():
            process.terminate()


if __name__ == "__main__":
    main()
