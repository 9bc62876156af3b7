"""The queue's decisions: lanes, aging, merging, dropping."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_proxy.batch import BatchShape, Encoding
from npu_proxy.engine.admission import Throughput, expected_wait
from npu_proxy.engine.pending import PendingRequest
from npu_proxy.engine.queue import JobQueue, next_lane
from npu_proxy.types import EmbedRequest, Lane

SHAPES = [BatchShape(bins=1, positions=64, segments=8)]


def pending(deadline: float = 1e9, gone: bool = False) -> PendingRequest:
    return PendingRequest(EmbedRequest(texts=["x"]), deadline, 0.0, lambda request: None, lambda: gone)


def encoding(*ids: int) -> Encoding:
    return Encoding(np.array(ids, np.int32), truncated=False)


@given(
    now=st.floats(0, 100),
    oldest=st.none() | st.floats(0, 100),
    last=st.floats(0, 100),
    aging=st.floats(0.01, 10),
    interactive=st.booleans(),
)
def test_lanes(now: float, oldest: float | None, last: float, aging: float, interactive: bool) -> None:
    lane = next_lane(now=now, oldest_bulk=oldest, last_bulk=last, aging=aging, interactive=interactive)
    if lane is Lane.BULK:
        assert oldest is not None
        assert not interactive or now - max(oldest, last) >= aging
    elif lane is Lane.INTERACTIVE:
        assert interactive
        assert oldest is None or now - max(oldest, last) < aging
    else:
        assert oldest is None
        assert not interactive


@pytest.mark.slow
@given(st.lists(st.integers(20, 64), min_size=1, max_size=60), st.integers(1, 40))
def test_aging_keeps_bulk_moving_under_endless_interactive_load(lengths: list[int], arrivals: int) -> None:
    queue = JobQueue(aging=1.0, window=64)
    bulk = [queue.add(encoding(*range(1000 * i, 1000 * i + n)), pending(), 0, Lane.BULK, 0.0) for i, n in enumerate(lengths)]
    fresh, now = 1_000_000, 0.0
    while not all(job.started for job in bulk):
        now += 0.1
        for _ in range(arrivals):  # far more than one batch takes
            fresh += 100
            queue.add(encoding(*range(fresh, fresh + 60)), pending(), 0, Lane.INTERACTIVE, now)
        taken = queue.take(SHAPES, now)
        assert taken is not None
        assert now < 1.2 * (len(lengths) + 2)  # at least one bulk job per second of aging


def test_interactive_goes_first_and_bulk_fills_up() -> None:
    queue = JobQueue(aging=10.0, window=64)
    bulk = queue.add(encoding(1, 2), pending(), 0, Lane.BULK, 0.0)
    other = queue.add(encoding(*range(60)), pending(), 0, Lane.BULK, 0.0)
    quick = queue.add(encoding(3, 4), pending(), 0, Lane.INTERACTIVE, 1.0)
    taken = queue.take(SHAPES, 1.0)
    assert taken is not None
    jobs, plan = taken
    assert jobs[0] is quick
    assert {jobs[index] for index in plan.indices} == {quick, other, bulk}


def test_equal_texts_in_flight_share_a_job_and_its_result_is_for_all() -> None:
    queue = JobQueue(aging=1.0, window=64)
    first, second, third = pending(), pending(), pending()
    job = queue.add(encoding(5, 6), first, 0, Lane.BULK, 0.0)
    assert queue.add(encoding(5, 6), second, 0, Lane.INTERACTIVE, 0.0) is job
    assert job.lane is Lane.INTERACTIVE
    assert queue.depth.texts == 1
    queue.take(SHAPES, 0.0)
    assert queue.add(encoding(5, 6), third, 0, Lane.BULK, 0.0) is job
    assert [request for request, _ in queue.finish(job)] == [first, second, third]
    assert queue.add(encoding(5, 6), first, 0, Lane.BULK, 0.0) is not job
    assert queue.merged == 2


def test_jobs_that_nobody_waits_for_cost_no_inference() -> None:
    queue = JobQueue(aging=1.0, window=64)
    queue.add(encoding(1), pending(gone=True), 0, Lane.BULK, 0.0)
    queue.add(encoding(2), pending(deadline=5.0), 0, Lane.BULK, 0.0)
    assert queue.take(SHAPES, 6.0) is None
    assert queue.depth.texts == queue.depth.tokens == 0


def test_a_merged_job_lives_while_anybody_waits() -> None:
    queue = JobQueue(aging=1.0, window=64)
    queue.add(encoding(1), pending(gone=True), 0, Lane.BULK, 0.0)
    queue.add(encoding(1), pending(), 0, Lane.BULK, 0.0)
    assert queue.take(SHAPES, 6.0) is not None


@given(
    st.dictionaries(st.sampled_from(list(Lane)), st.integers(0, 10_000), min_size=2),
    st.dictionaries(st.sampled_from(list(Lane)), st.integers(0, 100), min_size=2),
    st.floats(0, 100),
    st.floats(0, 1e5),
)
def test_bulk_waits_at_least_as_long_as_interactive_and_more_work_never_less(
    tokens: dict, untokenized: dict, mean: float, speed: float
) -> None:
    interactive, bulk = (expected_wait(lane, tokens, untokenized, mean, speed) for lane in Lane)
    assert 0 <= interactive <= bulk
    more = {**tokens, Lane.INTERACTIVE: tokens[Lane.INTERACTIVE] + 100}
    assert expected_wait(Lane.INTERACTIVE, more, untokenized, mean, speed) >= interactive
    if speed == 0:
        assert bulk == 0  # nothing is known, nothing is refused


def test_the_speed_is_that_of_the_last_batches() -> None:
    speed = Throughput()
    assert (speed.tokens_per_second, speed.tokens_per_text) == (0, 0)
    for _ in range(500):
        speed.add(tokens=100, texts=10, seconds=1.0)
    for _ in range(200):
        speed.add(tokens=500, texts=10, seconds=0.5)
    assert 900 < speed.tokens_per_second < 1000
    assert 45 < speed.tokens_per_text < 50
