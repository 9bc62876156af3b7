"""API keys: who is asked for one, what is compared, and that a reachable server without keys does not start."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import app_of, fake_engine
from npu_proxy import Settings, SettingsError
from npu_proxy.server.http.auth import read_keys


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
    assert read_keys(Settings(api_key=("own",), api_key_file=file)) == [b"own", b"alpha", b"beta"]
    file.write_text("# none\n")
    for wrong in (file, tmp_path / "nowhere"):
        with pytest.raises(SettingsError, match="api_key_file"):
            read_keys(Settings(api_key_file=wrong))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_a_reachable_server_without_keys_does_not_start(host: str) -> None:
    with pytest.raises(SettingsError, match="`insecure`"):
        read_keys(Settings(host=host))
    assert read_keys(Settings(host=host, insecure=True)) == []
    assert read_keys(Settings(host=host, api_key=("k",))) == [b"k"]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.9.9.9"])
def test_no_key_is_needed_on_this_machine_alone(host: str) -> None:
    assert read_keys(Settings(host=host)) == []
