"""No single body, and no client that does not read, costs more than a bound: the event loop goes on, and memory comes back.

The bodies are those of bench/attacks.py, smaller; that program measures them in full.
"""

import asyncio
import json
import math
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import GOLDEN, Server, golden
from npu_proxy.errors import ClientLimitError, InputError, OverloadedError
from npu_proxy.server.http import json_scan
from npu_proxy.server.http.budgets import MemoryBudget
from npu_proxy.server.http.json_scan import check_values
from npu_proxy.server.http.responses import to_json
from npu_proxy.server.ops.loop_lag import LoopLag

FOLDER, TEXTS, VECTORS = golden("mean")
MB = 1_000_000
LATE = GOLDEN / "colbert"
RANKER = GOLDEN / "bert_rerank"
STANDSTILL = 5.0
"""Seconds; it is 0.06 on an idle machine (bench/attacks.py), but here other tests take their turns. It was 7 to 150 before."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    flags = [part for folder in (FOLDER, LATE, RANKER) for part in ("--model", str(folder))]
    flags += ["--device", "cpu", "--max-answer-mb", "1", "--max-bodies-mb", "64", "--header-timeout", "5", "--cache-mb", "0"]
    running = Server(*flags).wait_ready()
    yield running
    assert running.stop() == 0


def post(server: Server, path: str, content: bytes | dict[str, object], seconds: float = 60) -> httpx.Response:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return httpx.post(server.url + path, content=body, headers={"content-type": "application/json"}, timeout=seconds)


def lag(server: Server) -> float:
    found = re.search(r"^npu_proxy_event_loop_lag ([\d.e-]+)", httpx.get(server.url + "/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1])


TINY = ["a", "b"] * 1024
BODIES: list[tuple[str, bytes | dict[str, object], int, str]] = [
    ("/rerank", {"model": RANKER.name, "query": "the cat " * 2_000_000, "texts": TINY}, 200, ""),
    ("/v1/rerank", {"model": RANKER.name, "query": "the cat " * 200_000, "documents": TINY}, 200, ""),
    ("/score", {"model": RANKER.name, "text_1": "the cat " * 200_000, "text_2": TINY}, 200, ""),
    ("/v1/rerank", {"model": LATE.name, "query": "the cat " * 200_000, "documents": TINY}, 200, ""),
    ("/embed_all", {"model": LATE.name, "inputs": ["the cat is here " * 20] * 300}, 413, "max_answer_mb"),
    ("/embed", {"model": FOLDER.name, "inputs": ["a"] * 2000}, 413, "max_answer_mb"),
    ("/v1/embeddings", b'{"input":[' + b"[1]," * (4 * MB) + b"[1]]}", 400, "more than 9192 lists"),
    ("/v1/embeddings", b'{"input":[' + b"10," * (4 * MB) + b"1]}", 400, "more than 1048576 values"),
    ("/v1/embeddings", b'{"input":[' + b'"",' * (4 * MB) + b'""]}', 400, "more than 1048576 values"),
    ("/v1/embeddings", b'{"input":[{' + b'"a":1,' * (2 * MB) + b'"b":1}]}', 400, "more than 1048576 values"),
    ("/api/embed", b"[" * (4 * MB), 400, "more than 9192 lists"),
    ("/v1/embeddings", {"input": "a" * (15 * MB)}, 400, "exceeds the limit of 4,000,000 characters"),
    ("/v1/embeddings", ('{"input":"' + "東" * (5 * MB) + '"}').encode(), 200, ""),
    ("/v1/embeddings", {"input": "the cat " * 400_000, "truncate": "chunk"}, 400, "up to 1,000,000 characters"),
    ("/tokenize", {"inputs": "! " * 120_000}, 200, ""),
    ("/decode", {"ids": [5] * 80_000}, 200, ""),
]


@pytest.mark.parametrize("row", BODIES, ids=lambda row: f"{row[0]} {row[2]} {row[3]}".replace(" ", "-"))
def test_a_body_is_answered_or_refused_while_others_are_served(
    server: Server, row: tuple[str, bytes | dict[str, object], int, str]
) -> None:
    path, body, status, message = row
    answer = post(server, path, body)
    assert answer.status_code == status, answer.text[:300]
    assert message in answer.text
    assert lag(server) < STANDSTILL


def test_all_bodies_at_once_beside_a_client_with_short_queries(server: Server) -> None:
    async def ask() -> list[float]:
        waits: list[float] = []
        async with httpx.AsyncClient(timeout=60) as client:
            while not done.is_set():
                begun = time.monotonic()
                answer = await client.post(server.url + "/embed", json={"inputs": [TEXTS[0]], "normalize": False})
                np.testing.assert_allclose(answer.json(), VECTORS[:1], atol=2e-5)
                waits.append(time.monotonic() - begun)
        return waits

    async def attack(path: str, body: bytes) -> int:
        async with httpx.AsyncClient(timeout=60) as client:
            return (await client.post(server.url + path, content=body, headers={"content-type": "application/json"})).status_code

    async def run() -> tuple[list[int], list[float]]:
        asking = asyncio.create_task(ask())
        found = await asyncio.gather(*(attack(path, body) for path, body in bodies))
        done.set()
        return found, await asking

    done = asyncio.Event()
    bodies = [(path, body if isinstance(body, bytes) else json.dumps(body).encode()) for path, body, _, _ in BODIES]
    found, waits = asyncio.run(run())
    assert set(found) <= {200, 400, 413, 429, 503}
    assert waits
    assert lag(server) < 2 * STANDSTILL


def test_answers_that_nobody_reads_do_not_lock_out_others(server: Server) -> None:
    """They count towards their client's part of a budget of their own, and end after a time."""
    body = json.dumps({"model": FOLDER.name, "inputs": [f"the cat {number}" for number in range(1400)]}).encode()
    head = b"POST /embed HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    port = int(server.url.rpartition(":")[2])
    connections = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(60)]
    senders = [threading.Thread(target=connection.sendall, args=(head + body,)) for connection in connections]
    for sender in senders:
        sender.start()
    statuses: list[int] = []
    end = time.monotonic() + 8
    while time.monotonic() < end:
        answer = httpx.post(server.url + "/embed", json={"inputs": [TEXTS[0]], "normalize": False}, timeout=30)
        statuses.append(answer.status_code)
    for sender in senders:
        sender.join()
    for connection in connections:
        connection.close()
    assert set(statuses) == {200}


def memory(server: Server) -> float:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{server.process.pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def test_memory_comes_back(server: Server) -> None:
    """Requests of 16 MB that were kept until Python's next full collection took 36 MB more with each one."""
    sizes: list[float] = []
    for _ in range(6):
        post(server, "/v1/embeddings", {"input": "the cat " * 2_000_000})
        post(server, "/tokenize", {"inputs": "! " * 120_000})
        end, least = time.monotonic() + 2.5, math.inf
        while time.monotonic() < end:
            least = min(least, memory(server))
            time.sleep(0.1)
        sizes.append(least)
    assert sizes[-1] < 1.2 * sizes[1], sizes


# -- units ---------------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.integers() | st.text('"\\,[]{}a€', max_size=8),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text('"\\,[{a', max_size=4), inner, max_size=4),
    max_leaves=60,
)


def counted(value: object) -> tuple[int, int]:
    """Values that follow others or begin a list or an object; lists and objects."""
    if not isinstance(value, list | dict):
        return 0, 0
    children = [counted(child) for child in (value.values() if isinstance(value, dict) else value)]
    values = 1 + max(0, len(value) - 1) + sum(count for count, _ in children)
    return values, 1 + sum(count for _, count in children)


@settings(deadline=None, max_examples=300)
@given(VALUES, st.integers(1, 40))
def test_what_a_body_would_create_is_counted_whatever_its_texts_contain(value: object, block: int) -> None:
    body = json.dumps(value, ensure_ascii=False).encode()
    values, lists = counted(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_scan, "_BLOCK", block)
        for name, most in (("MOST_VALUES", values), ("_FURTHER_LISTS", lists)):
            patch.setattr(json_scan, "MOST_VALUES", 10**9)
            patch.setattr(json_scan, "_FURTHER_LISTS", 10**9)
            patch.setattr(json_scan, name, most)
            check_values(body, 0)
            if most:
                patch.setattr(json_scan, name, most - 1)
                with pytest.raises(InputError):
                    check_values(body, 0)


def test_a_budget_is_shared_and_half_of_it_is_for_others() -> None:
    budget = MemoryBudget("answers", "max_bodies_mb", 100)
    budget.hold("a", 50)
    with pytest.raises(ClientLimitError, match="half of `max_bodies_mb`"):
        budget.hold("a", 1)
    budget.hold("b", 50)
    with pytest.raises(OverloadedError, match="too many large answers"):
        budget.hold("c", 1)
    budget.hold("c", 100, reserve=2.0)
    for client, size in (("a", 50), ("b", 50), ("c", 100)):
        budget.release(client, size)
    assert budget.held == 0
    assert not budget._by_client


def test_arrays_and_lists_in_a_reply_are_encoded_like_numbers() -> None:
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert json.loads(to_json([rows, [1, "a"], list(rows)])) == [rows.tolist(), [1, "a"], rows.tolist()]
    assert json.loads(to_json({"data": rows, "empty": []})) == {"data": rows.tolist(), "empty": []}
    with pytest.raises(TypeError):
        to_json(object())


def test_the_longest_standstill_is_that_of_the_last_minute() -> None:
    found = LoopLag()
    assert found.longest == 0
    for now, seconds in ((0, 0.3), (1, 0.5), (2, 0.2), (30, 0.1)):
        found.note(now, seconds)
    assert found.longest == 0.5
    found.note(61.5, 0.01)
    assert found.longest == 0.2
    found.note(200, 0.0)
    assert found.longest == 0
