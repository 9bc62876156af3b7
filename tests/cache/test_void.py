"""What a device wrote before it was found to be wrong is void: in memory, in every tier, and in all processes that share it."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import GOLDEN
from npu_proxy import Engine, Settings
from npu_proxy.batch import Batch, Output
from npu_proxy.cache.disk import DiskTier
from npu_proxy.cache.entry import from_bytes, origins_from_bytes, origins_to_bytes, to_bytes
from npu_proxy.cache.tier import VOID_KEY, TierStats
from npu_proxy.cache.vectors import VectorCache
from npu_proxy.devices.failure import BatchError, Failure
from npu_proxy.devices.fake import FakeDevice
from npu_proxy.devices.fallback import Fallback
from npu_proxy.engine.components import EngineComponents
from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.models.layout import read_spec
from npu_proxy.types import TextResult

SPEC = read_spec(GOLDEN / "mean")


class Shared:
    """A tier in this process that several caches use, as replicas use a server."""

    name = "shared"

    def __init__(self, content: dict[bytes, bytes]) -> None:
        self.content = content

    def open(self) -> None:
        pass

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [self.content.get(key) for key in keys]

    def put_many(self, items: Sequence[tuple[bytes, bytes]]) -> None:
        self.content.update(items)

    def void(self, origins: bytes) -> None:
        self.content[VOID_KEY] = self.content.get(VOID_KEY, b"") + origins

    def stats(self) -> TierStats:
        raise NotImplementedError

    def clear(self, fingerprint: str | None) -> int:
        raise NotImplementedError

    def close(self) -> None:
        pass


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def key_of(number: int) -> bytes:
    return number.to_bytes(48, "big")


def entry(number: int, origin: int) -> TextResult:
    return TextResult(np.full(4, number, np.float32), 3, False, "npu", origin=origin)


@given(st.integers(0, 2**64 - 1), st.text(max_size=300))
def test_an_entry_keeps_its_origin_and_those_of_earlier_versions_have_none(origin: int, device: str) -> None:
    kept = from_bytes(to_bytes(TextResult(np.ones(4, np.float32), 3, True, device, origin=origin)))
    assert kept is not None
    assert (kept.origin, kept.tokens, kept.truncated) == (origin, 3, True)
    assert device.startswith(kept.device.rstrip("\ufffd"))


@given(st.lists(st.integers(0, 2**63), max_size=20), st.lists(st.integers(0, 2**63), max_size=20))
def test_void_origins_of_several_writers_follow_one_another(one: list[int], two: list[int]) -> None:
    assert origins_from_bytes(origins_to_bytes(one) + origins_to_bytes(two)) == {*one, *two}
    assert origins_from_bytes(None) == frozenset()


actions = st.lists(
    st.tuples(st.sampled_from(["keep", "void", "read", "share"]), st.integers(0, 1), st.integers(1, 4), st.integers(0, 5)),
    max_size=40,
)


@settings(max_examples=25, deadline=None)
@given(actions)
def test_no_history_of_two_replicas_gives_a_void_vector(history: list[tuple[str, int, int, int]]) -> None:
    content: dict[bytes, bytes] = {}
    void_for: list[set[int]] = [set(), set()]
    """Origins that each replica must know to be void."""
    shared: set[int] = set()
    written: dict[int, int] = {}
    """The last origin that was kept under a key, in any replica."""
    with VectorCache(memory=10**6, tiers=[Shared(content)]) as one, VectorCache(memory=10**6, tiers=[Shared(content)]) as two:
        caches = (one, two)
        for action, number, origin, key in history:
            cache = caches[number]
            if action == "keep":
                cache.keep(key_of(key), entry(key, origin))
                if origin not in void_for[number]:
                    written[key] = origin
            elif action == "void":
                cache.void([origin])
                void_for[number].add(origin)
            elif action == "share":
                cache._share_voids()
                shared |= void_for[number]
                void_for[number] |= shared
            else:
                found = cache.recall([key_of(key)])[0]
                assert found is None or found.origin not in void_for[number]
                found = cache.fetch([key_of(key)], 0.0)[0]
                void_for[number] |= shared  # a lookup tells what the tier knows
                assert found is None or found.origin not in void_for[number]
        for number, cache in enumerate(caches):
            for key, origin in written.items():
                found = cache.recall([key_of(key)])[0]
                if found is not None:
                    assert found.origin not in void_for[number], (key, origin)


def test_what_was_written_before_is_gone_everywhere_and_what_comes_after_is_kept() -> None:
    content: dict[bytes, bytes] = {}
    with VectorCache(memory=10**6, tiers=[Shared(content)]) as one, VectorCache(memory=10**6, tiers=[Shared(content)]) as two:
        for number in range(10):
            one.keep(key_of(number), entry(number, origin=7 + number % 2))
        until(lambda: len(content) == 10)
        assert all(two.fetch([key_of(number) for number in range(10)], 0.0))
        one.void([7])
        assert [found is None for found in one.recall([key_of(0), key_of(1)])] == [True, False]
        until(lambda: two.recall([key_of(0)]) == [None])  # within a second, without a lookup
        assert two.recall([key_of(1)])[0] is not None
        for cache in (one, two):
            assert [found is None for found in cache.fetch([key_of(0), key_of(1)], 0.0)] == [True, False]
        one.keep(key_of(0), entry(0, origin=7))  # it was being computed
        assert one.recall([key_of(0)]) == [None]
        one.keep(key_of(0), entry(0, origin=9))
        assert one.recall([key_of(0)])[0] is not None
        assert one.counts().voided >= 6
        del content[VOID_KEY]  # a server may evict it
        until(lambda: origins_from_bytes(content.get(VOID_KEY)) == {7})


def test_a_disk_keeps_void_origins_over_restarts_and_full_generations(tmp_path: Path) -> None:
    with VectorCache(memory=0, tiers=[DiskTier(tmp_path, 10**6)]) as cache:
        cache.keep(key_of(1), entry(1, origin=7))
        until(lambda: cache.counts().written == 1)
        cache.void([7])
        for number in range(100, 4000):  # several generations
            cache.keep(key_of(number), entry(number, origin=9))
            if number % 500 == 0:
                written = number - 98
                until(lambda written=written: cache.counts().written + cache.counts().dropped >= written)
    with VectorCache(memory=0, tiers=[DiskTier(tmp_path, 10**6)]) as cache:
        until(lambda: 7 in cache._void)
        cache.keep(key_of(1), entry(1, origin=7))
        cache.keep(key_of(2), entry(2, origin=9))
        until(lambda: cache.fetch([key_of(2)], 0.0)[0] is not None)
        assert cache.fetch([key_of(1)], 0.0) == [None]


def test_a_device_that_was_wrong_and_is_right_again_does_not_answer_from_memory() -> None:
    class Sick(FakeDevice):
        state = "right"

        def infer(self, batch: Batch) -> Output:
            if self.state == "found":
                self.state = "right"
                raise BatchError(Failure.CANARY, "a canary is wrong")
            output = super().infer(batch)
            return Output(-output.vectors if self.state == "wrong" else output.vectors, output.device, output.seconds)

    device = Sick(width=SPEC.width)
    made = EngineComponents(spec=SPEC, tokenizer=RequestTokenizer(SPEC), device=Fallback([device], probe_every=0, max_retries=1))
    with Engine(settings=Settings(), components=lambda _settings, _stopping: made) as engine:
        right = engine.embed(["the cat"])
        device.state = "wrong"
        wrong = engine.embed(["the dog"])
        np.testing.assert_array_equal(engine.embed(["the dog"]), wrong)  # nobody knows yet
        device.state = "found"
        engine.embed(["the moon"])
        assert engine.cache is not None
        assert engine.cache.counts().voided >= 2
        np.testing.assert_array_equal(engine.embed(["the dog"]), -wrong)
        np.testing.assert_array_equal(engine.embed(["the cat"]), right)
