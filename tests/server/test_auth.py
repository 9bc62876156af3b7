"""API keys: who is asked for one, what is compared, and that a reachable server without keys does not start."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from conftest import app_of, fake_engine
from npu_proxy import Settings, SettingsError
from npu_proxy.server.http.clients import ApiKey, identify, read_keys, wishes_of
from npu_proxy.types import Client, Lane


def ask(path: str, headers: dict | None = None, method: str = "GET", **settings: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        engine = fake_engine(**settings).start()
        app = app_of(engine, Settings(**settings))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            answer = await http.request(
                method, path, headers=headers, content=b'{"input": "a", "inputs": "a"}' if method == "POST" else b""
            )
        await asyncio.to_thread(engine.stop)
        return answer

    return asyncio.run(run())


@pytest.mark.parametrize("path", ["/v1/embeddings", "/api/embed", "/embed"])
def test_every_dialect_wants_a_key_and_says_so_in_its_own_shape(path: str) -> None:
    refused = ask(path, method="POST", api_key=("one", "two"))
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert "error" in refused.json()
    assert ask(path, {"authorization": "Bearer wrong"}, "POST", api_key=("one",)).status_code == 401
    for headers in ({"authorization": "Bearer two"}, {"authorization": "bearer one"}, {"x-api-key": "one"}):
        assert ask(path, headers, "POST", api_key=("one", "two")).status_code == 200
    assert ask(path, {"authorization": "Basic anything"}, "POST").status_code == 200  # no key is set


def test_health_and_metrics_need_no_key_everything_else_does() -> None:
    for path, status in {
        "/health": 200,
        "/health/live": 200,
        "/ping": 200,
        "/metrics": 200,
        "/v1/models": 401,
        "/api/tags": 401,
        "/info": 401,
        "/docs": 401,
        "/openapi.json": 401,
    }.items():
        assert ask(path, api_key=("one",)).status_code == status, path


def test_keys_come_from_settings_and_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nalpha\n\n beta \n")
    keys = read_keys(Settings(api_key=("own",), api_key_file=file))
    assert [(key.name, key.secret) for key in keys] == [("key-1", b"own"), ("key-2", b"alpha"), ("key-3", b"beta")]
    file.write_text("# none\n")
    for wrong in (file, tmp_path / "nowhere"):
        with pytest.raises(SettingsError, match="api_key_file"):
            read_keys(Settings(api_key_file=wrong))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_a_reachable_server_without_keys_does_not_start(host: str) -> None:
    with pytest.raises(SettingsError, match="`insecure`"):
        read_keys(Settings(host=host))
    assert read_keys(Settings(host=host, insecure=True)) == []
    assert len(read_keys(Settings(host=host, api_key=("k",)))) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.9.9.9"])
def test_no_key_is_needed_on_this_machine_alone(host: str) -> None:
    assert read_keys(Settings(host=host)) == []


# -- named keys ----------------------------------------------------------------------------------------------------------

NAMED = """
[search]
key = "s3cret-one"
priority = "interactive"
weight = 3
max_texts = 2

["nightly index"]
key = "s3cret-two"
priority = "bulk"
"""


def named(tmp_path: Path, content: str) -> Settings:
    file = tmp_path / "keys.toml"
    file.write_text(content)
    return Settings(api_keys_file=file)


def test_named_keys_have_a_share_a_limit_and_a_lane(tmp_path: Path) -> None:
    first, second = read_keys(named(tmp_path, NAMED))
    assert first == ApiKey(
        name="search",
        secret=b"s3cret-one",
        client=Client(name="key search", weight=3.0, max_texts=2),
        lane=Lane.INTERACTIVE,
    )
    assert second.name == "nightly index"
    assert (second.client.weight, second.client.max_texts, second.lane) == (1.0, None, Lane.BULK)
    assert "s3cret" not in repr(first)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "no keys"),
        ("key = 'a'", "key"),
        ("[a\nkey = 1", "not valid TOML"),
        ("[a]", "`key`"),
        ("[a]\nkey = ''", "key"),
        ("[a]\nkey = 's3cret x'", "key"),
        ("[a]\nkey = 's3cret'\nwieght = 2", "wieght"),
        ("[a]\nkey = 's3cret'\nweight = 0", "weight"),
        ("[a]\nkey = 's3cret'\nweight = nan", "weight"),
        ("[a]\nkey = 's3cret'\nmax_texts = 0", "max_texts"),
        ("[a]\nkey = 's3cret'\nmax_texts = true", "max_texts"),
        ("[a]\nkey = 's3cret'\npriority = 'high'", "priority"),
        ("[a]\nkey = 's3cret'\n[b]\nkey = 's3cret'", "twice"),
    ],
)
def test_a_wrong_key_file_is_refused_by_name_and_the_message_has_no_key(tmp_path: Path, content: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem) as error:
        read_keys(named(tmp_path, content))
    assert "api_keys_file" in str(error.value)
    assert "s3cret" not in str(error.value)


def test_usage_is_counted_by_name_limits_apply_and_no_key_is_ever_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = named(tmp_path, NAMED)
    monkeypatch.setattr(logging.getLogger("npu_proxy.access"), "propagate", True)
    caplog.set_level(logging.DEBUG)

    async def run() -> None:
        engine = fake_engine().start()
        app = app_of(engine, settings)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:

            async def post(key: str, texts: list[str]) -> httpx.Response:
                return await http.post("/v1/embeddings", json={"input": texts}, headers={"authorization": f"Bearer {key}"})

            assert (await post("s3cret-one", ["the cat", "the dog"])).status_code == 200
            refused = await post("s3cret-one", ["a", "b", "c"])
            assert refused.status_code == 429
            assert "2 texts" in refused.json()["error"]["message"]
            assert (await post("s3cret-two", ["a", "b", "c"])).status_code == 200
            assert (await post("s3cret-three", ["a"])).status_code == 401
            metrics = (await http.get("/metrics")).text
        assert 'npu_proxy_key_texts_total{key="search"} 2.0' in metrics
        assert 'npu_proxy_key_refused_total{key="search"} 1.0' in metrics
        assert 'npu_proxy_key_texts_total{key="nightly index"} 3.0' in metrics
        assert "s3cret" not in metrics
        await asyncio.to_thread(engine.stop)

    asyncio.run(run())
    assert "s3cret" not in caplog.text
    assert 'key="nightly index"' in caplog.text


# -- priority ------------------------------------------------------------------------------------------------------------


def request(**headers: str) -> Request:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": pairs, "client": ("10.0.0.1", 1)})


@pytest.mark.parametrize(
    ("header", "field", "lane"),
    [
        ("", None, None),
        ("bulk", None, Lane.BULK),
        ("Interactive", None, Lane.INTERACTIVE),
        ("bulk", "interactive", Lane.INTERACTIVE),
        ("u=1, i", None, None),  # what browsers send
        ("i", None, None),
        ("", 0, None),  # vLLM's default
        ("", 5, Lane.BULK),
        ("", -5, Lane.INTERACTIVE),
    ],
)
def test_a_caller_chooses_its_lane_by_header_or_field(header: str, field: str | int | None, lane: Lane | None) -> None:
    body = json.dumps({"input": "a", **({} if field is None else {"priority": field})}).encode()
    assert wishes_of(request(priority=header), body, None).lane is lane


@pytest.mark.parametrize(("header", "field"), [("urgent", None), ("", "urgent"), ("", [1]), ("", 1.5)])
def test_an_unknown_priority_is_refused(header: str, field: object) -> None:
    headers = {"priority": header} if header else {}
    refused = ask_priority(headers, {"input": "a", "priority": field})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "priority"
    assert "interactive, bulk" in refused.json()["error"]["message"]


def ask_priority(headers: dict[str, str], body: dict[str, object]) -> httpx.Response:
    async def run() -> httpx.Response:
        engine = fake_engine().start()
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app_of(engine, Settings())), base_url="http://localhost"
        ) as http:
            answer = await http.post("/v1/embeddings", headers=headers, json=body)
        await asyncio.to_thread(engine.stop)
        return answer

    return asyncio.run(run())


def test_a_key_for_bulk_work_stays_in_the_bulk_lane(tmp_path: Path) -> None:
    first, second = read_keys(named(tmp_path, NAMED))
    assert wishes_of(request(priority="interactive"), b"{}", second).lane is Lane.BULK
    assert wishes_of(request(), b"{}", first).lane is Lane.INTERACTIVE
    assert wishes_of(request(priority="bulk"), b"{}", first).lane is Lane.BULK


def test_without_keys_a_client_is_an_address_and_a_user_agent() -> None:
    names = {identify([], request(user_agent=agent)).name for agent in ("a", "b", "a", "")}
    assert names == {"10.0.0.1 a", "10.0.0.1 b", "10.0.0.1 "}
    assert len(identify([], request(user_agent="x" * 10_000)).name) < 150
