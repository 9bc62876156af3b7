"""Servers over HTTP: throughput of batches, and what a single short query waits while others send batches of 64."""

import asyncio
import os
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

BATCH, CLIENTS = 64, 4
QUERY = "how do I change the pin of my card"


@dataclass
class Server:
    """A server process; ``path`` is where it takes OpenAI requests."""

    process: subprocess.Popen[bytes]
    url: str
    model: str

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def start_server(system: str, python: str | None, model: Path) -> Server:
    """Start a server and wait for its first vector."""
    assert python is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if system == "npu-proxy":
        command, path = (
            [python, "-m", "npu_proxy", "serve", "--model", str(model), "--timeout", "300", "--cache-mb", "0"],
            "/v1/embeddings",
        )
    else:
        command = [
            str(Path(python).parent / "infinity_emb"),
            "v2",
            "--model-id",
            str(model),
            "--engine",
            "torch",
            "--device",
            "cpu",
        ]
        command += ["--no-bettertransformer", "--served-model-name", model.name]
        path = "/embeddings"
    process = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
    )
    server = Server(process, f"http://127.0.0.1:{port}{path}", model.name)
    give_up = time.monotonic() + 180
    while time.monotonic() < give_up and process.poll() is None:
        try:
            if httpx.post(server.url, json={"input": "x", "model": server.model}, timeout=60).status_code == 200:
                return server
        except httpx.HTTPError:
            time.sleep(0.3)
    raise RuntimeError(f"the server of {system} did not start")


def server_seconds(server: Server, texts: list[str]) -> float:
    """Seconds to embed all texts, sent in batches by a few clients at once."""

    async def run() -> float:
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(timeout=600, limits=limits) as client:
            batches = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
            begun = time.perf_counter()
            await asyncio.gather(*(_post(client, server, batch) for batch in batches))
            return time.perf_counter() - begun

    return asyncio.run(run())


def latency(server: Server, texts: list[str], *, idle: int = 60, loaded: int = 120) -> dict[str, float]:
    """p50 and p99 in seconds of a single short query, idle and while four clients send batches of 64 without pause."""

    async def run() -> dict[str, float]:
        async with httpx.AsyncClient(timeout=600) as client:
            await _query(client, server, 0)
            alone = [await _query(client, server, n) for n in range(idle)]
            stop = asyncio.Event()

            async def load(seed: int) -> None:
                rng = np.random.default_rng(seed)
                while not stop.is_set():
                    await _post(client, server, [texts[i] for i in rng.integers(0, len(texts), BATCH)])

            clients = [asyncio.create_task(load(n)) for n in range(CLIENTS)]
            await asyncio.sleep(3)
            busy: list[float] = []
            give_up = time.monotonic() + 120
            while len(busy) < loaded and time.monotonic() < give_up:
                busy.append(await _query(client, server, 1000 + len(busy)))
                await asyncio.sleep(0.02)
            stop.set()
            await asyncio.gather(*clients)
        names = (("idle_p50", alone, 50), ("idle_p99", alone, 99), ("loaded_p50", busy, 50), ("loaded_p99", busy, 99))
        return {name: float(np.percentile(values, share)) for name, values, share in names} | {"queries": len(busy)}

    return asyncio.run(run())


async def _query(client: httpx.AsyncClient, server: Server, number: int) -> float:
    begun = time.perf_counter()
    await _post(client, server, [f"{QUERY} {number}"])
    return time.perf_counter() - begun


async def _post(client: httpx.AsyncClient, server: Server, texts: list[str]) -> None:
    body = {"input": texts, "model": server.model, "encoding_format": "base64"}
    response = await client.post(server.url, json=body)
    response.raise_for_status()
