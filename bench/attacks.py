"""The most that one request may cost: each route gets its worst bodies, beside a client that asks short questions.

python bench/attacks.py [--before SOURCE] [--only NAME]: for each body its status, its seconds, the longest standstill of the event
loop (of a client's view of /health/live for versions without that metric), the memory at its peak and what is kept of it.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parent))
from fairness import WORDS, serve

HERE = Path(__file__).parent
MB = 1_000_000
LIMIT = 19 * MB


def words(size: int) -> str:
    """So many bytes of English words."""
    text = " ".join(WORDS)
    return (text * (size // len(text) + 1))[:size]


def bodies() -> Iterator[tuple[str, str, str, bytes]]:
    """Name, server, path and body."""
    tiny = ["a", "b"] * 1024
    yield "query of 19 MB, 2,048 documents", "ranker", "/rerank", json.dumps({"query": words(LIMIT), "texts": tiny}).encode()
    yield "query of 2 MB, 2,048 documents", "ranker", "/v1/rerank", json.dumps({"query": words(2 * MB), "documents": tiny}).encode()
    yield "2,048 pairs of one query of 9 MB", "ranker", "/score", json.dumps({"text_1": words(9 * MB), "text_2": tiny}).encode()
    yield "2,048 texts to classify", "labels", "/predict", json.dumps({"inputs": [[words(9000)]] * 2048}).encode()
    yield "token vectors of 331 KB", "tokens", "/embed_all", json.dumps({"inputs": [words(1000)] * 331}).encode()
    yield (
        "token vectors of 1 MB",
        "tokens",
        "/embed_all",
        json.dumps({"inputs": [words(1000) + str(n) for n in range(1000)]}).encode(),
    )
    yield (
        "late interaction, 2,048 documents",
        "tokens",
        "/rerank",
        json.dumps({"query": "a", "texts": [words(2000)] * 2048}).encode(),
    )
    yield "5 million lists", "dense", "/v1/embeddings", b'{"input":[' + b"[1]," * (LIMIT // 4) + b"[1]]}"
    yield "4 million ids", "dense", "/v1/embeddings", b'{"input":[' + b"1000," * (LIMIT // 5) + b"1]}"
    yield "a million ids", "dense", "/embed", b'{"inputs":[' + b"[" + b"1000," * 999_999 + b"1]]}"
    yield "9 million empty texts", "dense", "/v1/embeddings", b'{"input":[' + b'"",' * (LIMIT // 3) + b'""]}'
    yield "a million empty texts", "dense", "/v1/embeddings", b'{"input":[' + b'"",' * 999_999 + b'""]}'
    yield "text of 19 MB", "dense", "/v1/embeddings", json.dumps({"input": words(LIMIT)}).encode()
    yield "text of 19 MB of Chinese", "dense", "/v1/embeddings", ('{"input":"' + "東" * (LIMIT // 3) + '"}').encode()
    yield "text of 19 MB of escapes", "dense", "/v1/embeddings", b'{"input":"' + rb"\u6771" * (LIMIT // 6) + b'"}'
    yield "text of 19 MB of spaces", "dense", "/v1/embeddings", b'{"input":"' + b" " * LIMIT + b'"}'
    yield "one word of 19 MB", "dense", "/v1/embeddings", b'{"input":"' + b"a" * LIMIT + b'"}'
    yield "19 MB before the body", "dense", "/v1/embeddings", b" " * LIMIT + b'{"input":"a"}'
    yield "field of 19 MB that nobody reads", "dense", "/v1/embeddings", b'{"x":"' + b"a" * LIMIT + b'","input":"a"}'
    yield "10 MB of brackets", "dense", "/v1/embeddings", b"[" * (LIMIT // 2)
    yield "2,048 texts of 9 KB", "dense", "/v1/embeddings", json.dumps({"input": [words(9000)[n:] for n in range(2048)]}).encode()
    yield "2,048 short texts", "dense", "/embed", json.dumps({"inputs": [f"text {n}" for n in range(2048)]}).encode()
    chunk = {"input": words(3_400_000), "truncate": "chunk"}
    yield "text of 3.4 MB in chunks", "dense", "/v1/embeddings", json.dumps(chunk).encode()
    chunk = {"input": words(990_000), "truncate": "chunk", "chunks": True}
    yield "text of 1 MB in chunks", "dense", "/v1/embeddings", json.dumps(chunk).encode()
    yield (
        "a similarity of 2,048 texts",
        "dense",
        "/similarity",
        json.dumps({"inputs": {"source_sentence": words(LIMIT // 2), "sentences": tiny}}).encode(),
    )
    yield "tokens of 249 KB", "dense", "/tokenize", json.dumps({"inputs": "! " * 124_000}).encode()
    yield "120,000 ids to decode", "dense", "/decode", json.dumps({"ids": [[1000] * 41_000]}).encode()
    yield "sparse vectors", "sparse", "/embed_sparse", json.dumps({"inputs": [words(2000)[n:] for n in range(2000)]}).encode()


GOLDEN = HERE.parent / "tests" / "golden"
SERVERS: Mapping[str, Mapping[str, object]] = {
    "dense": {},
    "tokens": {"pooling": "none"},
    "ranker": {"model": HERE.parent / "examples/models/scifact-reranker"},
    "labels": {"model": HERE.parent / "examples/models/banking77-classifier"},
    "sparse": {"model": GOLDEN / "bert_splade"},
}


def memory(process: int, name: str) -> float:
    """Megabytes of a value of /proc/PID/status."""
    found = re.search(rf"{name}:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


async def watch(port: int, stop: asyncio.Event) -> tuple[float, int]:
    """Ask /health/live all the time; returns the longest wait and how often there was no answer."""
    longest, failures = 0.0, 0
    async with httpx.AsyncClient(timeout=300) as client:
        while not stop.is_set():
            begun = time.perf_counter()
            try:
                answer = await client.get(f"http://127.0.0.1:{port}/health/live")
                failures += answer.status_code != 200
            except httpx.HTTPError:
                failures += 1
            longest = max(longest, time.perf_counter() - begun)
            await asyncio.sleep(0.01)
    return longest, failures


async def attack(process: int, port: int, path: str, body: bytes) -> str:
    """Send a body; returns the rest of the table's row."""
    before, stop = memory(process, "VmRSS"), asyncio.Event()
    async with httpx.AsyncClient(timeout=400) as client:
        watcher = asyncio.create_task(watch(port, stop))
        await asyncio.sleep(0.3)
        begun, url = time.perf_counter(), f"http://127.0.0.1:{port}"
        try:
            headers = {"content-type": "application/json", "x-request-timeout": "20"}
            answer = await client.post(url + path, content=body, headers=headers)
            status, size = str(answer.status_code), len(answer.content) / MB
            if answer.status_code >= 400:
                print(f"      {answer.text[:150]}", file=sys.stderr)
        except httpx.HTTPError as error:
            status, size = type(error).__name__, 0.0
        seconds = time.perf_counter() - begun
        stop.set()
        longest, failures = await watcher
        metrics = (await client.get(url + "/metrics")).text
        lag = re.search(r"^npu_proxy_event_loop_lag ([\d.e-]+)", metrics, re.MULTILINE)
    await asyncio.sleep(3.0)
    after, peak = memory(process, "VmRSS"), memory(process, "VmHWM")
    stood = float(lag[1]) if lag else longest
    times = f"{status} | {seconds:.1f} | {size:.1f} | {1000 * stood:.0f} | {1000 * longest:.0f}"
    return f"{times} | {peak - before:.0f} | {after - before:+.0f} | {failures}"


def main() -> None:
    """Run all, one server per kind of model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--before", type=Path)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    source = options.before or HERE.parent / "src"
    chosen = [row for row in bodies() if options.only in row[0]]
    print("| request | path | status | s | answer MB | loop ms | health ms | peak MB | kept MB | health failed |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for kind, settings in SERVERS.items():
        rows = [row for row in chosen if row[1] == kind]
        if not rows:
            continue
        process, port = serve(source, **settings)
        assert process.stderr is not None
        log = (HERE / "results" / "attacks.log").open("wb")
        reader = subprocess.Popen(["cat"], stdin=process.stderr, stdout=log)
        httpx.post(f"http://127.0.0.1:{port}/v1/embeddings", json={"input": ["warm"] * 64}, timeout=60)
        for name, _, path, body in rows:
            if process.poll() is not None:
                print(f"| {name} | `{path}` | the server has ended ({process.returncode}) |")
                process, port = serve(source, **settings)
                reader = subprocess.Popen(["cat"], stdin=process.stderr, stdout=log)
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak begins anew
            row = asyncio.run(attack(process.pid, port, path, body))
            print(f"| {name} | `{path}` | {row} |", flush=True)
        process.terminate()
        process.wait(60)
        reader.wait(60)
        log.close()


if __name__ == "__main__":
    os.environ.setdefault("NPU_PROXY_INSECURE", "0")
    main()
