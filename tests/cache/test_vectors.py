"""The cache as the engine uses it: the same vectors with and without it, whatever was asked for, and never an error of its own."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import SMALL_SHAPES, fake_engine, golden
from npu_proxy import Client, EmbedRequest, Engine, Settings, SettingsError
from npu_proxy.cache.disk import DiskTier
from npu_proxy.cache.entry import to_bytes
from npu_proxy.cache.tier import VOID_KEY, TierError, TierStats
from npu_proxy.cache.vectors import VectorCache
from npu_proxy.devices.fake import FakeDevice
from npu_proxy.types import TextResult, Truncate

FOLDER, TEXTS, VECTORS = golden("mean")


def entry(number: float) -> TextResult:
    return TextResult(np.full(8, number, np.float32), 3, truncated=False, device="cpu")


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.01)


def disk_of(engine: Engine) -> DiskTier:
    assert engine.cache is not None
    tier = engine.cache._tiers[0]
    assert isinstance(tier, DiskTier)
    return tier


def test_every_shape_is_cut_from_one_entry() -> None:
    with (
        Engine(settings=Settings(model=(str(FOLDER),), device="cpu")) as engine,
        Engine(str(FOLDER), "cpu", Settings(cache_mb=0)) as bare,
    ):
        engine.embed(TEXTS)
        variants: list[dict[str, Any]] = [
            {},
            {"dimensions": 8},
            {"normalize": False},
            {"dtype": "int8"},
            {"dtype": "base64", "dimensions": 4},
        ]
        for options in variants:
            np.testing.assert_array_equal(engine.embed(TEXTS, **options), bare.embed(TEXTS, **options))
        assert engine.stats().counters.texts == len(set(TEXTS))
        result = engine.submit(EmbedRequest(texts=[*TEXTS, "a new text"])).result()
        assert result.cached == len(TEXTS)
        assert set(result.devices) == {"cpu"}
        again = engine.submit(EmbedRequest(texts=TEXTS)).result()
        assert (again.cached, again.tokens, again.truncated) == (len(TEXTS), result.tokens[:-1], result.truncated[:-1])
        assert engine.submit(EmbedRequest(texts=TEXTS, prompt_name="query")).result().cached == 0
        assert engine.submit(EmbedRequest(texts=TEXTS, max_tokens=4)).result().cached == 0


def test_errors_are_not_cached_and_cut_texts_say_so_again() -> None:
    long = "sea " * 90
    with fake_engine(FakeDevice(width=32, shapes=SMALL_SHAPES)) as engine:
        for cached in (0, 1):
            result = engine.submit(EmbedRequest(texts=[long, ""])).result()
            assert (result.cached, result.truncated[0]) == (cached, True)
            assert result.errors[1] is not None
        assert engine.submit(EmbedRequest(texts=[long], truncate=Truncate.ERROR)).result().errors[0] is not None


def test_a_disk_is_shared_by_engines_one_after_another(tmp_path: Path) -> None:
    settings = Settings(model=(str(FOLDER),), device="cpu", cache_disk_mb=10, cache_folder=tmp_path)
    with Engine(settings=settings) as first:
        expected = first.embed(TEXTS)
    with Engine(settings=settings) as second:
        assert second.cache is not None
        cache, disk = second.cache, disk_of(second)
        until(lambda: cache.fetch([b"?" * 48], 0.0) is not None and disk._env is not None)
        np.testing.assert_array_equal(second.embed(TEXTS), expected)
        assert second.stats().counters.texts == 0
        assert second.cache.counts().hits["disk"] == len(TEXTS)
    other = Settings(model=(str(FOLDER),), device="cpu", cache_disk_mb=10, cache_folder=tmp_path, cache_prefix=("other",))
    with Engine(settings=other) as third:
        third.embed(TEXTS)
        assert third.stats().counters.texts == len(set(TEXTS))


def until_open(engine: Engine) -> None:
    cache, disk = engine.cache, disk_of(engine)
    assert cache is not None
    until(lambda: cache.fetch([b"?" * 48], 0.0) is not None and disk._env is not None)


WRONG = [np.zeros(31), np.zeros(64), np.zeros((1, 32)), np.full(32, np.nan), np.full(32, np.inf), np.zeros(0)]


@pytest.mark.parametrize("wrong", WRONG)
def test_an_entry_that_cannot_be_the_models_is_computed_again_and_replaced(tmp_path: Path, wrong: np.ndarray) -> None:
    """Its checksum is right: another program, or a fault of this one, wrote it."""
    settings = Settings(model=(str(FOLDER),), device="cpu", cache_disk_mb=10, cache_folder=tmp_path)
    with Engine(settings=settings) as first:
        expected = first.embed(TEXTS[:3])
    disk = DiskTier(tmp_path, 10_000_000)
    disk.open()
    with disk._env.begin() as read:
        keys = [key for name in disk._databases.values() for key in read.cursor(name).iternext(keys=True, values=False)]
    disk.put_many([(key, to_bytes(TextResult(wrong.astype(np.float32), 4, truncated=False, device="cpu"))) for key in keys])
    disk.close()
    for computed in (len(set(TEXTS[:3])), 0):
        with Engine(settings=settings) as second:
            assert second.cache is not None
            until_open(second)
            np.testing.assert_allclose(second.embed(TEXTS[:3]), expected, atol=1e-6)
            assert second.stats().counters.texts == computed
            assert second.cache.counts().errors == computed


class Broken:
    """A tier that fails, hangs for a while, or answers nonsense."""

    name = "broken"

    def __init__(self, how: str) -> None:
        self.how = how
        self.asked = 0

    def open(self) -> None: ...

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        self.asked += list(keys) != [VOID_KEY]
        if self.how == "fails":
            raise TierError("no such server")
        return [b"nonsense"] * len(keys)

    def void(self, origins: bytes) -> None:
        raise TierError("no")

    def put_many(self, items: Sequence[tuple[bytes, bytes]]) -> None:
        if self.how == "fails":
            raise TierError("no such server")
        raise ZeroDivisionError

    def stats(self) -> TierStats:
        raise TierError("no")

    def clear(self, fingerprint: str | None) -> int:
        return 0

    def close(self) -> None: ...


@pytest.mark.parametrize("how", ["fails", "nonsense"])
def test_a_broken_tier_is_never_a_request_s_trouble(how: str) -> None:
    tier = Broken(how)
    with VectorCache(memory=0, tiers=[tier]) as cache, fake_engine(FakeDevice(width=32, shapes=SMALL_SHAPES)) as engine:
        assert engine._pipeline is not None
        engine._cache, engine._pipeline._cache = cache, cache
        for number in range(30):
            assert engine.embed([f"text {number}"]).shape == (1, 32)
        if how == "fails":
            assert tier.asked <= 3  # it rests after a failure
            assert cache.counts().errors >= 1
            assert cache.counts().bypassed >= 27
        until(lambda: cache.counts().dropped > 0)


def test_memory_keeps_what_was_used_last() -> None:
    with VectorCache(memory=10 * 532) as cache:
        for number in range(10):
            cache.keep(bytes([number]), entry(number))
        cache.recall([b"\0"])
        cache.keep(b"new", entry(1))
        assert [found is not None for found in cache.recall([b"\0", b"\1", b"\2", b"new"])] == [True, False, True, True]
        counts = cache.counts()
        assert (counts.entries, counts.hits["memory"], counts.misses) == (10, 4, 1)


def test_a_flood_of_new_entries_is_dropped_and_not_kept_waiting(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 1_000_000)
    release = threading.Event()

    def wait() -> None:
        release.wait(20)

    tier.open = wait  # another process holds the lock
    with VectorCache(memory=0, tiers=[tier]) as cache:
        start = time.monotonic()
        for number in range(5000):
            cache.keep(number.to_bytes(48, "big"), entry(number))
        assert time.monotonic() - start < 10
        assert cache.counts().dropped >= 900
        del tier.open
        release.set()
        until(lambda: cache.counts().written >= 4000)


class Surprising(Broken):
    """A tier whose library raises what nobody expects, already when it is opened."""

    def open(self) -> None:
        raise TypeError("foo")

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        raise TypeError("foo")


def test_what_a_tier_s_library_raises_ends_neither_a_request_nor_the_writer() -> None:
    with VectorCache(memory=0, tiers=[Surprising("fails")]) as cache:
        assert cache.fetch([b"k" * 48], 0.0) == [None]
        cache.keep(b"k" * 48, entry(1))
        until(lambda: cache.counts().dropped > 0)
        assert cache._writer is not None
        assert cache._writer.is_alive()


class Slow(Broken):
    """A tier far slower than the device; what is written to it is counted."""

    def __init__(self) -> None:
        super().__init__("slow")
        self.kept = 0

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        self.asked += list(keys) != [VOID_KEY]
        threading.Event().wait(0.02)
        return [None] * len(keys)

    def put_many(self, items: Sequence[tuple[bytes, bytes]]) -> None:
        self.kept += len(items)


def test_a_slow_tier_is_not_asked_but_filled() -> None:
    tier = Slow()
    with VectorCache(memory=0, tiers=[tier]) as cache:
        for number in range(50):
            key = number.to_bytes(48, "big")
            cache.fetch([key], compute_seconds=0.001)
            cache.keep(key, entry(number))
        until(lambda: tier.kept == 50)
        assert tier.asked == 1
        assert cache.counts().bypassed == 49


def test_what_memory_answers_often_is_written_again() -> None:
    tier = Slow()
    with VectorCache(memory=10_000, tiers=[tier]) as cache:
        cache.keep(b"often" * 9, entry(1))
        until(lambda: tier.kept == 1)
        for _ in range(200):
            cache.recall([b"often" * 9])
        until(lambda: tier.kept >= 2)


def test_an_engine_whose_cache_cannot_be_opened_closes_its_device() -> None:
    device = FakeDevice(width=32, shapes=SMALL_SHAPES)
    engine = fake_engine(device, cache_url="http://nonsense")
    with pytest.raises(SettingsError):
        engine.start()
    assert device.closed


def test_texts_that_the_disk_knows_are_not_refused_for_a_long_queue(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(3000)]
    settings: dict[str, Any] = {"cache_disk_mb": 50, "cache_folder": tmp_path, "cache_mb": 0}
    with fake_engine(FakeDevice(width=32, shapes=SMALL_SHAPES), **settings) as first:
        first.embed(texts)
    slow = FakeDevice(width=32, shapes=SMALL_SHAPES, seconds=0.2)
    with fake_engine(slow, **settings) as second:
        disk = disk_of(second)
        until(lambda: disk._env is not None)
        second.embed(["a text to tell how slow it is"])
        deadline = time.monotonic() + 20
        futures = [
            second.submit(EmbedRequest(texts=texts[start : start + 500], deadline=deadline)) for start in range(0, 3000, 500)
        ]
        assert [future.result(30).cached for future in futures] == [500] * 6


def test_clients_share_vectors_unless_the_scope_is_the_key() -> None:
    """From a hit, or from its time, a client learns that another embedded the same text."""
    mine, other = Client(name="key mine"), Client(name="key other")
    for scope, expected in (("server", [0, 3, 3]), ("key", [0, 0, 3])):
        settings = Settings(model=(str(FOLDER),), device="cpu", cache_scope=scope)  # type: ignore[arg-type]
        with Engine(settings=settings) as engine:
            found = [engine.submit(EmbedRequest(texts=["a", "b", "c"], client=client)).result() for client in (mine, other, mine)]
        assert [result.cached for result in found] == expected
