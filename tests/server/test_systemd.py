"""What the server tells systemd: that it is ready, that it is alive for as long as it is, and nothing without systemd."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import golden
from npu_proxy.server.ops import systemd

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")


@pytest.fixture
def receiver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(str(path))
        bound.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        yield bound


def test_signs_of_life_stop_when_a_thread_has_died(receiver: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    alive = iter([True, True, False, False, False])

    with pytest.raises(RuntimeError, match="StopIteration"):  # which no coroutine may raise
        asyncio.run(systemd.keep_watchdog(lambda: next(alive)))
    receiver.setblocking(False)
    assert [receiver.recv(100) for _ in range(2)] == [b"WATCHDOG=1"] * 2
    with pytest.raises(BlockingIOError):
        receiver.recv(100)


def test_without_systemd_nothing_is_sent_and_nothing_fails(receiver: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_PID", "1")
    monkeypatch.setenv("WATCHDOG_USEC", "1000")
    asyncio.run(systemd.keep_watchdog(lambda: True))  # another process's watchdog
    monkeypatch.delenv("NOTIFY_SOCKET")
    systemd.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent/socket")
    systemd.notify("READY=1")
    receiver.setblocking(False)
    with pytest.raises(BlockingIOError):
        receiver.recv(100)


def test_a_server_says_that_it_is_ready_and_alive_and_that_it_stops(receiver: socket.socket) -> None:
    command = [sys.executable, "-m", "npu_proxy", "serve", "--port", "0", "--device", "cpu", "--model", str(golden("mean")[0])]
    environment = {**os.environ, "WATCHDOG_USEC": "100000"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as server:
        try:
            seen: list[bytes] = []
            while seen.count(b"WATCHDOG=1") < 3 or b"READY=1" not in seen:
                seen.append(receiver.recv(100))
            server.send_signal(signal.SIGTERM)
            while b"STOPPING=1" not in seen:
                seen.append(receiver.recv(100))
            assert server.wait(30) == 0
        finally:
            server.kill()
