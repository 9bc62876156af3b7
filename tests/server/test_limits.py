"""A real server against hostile connections: slow headers, endless headers, slow bodies, clients that do not read or that leave."""

import json
import re
import resource
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import httpx
import numpy as np
import pytest

from conftest import Server, golden

FOLDER, TEXTS, VECTORS = golden("mean")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    flags = ["--model", str(FOLDER), "--device", "cpu", "--header-timeout", "1", "--idle-timeout", "1", "--max-connections", "40"]
    flags += ["--timeout", "3", "--max-body-mb", "2", "--max-bodies-mb", "4", "--cache-mb", "0"]
    running = Server(*flags).wait_ready()
    yield running
    assert running.stop() == 0


@pytest.fixture(autouse=True)
def _right_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        found = httpx.post(f"{request.getfixturevalue('server').url}/embed", json={"inputs": TEXTS, "normalize": False}).json()
        np.testing.assert_allclose(found, VECTORS, atol=2e-5)


def connect(server: Server) -> socket.socket:
    port = int(server.url.rpartition(":")[2])
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def read_all(connection: socket.socket) -> bytes:
    found = b""
    try:
        while piece := connection.recv(65536):
            found += piece
    except ConnectionResetError:
        pass
    return found


@pytest.mark.parametrize(
    "sent", [b"", b"POST /embed HT", b"POST /embed HTTP/1.1\r\nhost: localhost\r\nx: "], ids=["nothing", "line", "header"]
)
def test_headers_that_do_not_come_end_the_connection(server: Server, sent: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(sent)
        start = time.monotonic()
        assert read_all(connection) == b""
        assert time.monotonic() - start < 10


def test_headers_one_byte_at_a_time_have_no_more_time(server: Server) -> None:
    with connect(server) as connection:
        start = time.monotonic()
        connection.settimeout(0.1)
        for byte in b"POST /embed HTTP/1.1\r\nhost: localhost\r\n" + b"x" * 1000:
            try:
                connection.sendall(bytes([byte]))
                if connection.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        assert time.monotonic() - start < 10


def test_headers_without_end_are_refused(server: Server) -> None:
    with connect(server) as connection:
        try:
            for number in range(10_000):
                connection.sendall(b"GET / HTTP/1.1\r\n" if number == 0 else b"x-%d: %s\r\n" % (number, b"y" * 100))
        except OSError:
            return
        answer = read_all(connection)
        assert answer == b"" or b"431" in answer.splitlines()[0]


@pytest.mark.parametrize(
    "request_line",
    [
        b"GET\r\n\r\n",
        b"\x00\x01\x02",
        b"POST /embed HTTP/9.9\r\n\r\n",
        b"POST /embed HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
        b"G\xff /\xfe HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused(server: Server, request_line: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(request_line)
        assert b" 400 " in read_all(connection).splitlines()[0]


def test_a_body_that_stops_is_given_up_in_the_dialect_s_words(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(b'POST /embed?timeout=0.5 HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{"inputs"')
        answer = read_all(connection)
        assert b" 504 " in answer.splitlines()[0]
        assert b"did not arrive within 0.5 seconds" in answer


def test_a_body_that_says_it_is_too_large_is_not_read(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(b"POST /embed HTTP/1.1\r\nhost: localhost\r\ncontent-length: 3000000\r\n\r\n{")
        assert b" 413 " in connection.recv(65536).splitlines()[0]


def test_slow_bodies_hold_a_limited_amount_of_memory_together(server: Server) -> None:
    held = [connect(server) for _ in range(4)]
    statuses = []
    for connection in held:
        connection.sendall(b"POST /embed HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1900000\r\n\r\n" + b" " * 1_500_000)
        connection.settimeout(20)
    for connection in held:
        statuses.append(int(connection.recv(65536).split()[1]))
        connection.close()
    assert set(statuses) <= {429, 504}
    assert 429 in statuses


def test_connections_beyond_the_limit_are_told_so(server: Server) -> None:
    held = [connect(server) for _ in range(60)]
    answers = [read_all(connection) for connection in held]
    assert sum(answer.startswith(b"HTTP/1.1 503") for answer in answers) >= 15
    for connection in held:
        connection.close()


def test_a_client_that_does_not_read_its_answer_is_dropped(server: Server) -> None:
    body = json.dumps({"inputs": [f"text {number}" for number in range(2048)], "normalize": False}).encode()
    with connect(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = f"POST /embed HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        end = time.monotonic() + 30
        while time.monotonic() < end:  # the server ends it although nothing was read
            time.sleep(0.2)
            if not descriptors(server.process.pid, int(connection.getsockname()[1])):
                break
        else:
            raise AssertionError("the connection is still open")


def descriptors(pid: int, port: int) -> list[str]:
    """Connections of a process from a local port, by the kernel's table."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.update(re.findall(r"socket:\[(\d+)\]", str(link.readlink())))
        except OSError:
            continue
    rows = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    return [row for row in rows if row.split()[9] in inodes and int(row.split()[2].partition(":")[2], 16) == port]


def test_texts_of_clients_that_have_gone_are_dropped_and_counted(server: Server) -> None:
    def abandoned() -> float:
        text = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
        found = re.search(r"npu_proxy_abandoned_texts_total\{[^}]*\} (\S+)", text)
        assert found is not None
        return float(found[1])

    before = abandoned()
    for attempt in range(20):
        body = json.dumps({"inputs": [f"a longer text {attempt} {number} " * 8 for number in range(2000)]}).encode()
        with connect(server) as connection:
            connection.sendall(f"POST /embed HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(0.05)
        if abandoned() > before:
            break
    end = time.monotonic() + 20
    while abandoned() == before:
        assert time.monotonic() < end
    assert 'npu_proxy_request_failure_total{err="gone"}' in urllib.request.urlopen(f"{server.url}/metrics").read().decode()


@pytest.mark.slow
def test_sigterm_does_not_wait_for_slow_clients() -> None:
    own = Server("--model", str(FOLDER), "--device", "cpu", "--drain", "2").wait_ready()
    with connect(own) as connection:
        connection.sendall(b"POST /embed HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
        start = time.monotonic()
        own.process.terminate()
        assert own.stop() == 0
        assert time.monotonic() - start < 15


@pytest.mark.slow
def test_a_unix_socket_is_the_user_s_own_and_survives_a_killed_server(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    for _ in range(2):
        own = Server("--model", str(FOLDER), "--device", "cpu", "--uds", str(path)).wait_ready(r"npu-proxy ready: (unix:\S+)")
        assert path.stat().st_mode & 0o077 == 0
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as http:
            assert http.post("http://any.name/embed", json={"inputs": TEXTS}).status_code == 200
        second = subprocess.run(
            [sys.executable, "-m", "npu_proxy", "serve", "--model", str(FOLDER), "--uds", str(path)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert second.returncode == 2
        assert "another server listens" in second.stderr
        own.process.kill()
        own.stop()
        assert path.exists()


def test_https(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    own = Server("--model", str(FOLDER), "--device", "cpu", "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key))
    own.wait_ready(r"npu-proxy ready: (https://\S+)")
    context = ssl.create_default_context(cafile=str(certificate))
    assert httpx.get(f"{own.url}/health", verify=context).status_code == 200
    assert own.stop() == 0
    key.write_text("nonsense")
    broken = Server("--model", str(FOLDER), "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key))
    with pytest.raises(AssertionError, match="ssl_certfile"):
        broken.wait_ready()
    assert broken.stop() == 2


@pytest.mark.slow
def test_memory_stays_flat_under_refused_bodies(server: Server) -> None:
    def resident() -> int:
        pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    def send() -> None:
        client.post(f"{server.url}/embed", content=b"x" * 1_900_000)

    def burst() -> None:
        threads = [threading.Thread(target=send) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    peaks = []
    # A connection per request, but one TLS context for all: making it takes longer than the request.
    with httpx.Client(timeout=30, limits=httpx.Limits(max_keepalive_connections=0)) as client:
        for rounds in (30, 30, 30):  # the allocator takes what it needs for eight at once, and keeps some of it
            seen = []
            for _ in range(rounds):
                burst()
                seen.append(resident())
            peaks.append(max(seen))
    # 30 bursts bring 456 MB; what glibc keeps of eight bodies at once goes up and down by 60 MB, and does not grow.
    assert peaks[2] - peaks[1] < 60_000_000


def test_tokenizing_takes_small_bodies_and_has_a_deadline(server: Server) -> None:
    for path, field in (("/tokenize", "inputs"), ("/v1/tokenize", "prompt"), ("/v3/tokenize", "text")):
        refused = httpx.post(f"{server.url}{path}", json={field: "a " * 600_000}, timeout=30)
        assert refused.status_code in (400, 422)
        assert "send less at once" in refused.text


def test_bodies_count_until_they_are_answered(server: Server) -> None:
    long = {"inputs": ["sea " * 400_000]}  # 1.6 MB each, and 4 MB are allowed together

    def ask() -> None:
        statuses.append(httpx.post(f"{server.url}/embed", json=long, timeout=30).status_code)

    statuses: list[int] = []
    for _ in range(5):
        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(statuses) <= {200, 429}
    assert httpx.post(f"{server.url}/embed", json=long, timeout=30).status_code == 200  # all of it was given back


def test_trailers_without_end_are_refused(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(b"POST /embed HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n0\r\n")
        for _ in range(100_000):
            try:
                connection.sendall(b"a: b\r\n" * 100)
            except OSError:
                return
        raise AssertionError("600 MB of trailers were taken")


def test_a_stray_byte_does_not_keep_a_connection_open(server: Server) -> None:
    for stray in (b"\r\n", b"POST /nothing HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\nx"):
        with connect(server) as connection:
            connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert connection.recv(65536)
            connection.sendall(stray)
            start = time.monotonic()
            read_all(connection)
            assert time.monotonic() - start < 10


UPGRADE_HEAD = (
    "POST /embed HTTP/1.1\r\nhost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\n{upgrade}: h2c\r\n"
    "HTTP2-Settings: AAEAAEAAAAIAAAAA\r\ncontent-length: {size}\r\n\r\n"
)


@pytest.mark.parametrize("upgrade", ["upgrade", "Upgrade", "UPGRADE"])
@pytest.mark.parametrize("cuts", [[], [10], [90], [92], [94], [150], [10, 60, 90, 120, 170], [190], "head"], ids=str)
def test_an_upgrade_that_is_not_known_is_ignored_however_it_arrives(server: Server, upgrade: str, cuts: list[int] | str) -> None:
    body = b'{"inputs": ["the cat"]}'
    head = UPGRADE_HEAD.format(upgrade=upgrade, size=len(body)).encode()
    request = head + body
    places = [0, *([len(head)] if isinstance(cuts, str) else cuts), len(request)]
    with connect(server) as connection:
        for start, stop in pairwise(places):
            connection.sendall(request[start:stop])
            time.sleep(0.02)
        assert b" 200 " in connection.recv(65536).splitlines()[0]
        connection.sendall(request + request + b"GET /health/live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        answer = read_all(connection)
    assert answer.count(b"HTTP/1.1 200") == 3
    assert answer.endswith(b'{"live":true}')


@pytest.mark.parametrize("target", [b"/", b"*", b"http://a/b", b"a:80", b"a"])
def test_a_request_for_a_tunnel_is_refused(server: Server, target: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(b"CONNECT " + target + b" HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert read_all(connection).split(b" ")[1] in (b"400", b"404", b"405")
    assert httpx.get(f"{server.url}/health/live", timeout=5).status_code == 200


def test_many_requests_in_a_row_may_ask_for_an_upgrade(server: Server) -> None:
    ask = b"GET /health/live HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"
    with connect(server) as connection:
        connection.sendall(ask * 700 + ask.replace(b"connection: upgrade", b"connection: close"))
        assert read_all(connection).count(b"HTTP/1.1 200") == 701


def test_large_requests_may_follow_each_other_on_a_connection(server: Server) -> None:
    with httpx.Client() as http:
        for number in range(8):
            texts = [f"{number} " + "sea " * 50_000, "a", "b"]
            assert http.post(f"{server.url}/embed", json={"inputs": texts}, timeout=30).status_code == 200
            assert http.get(f"{server.url}/health/live").status_code == 200

            def chunks() -> Iterator[bytes]:
                yield b'{"inputs": "'
                for _ in range(20_000):
                    yield b"sea "
                yield b'"}'

            assert http.post(f"{server.url}/embed", content=chunks(), timeout=30).status_code == 200


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    body = json.dumps({"inputs": ["sea " * 20_000]}).encode()
    request = f"POST /embed HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
    with connect(server) as connection:
        connection.sendall(request + b"GET /health/live HTTP/1.1\r\nhost: loc")
        time.sleep(0.1)
        connection.sendall(b"alhost\r\n\r\n")
        answer = read_all(connection)
    assert answer.count(b"HTTP/1.1 200") == 2
    assert answer.endswith(b'{"live":true}')


def test_open_requests_get_503_when_the_drain_is_over() -> None:
    own = Server("--model", str(FOLDER), "--device", "cpu", "--drain", "0.1", "--timeout", "60", "--cache-mb", "0").wait_ready()
    statuses: list[int] = []

    def ask(number: int) -> None:
        texts = [f"{number} {index} " + "sea " * 40 for index in range(2048)]
        answer = httpx.post(f"{own.url}/embed", json={"inputs": texts}, timeout=60)
        statuses.append(answer.status_code)
        if answer.status_code != 200:
            assert set(answer.json()) == {"error", "error_type"}

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 30
    while time.monotonic() < end:  # until all of them are in, or answered
        texts = re.search(r'"texts":(\d+)', httpx.get(f"{own.url}/health").text)
        assert texts is not None
        if int(texts[1]) + 2048 * len(statuses) >= 2048 * len(threads):
            break
    own.process.terminate()
    for thread in threads:
        thread.join()
    assert own.stop() == 0
    assert len(statuses) == 6  # nobody is without an answer
    assert set(statuses) <= {200, 429, 503}  # 429: refused at the door
    assert 503 in statuses


@pytest.mark.slow
def test_a_successor_on_the_same_socket_stays_reachable(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    flags = ["--model", str(FOLDER), "--device", "cpu", "--uds", str(path)]
    first = Server(*flags).wait_ready(r"npu-proxy ready: (unix:\S+)")
    path.unlink()
    second = Server(*flags).wait_ready(r"npu-proxy ready: (unix:\S+)")
    assert first.stop() == 0
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as http:
        assert http.get("http://any.name/health").status_code == 200
    assert second.stop() == 0
    assert not path.exists()
