"""SIGHUP: keys, certificates, limits and names are read again, nothing is dropped, and a wrong value changes nothing."""

import re
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import Server, golden
from npu_proxy.models.pull import pull
from npu_proxy.models.store import ModelStore

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")


class Running:
    """A server process whose settings are in a file that the test changes."""

    def __init__(self, folder: Path, content: str) -> None:
        self.file = folder / "npu-proxy.toml"
        self.file.write_text(content)
        self.server = Server("--store", str(folder / "store"), NPU_PROXY_CONFIG=str(self.file)).wait_ready(r"ready: (https?://\S+)")

    def hang_up(self, content: str | None = None) -> str:
        """Change the file, send SIGHUP, and return what the server says."""
        if content is not None:
            self.file.write_text(content)
        self.server.process.send_signal(signal.SIGHUP)
        assert self.server.process.stderr is not None
        for line in self.server.process.stderr:
            if re.search("took over|stay as they were", line):
                return line
        raise AssertionError("the server ended")

    def ask(self, model: str = "mean", key: str = "", texts: int = 1, **options: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        body = {"model": model, "input": ["the cat"] * texts}
        return httpx.post(f"{self.server.url}/v1/embeddings", json=body, headers=headers, timeout=60, **options)


@contextmanager
def serving(folder: Path, content: str) -> Iterator[Running]:
    for name in ("mean", "max"):
        pull(ModelStore(folder / "store"), str(golden(name)[0]), mirrors=(), report=lambda _: None)
    running = Running(folder, content)
    try:
        yield running
        assert running.server.stop() == 0
    finally:
        running.server.process.kill()


BASE = 'model = "mean"\ndevice = "cpu"\nrow_tokens = 64\n'


def test_keys_and_limits_are_taken_over_and_named_and_no_request_is_dropped(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text('[one]\nkey = "first"\n')
    content = BASE + f'api_keys_file = "{keys}"\n'
    with serving(tmp_path, content) as running:
        assert running.ask(key="first").status_code == 200
        assert running.ask(key="second").status_code == 401
        stop, statuses = threading.Event(), []

        def load() -> None:
            while not stop.is_set():
                statuses.append(running.ask(key="first").status_code)

        with ThreadPoolExecutor(4) as threads:
            for _ in range(4):
                threads.submit(load)
            keys.write_text('[one]\nkey = "first"\nweight = 2\n[two]\nkey = "second"\n')
            said = running.hang_up(content + "max_client_batch = 2\n")
            for _ in range(5):
                running.hang_up()
            stop.set()
        assert set(statuses) == {200}
        assert "API keys new: two" in said
        assert "API keys changed: one" in said
        assert "`max_client_batch` 2 (was 2048)" in said
        assert "first" not in said
        assert running.ask(key="second").status_code == 200
        assert running.ask(key="second", texts=3).status_code == 400
        assert "nothing has changed" in running.hang_up()
        assert "`row_tokens`" in running.hang_up(content.replace("row_tokens = 64", "row_tokens = 128"))
        assert running.ask(key="first").status_code == 200


def test_what_is_wrong_is_said_and_changes_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, BASE) as running:
        limits = ("max_client_batch = 0", "max_clientbatch = 3")
        for wrong in (*limits, "served_model_name = 'docs=nobody'", "api_keys_file = 'no'", "= 3"):
            said = running.hang_up(BASE + wrong + "\n")
            assert "stay as they were" in said, wrong
            assert "Traceback" not in said
            assert running.ask(texts=3).status_code == 200


def test_keys_cannot_be_removed_from_a_server_that_others_can_reach(tmp_path: Path) -> None:
    with serving(tmp_path, BASE + 'host = "0.0.0.0"\napi_key = "first"\n') as running:
        running.server.url = running.server.url.replace("0.0.0.0", "127.0.0.1")
        for content in ('host = "127.0.0.1"\n', 'host = "0.0.0.0"\ninsecure = true\n'):
            assert "stay as they were" in running.hang_up(BASE + content)
            assert running.ask().status_code == 401
            assert running.ask(key="first").status_code == 200


def test_a_name_moves_from_one_model_to_another_at_once(tmp_path: Path) -> None:
    before, after = BASE + "served_model_name = 'docs=mean'\n", BASE + "served_model_name = ['docs=max', 'old=mean']\n"
    with serving(tmp_path, before) as running:
        first = running.ask("docs").headers["x-npu-proxy-fingerprint"]
        assert first == running.ask("mean").headers["x-npu-proxy-fingerprint"]
        said = running.hang_up(after)
        assert "`served_model_name` docs=max, old=mean (was docs=mean)" in said
        health = httpx.get(f"{running.server.url}/health").json()
        assert {model["name"] for model in health["models"]} == {"mean", "max"}  # loaded before it got the name
        assert (
            running.ask("docs").headers["x-npu-proxy-fingerprint"] == running.ask("max").headers["x-npu-proxy-fingerprint"] != first
        )
        assert running.ask("old").headers["x-npu-proxy-fingerprint"] == first
        running.hang_up(before)
        assert running.ask("docs").headers["x-npu-proxy-fingerprint"] == first
        assert running.ask("old").status_code == 404


def test_a_new_certificate_is_used_for_new_connections(tmp_path: Path) -> None:
    def certificate(name: str) -> None:
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
        subprocess.run([*command, "-keyout", tmp_path / "key", "-out", tmp_path / "cert"], check=True, capture_output=True)

    def seen(running: Running) -> str:
        port = int(running.server.url.rpartition(":")[2])
        return ssl.get_server_certificate(("127.0.0.1", port))

    certificate("one")
    with serving(tmp_path, BASE + f"ssl_certfile = '{tmp_path / 'cert'}'\nssl_keyfile = '{tmp_path / 'key'}'\n") as running:
        first = seen(running)
        kept = httpx.Client(verify=False)
        assert kept.get(f"{running.server.url}/health").status_code == 200
        certificate("two")
        assert "the certificate" in running.hang_up()
        assert seen(running) != first
        assert kept.get(f"{running.server.url}/health").status_code == 200
        (tmp_path / "cert").write_text("broken")
        second = (tmp_path / "key").read_text()
        assert "stay as they were" in running.hang_up()
        assert second
        assert kept.get(f"{running.server.url}/health").status_code == 200
        kept.close()
