"""The service's promises, measured on this machine: cache, overhead of HTTP, load beyond what the machine can do.

    python bench/service.py cache       # hits in the engine and over HTTP, and what a cold cache costs
    python bench/service.py overhead    # HTTP to the model and back without the model, beside Infinity's
    python bench/service.py load        # 2,000 connections, then three times the sustainable rate for a minute

Each writes its table into bench/results/service-NAME.md. Ratios are within one run; absolute figures vary with the machine.
"""

import argparse
import asyncio
import gc
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from http_client import Connection, prepared, rate
from npu_proxy import EmbedRequest, Engine, Settings
from peers import ROOT, python_of

RESULTS = ROOT / "bench" / "results"
GOLDEN = ROOT / "tests" / "golden" / "mean"
QUERY = "how do I change the pin of my card"
EMPTY = """
import sys, msgspec, uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from npu_proxy.server.apis.openai import Embedding, Embeddings, EmbeddingsBody, Usage
decoder, vector = msgspec.json.Decoder(EmbeddingsBody), "A" * 2048
async def bare(request: Request) -> Response:
    await request.body()
    return Response(b"x" * 2200, media_type="application/json")
async def typed(request: Request) -> Response:
    body = decoder.decode(await request.body())
    reply = Embeddings(data=[Embedding(index=0, embedding=vector)], model=body.model, usage=Usage(prompt_tokens=9, total_tokens=9))
    return Response(msgspec.json.encode(reply), media_type="application/json")
app = Starlette(routes=[Route("/bare", bare, methods=["POST"]), Route("/typed", typed, methods=["POST"])])
uvicorn.run(app, port=int(sys.argv[1]), access_log=False, log_level="warning", server_header=False)
"""


class Process:
    """A server of ours on a free port, or the empty one."""

    def __init__(self, *flags: str, empty: bool = False) -> None:
        if empty:
            self.port = 18977
            self.process = subprocess.Popen([sys.executable, "-c", EMPTY, str(self.port)])
            time.sleep(3)
            return
        command = [sys.executable, "-m", "npu_proxy", "serve", "--port", "0", *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "NPU_PROXY_PROFILE": "off"})
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"ready: http://[^:]+:(\d+)", line):
                self.port = int(found[1])
                break
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def resident(self) -> float:
        """Its resident set in megabytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+)", status)
        assert found is not None
        return int(found[1]) / 1000

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def corpus(seed: int = 1) -> list[str]:
    """Real texts of the corpus, or of the golden model where the data is not there, in a fixed random order."""
    file = Path(os.environ.get("TEST_DATA", ROOT.parent / "shared" / "data")) / "corpus.jsonl"
    rows = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").split("\n") if line]
    random.Random(seed).shuffle(rows)
    return rows


def table(name: str, head: list[str], rows: list[list[str]], notes: str = "") -> None:
    """Print it, and keep it."""
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
    text = "\n".join(lines) + f"\n\n{notes}\n"
    (RESULTS / f"service-{name}.md").write_text(text)
    print(text)


def body(text: str | list[str], **more: Any) -> bytes:
    """The body of an OpenAI request."""
    return json.dumps({"input": text, "model": "all-minilm", **more}).encode()


# -- cache -----------------------------------------------------------------------------------------------------------


def engine_hits(seconds: float = 2.0) -> dict[int, float]:
    """Texts per second from the memory cache, by texts per request."""
    texts = corpus()[:2048]
    found = {}
    with Engine() as engine:
        engine.embed(texts)
        for size in (1, 64, 2048):
            requests = [EmbedRequest(texts=texts[start : start + size]) for start in range(0, len(texts), size)]
            count, begun = 0, time.perf_counter()
            while time.perf_counter() - begun < seconds:
                for request in requests:
                    assert engine.submit(request).result().cached == len(request.texts)
                    count += size
            found[size] = count / (time.perf_counter() - begun)
    return found


def cold_cost(rounds: int, tokens: int) -> dict[str, float]:
    """Throughput for texts never seen before, relative to that without a cache; medians of ratios within rounds."""
    texts = iter(corpus(2))
    kinds: dict[str, dict[str, Any]] = {"none": {"cache_mb": 0}, "memory": {}, "memory and disk": {"cache_disk_mb": 1000}}
    ratios: dict[str, list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        engines = {
            kind: Engine(settings=Settings(profile=False, cache_folder=Path(folder), **more)).start()
            for kind, more in kinds.items()
        }
        for number in range(rounds + 1):
            batch, characters = [], 0
            while characters < 4 * tokens:
                batch.append(next(texts)[:1200])
                characters += len(batch[-1])
            seconds = {}
            for kind in random.Random(number).sample(list(kinds), len(kinds)):
                begun = time.perf_counter()
                for _ in engines[kind].results([f"{text} {number}" for text in batch]):
                    pass
                seconds[kind] = time.perf_counter() - begun
            if number:  # the first round warms up
                for kind in kinds:
                    ratios[kind].append(seconds["none"] / seconds[kind])
        for engine in engines.values():
            engine.stop()
    return {kind: statistics.median(found) for kind, found in ratios.items()}


def bench_cache(rounds: int) -> None:
    hits = engine_hits()
    server, empty = Process(), Process(empty=True)

    async def over_http() -> dict[str, list[float]]:
        found: dict[str, list[float]] = {"bare": [], "typed": [], "hit": []}
        hit = prepared("/v1/embeddings", body(QUERY, encoding_format="base64"))
        for _ in range(rounds):
            for kind, port, request in (
                ("bare", empty.port, prepared("/bare", body(QUERY))),
                ("typed", empty.port, prepared("/typed", body(QUERY))),
                ("hit", server.port, hit),
            ):
                found[kind].append(await rate(port, request, connections=16, seconds=2.0))
        return found

    try:
        http = uvloop.run(over_http())
    finally:
        server.close()
        empty.close()
    cold = cold_cost(rounds, 12_000)
    rows = [[f"hits in the engine, {size} texts per request", f"{speed:,.0f} texts/s", "20,000"] for size, speed in hits.items()]
    rows.append(["one text per request over HTTP, a hit", f"{statistics.median(http['hit']):,.0f} requests/s", ""])
    for kind, words in (("typed", "decodes the body, encodes a reply"), ("bare", "reads the body, sends constant bytes")):
        ratio = statistics.median(empty_rate / hit_rate for empty_rate, hit_rate in zip(http[kind], http["hit"], strict=True))
        rows.append(
            [f"empty Starlette handler that {words}", f"{statistics.median(http[kind]):,.0f} requests/s, {ratio:.2f}x", "1.2x"]
        )
    rows += [
        [f"throughput of new texts, cache in {kind}", f"{share:.3f} of none", "0.97"]
        for kind, share in cold.items()
        if kind != "none"
    ]
    table("cache", ["what", "found", "aim"], rows)


# -- overhead --------------------------------------------------------------------------------------------------------


def bench_overhead(rounds: int) -> None:
    """A model of one tiny layer, so that nearly all of a request is the server; what the model itself takes is subtracted."""
    python, why = python_of("infinity")
    ours = Process("--model", str(GOLDEN), "--device", "cpu", "--cache-mb", "0")
    ports = {"npu-proxy": (ours.port, "/v1/embeddings")}
    theirs = None
    copy = Path(tempfile.mkdtemp()) / "mean"
    shutil.copytree(GOLDEN, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))  # which Infinity reads
    if python is not None:
        command = [
            str(Path(python).parent / "infinity_emb"),
            "v2",
            "--model-id",
            str(copy),
            "--engine",
            "torch",
            "--device",
            "cpu",
        ]
        command += ["--no-bettertransformer", "--served-model-name", "mean", "--port", "18978", "--no-model-warmup"]
        theirs = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        ports["infinity"] = (18978, "/embeddings")
    else:
        print(f"infinity is left out: {why}")
    found: dict[str, list[float]] = {name: [] for name in ports}
    try:
        for name, (port, path) in ports.items():
            _until_answers(port, path, name)
        numbers = iter(range(1_000_000))

        async def request_seconds(port: int, path: str, count: int) -> list[float]:
            seconds: list[float] = []

            def answered(status: int, took: float) -> bool:
                assert status == 200, status
                seconds.append(took)
                return len(seconds) < count

            def request() -> bytes:
                return prepared(path, json.dumps({"input": f"the cat sleeps {next(numbers)}", "model": "mean"}).encode())

            _, made = await asyncio.get_running_loop().create_connection(lambda: Connection(request, answered), "127.0.0.1", port)
            await made.lost
            return seconds

        for number in range(rounds + 1):
            for name, (port, path) in ports.items():
                taken = uvloop.run(request_seconds(port, path, 300))
                if number:
                    found[name] += taken
        model = {"npu-proxy": _own_model(), "infinity": _their_model(python) if python else 0.0}
    finally:
        ours.close()
        if theirs is not None:
            theirs.terminate()
            theirs.wait(30)
    rows = []
    for name, seconds in found.items():
        p50, p99 = (1000 * float(np.percentile(seconds, share)) for share in (50, 99))
        rows.append([name, f"{p50:.2f} ms", f"{p99:.2f} ms", f"{1000 * model[name]:.2f} ms", f"{p50 - 1000 * model[name]:.2f} ms"])
    notes = (
        "A single short text, one connection, no load; the model is a tiny one. Model: the median of running it alone in a process."
    )
    table("overhead", ["server", "p50 over HTTP", "p99", "the model alone", "the server's own"], rows, notes)


def _until_answers(port: int, path: str, name: str) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            content = json.dumps({"input": "x", "model": "mean"}).encode()
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", content, {"content-type": "application/json"})
            urllib.request.urlopen(request, timeout=10).read()
            return
        except OSError:
            if time.monotonic() > end:
                raise RuntimeError(f"{name} did not start") from None
            time.sleep(0.3)


def _own_model() -> float:
    with Engine(str(GOLDEN), "cpu", Settings(cache_mb=0)) as engine:
        rows = [engine.submit(EmbedRequest(texts=[f"the cat sleeps {number}"])).result().timings.infer for number in range(500)]
        return statistics.median(rows)


def _their_model(python: str) -> float:
    code = """
import statistics, sys, time, torch
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
with torch.inference_mode():
    seconds = []
    for number in range(500):
        features = model.tokenize([f"the cat sleeps {number}"])
        begun = time.perf_counter()
        model(features)
        seconds.append(time.perf_counter() - begun)
print(statistics.median(seconds))
"""
    done = subprocess.run([python, "-c", code, str(GOLDEN)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


# -- load ------------------------------------------------------------------------------------------------------------


class Tally:
    """What came back: seconds of accepted and refused requests, and when the accepted ones did."""

    def __init__(self) -> None:
        self.accepted: list[float] = []
        self.refused: list[float] = []
        self.other: dict[int, int] = {}
        self.done_at: list[float] = []
        self.unsent = 0

    def add(self, status: int, seconds: float) -> None:
        if status == 200:
            self.accepted.append(seconds)
            self.done_at.append(time.perf_counter())
        elif status == 503:
            self.refused.append(seconds)
        else:
            self.other[status] = self.other.get(status, 0) + 1


async def saturated(port: int, requests: list[bytes], *, connections: int, seconds: float) -> float:
    """Requests per second with ``connections`` always under way: what the machine can do."""
    end, tally, source = time.perf_counter() + seconds, Tally(), iter(requests)

    def answered(status: int, took: float) -> bool:
        tally.add(status, took)
        return time.perf_counter() < end

    loop = asyncio.get_running_loop()
    made = [
        await loop.create_connection(lambda: Connection(lambda: next(source), answered), "127.0.0.1", port)
        for _ in range(connections)
    ]
    await asyncio.gather(*(connection.lost for _, connection in made))
    last = [at for at in tally.done_at if at > end - 0.75 * seconds]
    return len(last) / (last[-1] - last[0])


async def pressed(
    port: int, requests: list[bytes], *, connections: int, per_second: float, seconds: float
) -> tuple[Tally, Tally, float]:
    """Send ``per_second`` requests for ``seconds`` over a pool of connections that stay open; before that, one on each at once.

    Returns what came of the burst, what came of the rest, and the accepted requests per second of the rest.
    """
    tally, idle, loop = Tally(), [], asyncio.get_running_loop()
    source = iter(requests)
    begun = 0.0

    class Pooled(Connection):
        def send(self) -> None:
            idle.append(self)

        def go(self) -> None:
            Connection.send(self)

    def answered(status: int, took: float) -> bool:
        tally.add(status, took)
        return True

    made = [
        (await loop.create_connection(lambda: Pooled(lambda: next(source), answered), "127.0.0.1", port))[1]
        for _ in range(connections)
    ]
    burst, idle[:] = list(idle), []
    for connection in burst:  # all of them at once
        connection.go()
    while len(idle) < connections:
        await asyncio.sleep(0.05)
    first, tally = tally, Tally()
    begun = time.perf_counter()
    sent = 0
    while (now := time.perf_counter() - begun) < seconds:
        while sent < now * per_second:
            if idle:
                idle.pop().go()
            else:
                tally.unsent += 1
            sent += 1
        await asyncio.sleep(0.002)
    inside = [at for at in tally.done_at if at > begun + 0.25 * seconds]
    sustained = len(inside) / (inside[-1] - inside[0])
    end = time.perf_counter() + 60
    while len(idle) < connections and time.perf_counter() < end:
        await asyncio.sleep(0.05)
    for connection in made:
        connection.transport.close()
    return first, tally, sustained


def bench_load(seconds: float, deadline: float) -> None:
    gc.disable()  # pauses of the client are not the server's
    server = Process("--cache-mb", "0", "--timeout", str(deadline))
    texts = corpus(3)
    requests = [prepared("/v1/embeddings", body(f"{text[:1200]} {number}")) for number, text in enumerate(texts * 12)]

    async def run() -> tuple[float, Tally, Tally, float, float, float]:
        capacity = await saturated(server.port, requests, connections=64, seconds=20)
        before = server.resident()
        burst, tally, sustained = await pressed(server.port, requests, connections=2000, per_second=3 * capacity, seconds=seconds)
        again = await saturated(server.port, requests, connections=64, seconds=20)
        return (capacity + again) / 2, burst, tally, sustained, before, server.resident()

    try:
        capacity, burst, tally, sustained, before, after = uvloop.run(run())
    finally:
        server.close()

    def spread(values: list[float]) -> str:
        if not values:
            return "none"
        p50, p99, most = (1000 * float(np.percentile(values, share)) for share in (50, 99, 100))
        return f"{len(values):,}: p50 {p50:,.1f} ms, p99 {p99:,.1f} ms, longest {most:,.1f} ms"

    late = sum(took > deadline for took in tally.accepted + burst.accepted)
    rows = [
        ["sustainable, 64 under way (mean of before and after)", f"{capacity:.1f} requests/s", ""],
        ["2,000 connections at once, accepted", spread(burst.accepted), f"within {deadline:g} s"],
        ["2,000 connections at once, refused with 503", spread(burst.refused), "50 ms"],
        [f"three times the rate for {seconds:.0f} s, accepted", spread(tally.accepted), f"within {deadline:g} s"],
        [f"three times the rate for {seconds:.0f} s, refused with 503", spread(tally.refused), "50 ms"],
        ["share of refusals within 50 ms", f"{np.mean(np.array(tally.refused) < 0.05):.4f}" if tally.refused else "none", "1"],
        ["accepted but late, other statuses, not sent for want of a connection", f"{late}, {tally.other}, {tally.unsent}", "0"],
        ["throughput meanwhile", f"{sustained:.1f} requests/s, {sustained / capacity:.2f} of the sustainable", "0.9"],
        ["memory before, after", f"{before:.0f} MB, {after:.0f} MB", "flat"],
    ]
    table(
        "load",
        ["what", "found", "aim"],
        rows,
        "One real text of the corpus per request, cache off; client and server share two cores.",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cache", "overhead", "load"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--deadline", type=float, default=10.0)
    arguments = parser.parse_args()
    match arguments.what:
        case "cache":
            bench_cache(arguments.rounds)
        case "overhead":
            bench_overhead(arguments.rounds)
        case _:
            bench_load(arguments.seconds, arguments.deadline)
