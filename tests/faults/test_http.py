"""What a client of the server sees of a fault: the device in the header, the reason, the metrics, health per device."""

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from load import accelerator, faulty_engine

from conftest import app_of, golden
from npu_proxy import AsyncEngine
from npu_proxy.devices.worker.faults import Fault

QUICK = {
    "model": str(golden("mean")[0]),
    "heartbeat_timeout": 1.0,
    "row_timeout": 2.0,
    "compile_timeout": 20.0,
    "breaker_backoff": 0.1,
    "breaker_longest": 1.0,
    "probe_interval": 0.0,
    "compile_cache_mb": 0,
    "cache_mb": 0,
}
FIELDS = {"name", "kind", "state", "breaker", "worker_pid", "certified", "executed"}


@asynccontextmanager
async def serving(store: Path, **settings: Any) -> AsyncIterator[tuple[httpx.AsyncClient, AsyncEngine]]:
    engine = faulty_engine(store=store, **QUICK, **settings)
    try:
        app = app_of(engine, engine.settings)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=60) as made:
            yield made, AsyncEngine(engine=engine)
    finally:
        await asyncio.to_thread(engine.stop, 0)


async def embed(http: httpx.AsyncClient, text: str) -> httpx.Response:
    answer = await http.post("/v1/embeddings", json={"input": text})
    assert len(answer.json()["data"][0]["embedding"]) == 32 if answer.status_code == 200 else True
    return answer


def executed(metrics: str) -> dict[str, float]:
    return {
        device: float(count)
        for device, count in re.findall(r'_executed_texts_total\{device="([^"]+)",model="[^"]+"\} (\S+)', metrics)
    }


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Fault.LOST, Fault.NAN, Fault.CRASH, Fault.HANG], ids=lambda fault: fault.name.lower())
def test_headers_metrics_and_health_name_who_answered_and_why(fault: Fault, tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path) as (http, engine):
            device = accelerator(engine.engine)
            answer = await embed(http, "the cat")
            assert (answer.headers["x-npu-proxy-device"], answer.headers.get("x-npu-proxy-fallback")) == ("npu-sim", None)
            health = (await http.get("/health?probe=1")).json()
            assert [entry["name"] for entry in health["devices"]] == ["npu-sim", "cpu"]
            first = health["devices"][0]
            assert set(first) >= FIELDS
            assert (first["state"], first["breaker"], first["executed"]) == ("serving", "closed", 1)
            assert first["worker_pid"] > 0
            assert first["certified"] > 0.99999
            device.inject(fault)
            answer = await embed(http, "the dog")
            assert answer.status_code == 200
            assert answer.headers["x-npu-proxy-device"] == "cpu"
            assert "npu-sim" in answer.headers["x-npu-proxy-fallback"] or "did not finish" in answer.headers["x-npu-proxy-fallback"]
            counts = executed((await http.get("/metrics")).text)
            assert counts == {"npu-sim": 1, "cpu": 1}
            assert (await http.get("/health/ready")).status_code == 200  # the CPU answers
            end = time.monotonic() + 30
            while time.monotonic() < end:
                threading.Event().wait(0.05)
                answer = await embed(http, f"text {time.monotonic()}")
                if answer.headers["x-npu-proxy-device"] == "npu-sim" and accelerator(engine.engine).reports()[0].restarts:
                    break
                if fault in (Fault.LOST, Fault.NAN) and answer.headers["x-npu-proxy-device"] == "npu-sim":
                    break  # after these the process goes on
            assert answer.headers["x-npu-proxy-device"] == "npu-sim"
            health = (await http.get("/health")).json()
            counts = executed((await http.get("/metrics")).text)
            assert {entry["name"]: entry["executed"] for entry in health["devices"]} == counts

    asyncio.run(run())


def test_without_fallback_a_fault_is_a_503_with_retry_after_and_the_server_is_not_ready(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, fallback=False) as (http, engine):
            assert (await embed(http, "the cat")).headers["x-npu-proxy-device"] == "npu-sim"
            accelerator(engine.engine).inject(Fault.CRASH)
            answer = await embed(http, "the dog")
            assert answer.status_code in (500, 503)
            answer = await embed(http, "the house")
            if answer.status_code != 200:  # it may be back already
                assert answer.status_code == 503
                assert int(answer.headers["retry-after"]) >= 1
                assert "recovering" in answer.json()["error"]["message"]
            assert (await http.get("/health/live")).status_code == 200

    asyncio.run(run())
