"""The application over a fake device: shapes of answers and errors, headers, limits, health, metrics."""

import asyncio
import base64
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from conftest import SMALL_SHAPES, app_of, fake_engine, golden, until_set
from npu_proxy import Settings
from npu_proxy.devices.fake import FakeDevice, fail

_, TEXTS, _ = golden("mean")


@asynccontextmanager
async def client(device: FakeDevice | None = None, *, start: bool = True, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    settings = {"load_on_demand": False, **settings}
    device = device or FakeDevice(width=32, shapes=SMALL_SHAPES)
    engine = fake_engine(device, **settings)
    if start:
        engine.start()
    app = app_of(engine, Settings(**settings))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as made:
        yield made
    await asyncio.to_thread(engine.stop)


def post(body: object, path: str = "/v1/embeddings", headers: dict | None = None, **settings: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        async with client(**settings) as http:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await http.post(path, content=content, headers=headers)

    return asyncio.run(run())


def test_float_and_base64_are_the_same_vectors_in_order() -> None:
    answer = post({"input": TEXTS, "model": "mean", "user": "u", "unknown_field": 1})
    assert answer.status_code == 200
    content = answer.json()
    assert [entry["index"] for entry in content["data"]] == list(range(len(TEXTS)))
    assert (content["object"], content["model"], content["data"][0]["object"]) == ("list", "mean", "embedding")
    assert content["usage"]["prompt_tokens"] == content["usage"]["total_tokens"] > 0
    floats = np.array([entry["embedding"] for entry in content["data"]], np.float32)
    coded = post({"input": TEXTS, "encoding_format": "base64"}).json()["data"]
    np.testing.assert_array_equal(floats, [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in coded])


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/embeddings/", "/embeddings", "/v3/embeddings"])
def test_paths_and_null_fields(path: str) -> None:
    body = {"input": "the cat", "dimensions": None, "encoding_format": None, "user": None, "model": None, "normalize": None}
    assert post(body, path).status_code == 200


def test_headers() -> None:
    answer = post({"input": "sea " * 100}, headers={"x-request-id": "mine"})
    assert answer.headers["x-request-id"] == "mine"
    assert answer.headers["x-npu-proxy-device"] == "fake"
    assert len(answer.headers["x-npu-proxy-fingerprint"]) == 16
    assert answer.headers["x-npu-proxy-truncated"] == "1"
    assert len(post({"input": "a"}, headers={"x-request-id": "x" * 999}).headers["x-request-id"]) == 32


BAD: list[tuple[object, int, str]] = [
    (b"", 400, "no body"),
    (b"{", 400, "not valid JSON"),
    (b"\xff\xfe", 400, "JSON"),
    (b'{"input":"\\u12"}', 400, "JSON"),
    (b"[" * 100_000, 400, "more than 9192 lists and objects"),
    ([], 400, "Expected `object`"),
    ({}, 400, "missing required field `input`"),
    ({"input": None}, 400, "got `null`"),
    ({"input": 3}, 400, "got `int`"),
    ({"input": "a", "messages": [{"role": "user", "content": "a"}]}, 400, "is a chat"),
    ({"messages": [{"role": "user", "content": "a"}]}, 400, "is a chat"),
    ({"input": ""}, 400, "the text is empty"),
    ({"input": []}, 400, "`input` is empty"),
    ({"input": ["a", ""]}, 400, "the text is empty"),
    ({"input": ["a", 1]}, 400, "mixes"),
    ({"input": [[1], "a"]}, 400, "mixes"),
    ({"input": [[]]}, 400, "list of token ids is empty"),
    ({"input": [1, 10**7]}, 400, "vocabulary"),
    ({"input": [[-1]]}, 400, "vocabulary"),
    ({"input": ["a"] * 2049}, 400, "at most 2048"),
    ({"input": "a", "dimensions": -1}, 400, "between 1 and 32"),
    ({"input": "a", "dimensions": 33}, 400, "between 1 and 32"),
    ({"input": "a", "dimensions": 1.5}, 400, "dimensions"),
    ({"input": "a", "encoding_format": "hex"}, 400, "encoding_format"),
    ({"input": "a", "input_type": "question"}, 400, "input_type"),
    ({"input": "a", "prompt_name": "no"}, 400, "its prompts: document, query"),
    ({"input": "sea " * 100, "truncate": "error"}, 400, "maximum context length is 48 tokens, however you requested 102"),
    ({"input": "a", "model": "other"}, 404, "does not exist"),
    ({"input": "a", "model": 5}, 400, "model"),
]


def test_every_mistake_has_openais_shape_and_the_next_request_is_right() -> None:
    async def run() -> None:
        async with client() as http:
            for body, status, message in BAD:
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                answer = await http.post("/v1/embeddings", content=content)
                error = answer.json()["error"]
                assert (answer.status_code, set(error)) == (status, {"message", "type", "param", "code"}), body
                assert message in error["message"], (body, error)
                assert error["type"] == "invalid_request_error"
                assert error["code"] == ("model_not_found" if status == 404 else error["code"])
                assert (await http.post("/v1/embeddings", json={"input": "the cat"})).status_code == 200

    asyncio.run(run())


def test_token_ids_are_embedded_or_refused() -> None:
    ids = [5, 6, 7]
    single, several = (post({"input": given}, token_ids="model").json() for given in (ids, [ids, ids]))
    assert single["data"][0]["embedding"] == several["data"][1]["embedding"]
    refused = post({"input": ids}, token_ids="reject")
    assert refused.status_code == 400
    assert "token_ids" in refused.json()["error"]["message"]


def test_overload_deadline_and_device_errors_have_their_codes() -> None:
    event = threading.Event()

    async def run() -> None:
        device = FakeDevice(width=32, shapes=SMALL_SHAPES, script=until_set(event))
        async with client(device, max_queue_items=4) as http:
            waiting = asyncio.create_task(http.post("/v1/embeddings", json={"input": ["a", "b", "c"]}))
            await asyncio.sleep(0.1)
            refused = await http.post("/v1/embeddings", json={"input": ["d", "e"]})
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            places: list[dict[str, Any]] = [{"params": {"timeout": "0.1"}}, {"headers": {"x-request-timeout": "0.1"}}]
            for place in places:
                late = await http.post("/v1/embeddings", json={"input": "d"}, **place)
                assert (late.status_code, late.json()["error"]["type"]) == (504, "server_error")
            wrong = await http.post("/v1/embeddings?timeout=soon", json={"input": "d"})
            assert wrong.status_code == 400
            event.set()
            assert (await waiting).status_code == 200

    asyncio.run(run())
    lost = post({"input": "a"}, device=FakeDevice(width=32, script=fail("device lost")))
    assert (lost.status_code, lost.json()["error"]["message"]) == (503, "device lost")


def test_a_fault_of_ours_has_the_dialects_shape(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeDevice):
        @property
        def name(self) -> str:
            raise ZeroDivisionError

        @name.setter
        def name(self, value: str) -> None: ...

    answer = post({"input": "a"}, device=Broken(width=32))
    assert answer.status_code == 500
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert "Zero" in caplog.text
    assert "Traceback" not in answer.text


def test_a_body_that_never_ends_is_given_up() -> None:
    async def run() -> None:
        async with client(timeout=0.2) as http:

            async def slow() -> AsyncIterator[bytes]:
                yield b'{"input": '
                await asyncio.sleep(5)

            answer = await http.post("/v1/embeddings", content=slow())
            assert answer.status_code == 504
            assert "did not arrive within 0.2 seconds" in answer.json()["error"]["message"]

    asyncio.run(run())


def test_large_bodies_are_refused() -> None:
    answer = post({"input": "a" * 1_100_000}, max_body_mb=1)
    assert answer.status_code == 413
    assert "max_body_mb" in answer.json()["error"]["message"]


def test_models_health_metrics_and_docs() -> None:
    async def run() -> None:
        async with client() as http:
            (listed,) = (await http.get("/v1/models")).json()["data"]
            assert (listed["id"], listed["object"]) == ("mean", "model")
            assert (await http.get("/v1/models/mean")).json() == listed
            assert (await http.get("/v1/models/no/such")).status_code == 404
            assert (await http.get("/v1/models/%0A")).status_code == 404  # a line feed is no end of a path
            await http.post("/v1/embeddings", json={"input": ["a", "b"]})
            health = await http.get("/health")
            assert (health.status_code, health.json()["status"]) == (200, "ok")
            assert health.json()["executed"] == {"fake": 2}
            text = (await http.get("/metrics")).text
            assert 'npu_proxy_executed_texts_total{device="fake",model="mean"} 2.0' in text
            assert 'npu_proxy_request_count_total{path="/v1/embeddings",status="200"} 1.0' in text
            document = (await http.get("/openapi.json")).json()
            assert {"/v1/embeddings", "/v1/models", "/v1/models/{id}", "/health"} <= set(document["paths"])
            assert "openapi.json" in (await http.get("/docs")).text
            assert (await http.get("/nothing")).status_code == 404
            assert (await http.get("/v1/embeddings")).status_code == 405

    asyncio.run(run())


def test_not_ready_is_503_with_the_reason() -> None:
    async def run() -> None:
        async with client(start=False) as http:
            health = await http.get("/health")
            assert (health.status_code, health.json()["status"]) == (503, "loading")
            answer = await http.post("/v1/embeddings", json={"input": "a"})
            assert answer.status_code == 503
            assert "loading" in answer.json()["error"]["message"]
            assert (await http.get("/metrics")).status_code == 200

    asyncio.run(run())
