"""Slots: taken once, a wanted one before all others, woken when the pool closes; and who agrees with whom."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from npu_proxy.devices.examined import WINDOW_SECONDS, Examined
from npu_proxy.devices.slots import SlotPool, agreeing, slots_that_fit


def pool_of(*slots: str) -> SlotPool[str]:
    pool: SlotPool[str] = SlotPool()
    for slot in slots:
        pool.put(slot)
    return pool


def test_the_slot_used_last_is_taken_first_and_none_twice() -> None:
    pool = pool_of("a", "b")
    assert pool.take(0) == "b"
    assert pool.take(0) == "a"
    assert pool.take(0.01) is None
    pool.put("a")
    assert pool.take(0, "another") is None
    assert pool.take(0) == "a"


def test_threads_get_slots_in_the_order_in_which_they_ask() -> None:
    pool = pool_of()
    order: list[int] = []

    def ask(number: int) -> None:
        slot = pool.take(10)
        assert slot is not None
        order.append(number)
        pool.put(slot)

    with ThreadPoolExecutor(5) as threads:
        for number in range(5):
            threads.submit(ask, number)
            time.sleep(0.02)
        pool.put("a")
    assert order == [0, 1, 2, 3, 4]


def test_who_waits_for_a_certain_slot_gets_it_even_under_load() -> None:
    first, second = "first", "second"
    pool = pool_of(first, second)
    going = threading.Event()

    def load() -> None:
        while not going.is_set():
            slot = pool.take(1)
            if slot is not None:
                time.sleep(0.0005)
                pool.put(slot)

    with ThreadPoolExecutor(6) as threads:
        for _ in range(6):
            threads.submit(load)
        found = []
        for wanted in (first, second) * 20:
            slot = pool.take(5, wanted)
            found.append(slot is wanted)
            if slot is not None:
                pool.put(slot)
        going.set()
    assert all(found)


def test_closing_wakes_all() -> None:
    pool = pool_of()
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(pool.take, 30), threads.submit(pool.take, 30, "a")]
        time.sleep(0.05)
        begun = time.monotonic()
        pool.close()
        assert [future.result(5) for future in waiting] == [None, None]
        assert time.monotonic() - begun < 5
    assert pool.closed
    pool.put("a")
    assert pool.take(1) is None


@given(st.lists(st.integers(0, 2), min_size=1, max_size=9))
def test_the_largest_group_agrees(kinds: list[int]) -> None:
    found = agreeing([[a == b for b in kinds] for a in kinds])
    assert len({kinds[index] for index in found}) == 1
    assert len(found) == max(kinds.count(kind) for kind in kinds)
    assert found == [index for index, kind in enumerate(kinds) if kind == kinds[found[0]]]


def test_nothing_agrees_with_nothing_but_itself() -> None:
    assert agreeing([]) == []
    assert agreeing([[False, False], [False, False]]) == [0]  # NaN is not even similar to itself


def test_copies_of_large_weights_take_a_quarter_of_the_memory() -> None:
    assert slots_that_fit(16, 90_000_000, 24_000_000_000) == 16
    assert slots_that_fit(16, 1_300_000_000, 16_000_000_000) == 3
    assert slots_that_fit(16, 13_000_000_000, 16_000_000_000) == 1
    assert slots_that_fit(4, 0, 16_000_000_000) == 4


def test_slots_and_shapes_are_examined_in_turn() -> None:
    examined = Examined([(slot, shape) for slot in "ab" for shape in (1, 2)])
    assert examined.share() == 0
    seen = []
    for _ in range(6):
        key = examined.next()
        assert key is not None
        seen.append(key)
        examined.mark(key)
    assert sorted(seen[:4]) == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert seen[4:] == seen[:2]
    assert examined.share() == 1
    examined.drop(("a", 1))
    examined._times[("a", 2)] -= WINDOW_SECONDS + 1
    assert examined.share() == 2 / 3
    assert Examined[int]().next() is None
    assert Examined[int]().share() == 0
