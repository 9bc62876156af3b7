"""The queue's decisions: turns of clients, lanes, sizes, aging, merging, dropping."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_proxy.batch import BatchShape, Encoding
from npu_proxy.engine.fair_queue import FairQueue, Rank, rank_of
from npu_proxy.engine.pending import PendingRequest
from npu_proxy.engine.queue import JobQueue
from npu_proxy.errors import DeadlineError
from npu_proxy.types import NO_CLIENT, Client, EmbedRequest, Lane

SHAPES = [BatchShape(bins=1, positions=64, segments=8)]
ROW = 64


def pending(
    deadline: float = 1e9, *, lane: Lane = Lane.BULK, tokens: int = 2, client: Client = NO_CLIENT, gone: bool = False
) -> PendingRequest:
    """A request of one text. tokens: how large it claims to be."""
    request = EmbedRequest(texts=["x"], client=client)
    made = PendingRequest(request, deadline, 0.0, lambda request: None, rank_of(lane, tokens))
    if gone:
        made.fail(0, DeadlineError("gone"))
    return made


def encoding(*ids: int) -> Encoding:
    return Encoding(np.array(ids, np.int32), truncated=False)


# -- between clients -----------------------------------------------------------------------------------------------------


def serve(queue: FairQueue[object], tokens: int, now: float = 0.0) -> list[object]:
    """Start the next items, up to so many tokens, as a batch does."""
    batch: list[object] = []
    while tokens > 0 and (items := queue.first(1, now)):
        if not batch:
            queue.lead(items[0], now)
        tokens -= queue._entries[items[0]].tokens
        queue.start(items[0])
        batch.append(items[0])
    return batch


clients = st.lists(
    st.tuples(st.sampled_from([1, 8, 64]), st.sampled_from([0.5, 1.0, 2.0]), st.integers(5, 200)), min_size=2, max_size=5
)


@given(clients, st.integers(20, 500))
def test_clients_get_tokens_by_their_weights_however_many_items_they_have_waiting(
    shares: list[tuple[int, float, int]], turns: int
) -> None:
    queue: FairQueue[object] = FairQueue(aging=1e9)
    names = [Client(name=str(number), weight=weight) for number, (_, weight, _) in enumerate(shares)]
    served: Counter[str] = Counter()
    owners: dict[object, tuple[Client, int]] = {}

    def push(client: Client, tokens: int, rank: Rank) -> None:
        item = object()
        owners[item] = (client, tokens)
        queue.push(item, client, rank, tokens, 0.0)

    for client, (waiting, _, tokens) in zip(names, shares, strict=True):
        for _ in range(waiting):
            push(client, tokens, (False, waiting % 3))
    for _ in range(turns):
        for item in serve(queue, 1):
            client, tokens = owners[item]
            served[client.name] += tokens
            push(client, tokens, (False, tokens % 3))  # each client always has as many waiting
    lags = [served[client.name] / client.weight for client in names]
    assert max(lags) - min(lags) <= 2 * 200 / 0.5  # two items of the largest size, at the smallest weight


@given(st.integers(1, 500), st.integers(1, 30))
def test_a_client_that_joins_is_next_whatever_the_backlog_of_the_others(backlog: int, others: int) -> None:
    queue: FairQueue[object] = FairQueue(aging=1e9)
    for number in range(others):
        for _ in range(backlog):
            queue.push(object(), Client(name=str(number)), (False, 0), 100, 0.0)
    serve(queue, 5 * 100)
    mine = object()
    queue.push(mine, Client(name="new"), (True, 9), 100, 0.0)
    turns = 0
    while mine in queue:
        serve(queue, 1)
        turns += 1
    assert turns <= others + 1


def test_a_client_may_catch_up_on_a_moment_of_silence_but_not_on_an_hour() -> None:
    queue: FairQueue[object] = FairQueue(aging=1e9)
    quiet, busy = Client(name="quiet"), Client(name="busy")
    queue.push(object(), quiet, (False, 0), 100, 0.0)
    for _ in range(1000):
        queue.push(object(), busy, (False, 0), 100, 0.0)
    for _ in range(100):
        serve(queue, 500)
    mine = [object() for _ in range(200)]
    for item in mine:
        queue.push(item, quiet, (False, 0), 100, 0.0)
    order = queue.first(150, 0.0)
    in_a_row = next(number for number, item in enumerate(order) if item not in mine)
    assert 40 <= in_a_row <= 47  # 4,096 tokens, and up to a batch more
    assert sum(item in mine for item in order[in_a_row:]) == pytest.approx((150 - in_a_row) / 2, abs=2)


def test_clocks_of_clients_that_left_are_forgotten() -> None:
    queue: FairQueue[object] = FairQueue(aging=1.0)
    for number in range(5000):
        item = object()
        queue.push(item, Client(name=str(number)), (False, 0), 10, 0.0)
        queue.start(item)
    assert len(queue._clocks) < 1100


# -- within a client -----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(list(Lane)), st.integers(1, 5000)), min_size=1, max_size=60))
def test_the_order_within_a_client_is_lane_then_size_then_arrival(items: list[tuple[Lane, int]]) -> None:
    queue: FairQueue[int] = FairQueue(aging=1e9)
    for number, (lane, tokens) in enumerate(items):
        queue.push(number, NO_CLIENT, rank_of(lane, tokens), tokens, float(number))
    assert queue.tokens == sum(tokens for _, tokens in items)
    assert queue.oldest() == 0.0
    order: list[int] = []
    while batch := queue.first(60, 1e6):
        # What may be served with it is the rest, whatever its size, by lane and age.
        left = [number for number in range(len(items)) if number not in order and number != batch[0]]
        assert batch[1:] == sorted(left, key=lambda number: (items[number][0] is Lane.BULK, number))
        queue.start(batch[0])
        order.append(batch[0])
    assert order == sorted(range(len(items)), key=lambda number: (rank_of(*items[number]), number))


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_sizes_within_a_factor_of_two_are_at_most_one_class_apart_and_a_short_query_is_below_a_passage(one: int, two: int) -> None:
    (_, first), (_, second) = rank_of(Lane.BULK, min(one, two)), rank_of(Lane.BULK, max(one, two))
    assert first <= second
    if max(one, two) <= 2 * min(one, two):
        assert second - first <= 1
    assert rank_of(Lane.BULK, 12) < rank_of(Lane.BULK, 180) < rank_of(Lane.BULK, 256 * 180)
    assert rank_of(Lane.INTERACTIVE, 10**6) < rank_of(Lane.BULK, 1)


@given(st.lists(st.tuples(st.sampled_from(list(Lane)), st.integers(1, 64)), min_size=1, max_size=40), st.integers(1, 40))
def test_aging_starts_the_oldest_job_at_least_once_per_period_under_endless_smaller_requests(
    jobs: list[tuple[Lane, int]], arrivals: int
) -> None:
    queue = JobQueue(aging=1.0, window=64)
    old = [
        queue.add(encoding(*range(1000 * i, 1000 * i + n)), pending(lane=lane, tokens=100 * n), 0, 0.0)
        for i, (lane, n) in enumerate(jobs)
    ]
    fresh, now = 1_000_000, 0.0
    while not all(job.started for job in old):
        now += 0.1
        for _ in range(arrivals):
            fresh += 100
            queue.add(encoding(*range(fresh, fresh + 60)), pending(lane=Lane.INTERACTIVE, tokens=1), 0, now)
        assert queue.take(SHAPES, now) is not None
        assert now < 1.2 * (len(jobs) + 2)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=30), st.integers(1, 30))
def test_a_lone_short_query_is_in_one_of_the_next_two_batches(ages: list[int], backlog: int) -> None:
    queue = JobQueue(aging=1.0, window=64)
    for number in range(20 * backlog):
        queue.add(encoding(*range(100 * number, 100 * number + 50)), pending(lane=Lane.INTERACTIVE, tokens=180), 0, 0.0)
    now = 0.0
    for age in ages:
        now += age
        queue.take(SHAPES, now)
    query = queue.add(encoding(7, 8, 9), pending(lane=Lane.BULK, tokens=3), 0, now)
    other = queue.add(encoding(7, 8), pending(lane=Lane.INTERACTIVE, tokens=3), 0, now)
    for _ in range(2):
        queue.take(SHAPES, now)
    assert other.started
    assert query.started or any(job.rank < query.rank for job in queue._waiting)


def test_interactive_goes_first_and_bulk_fills_up() -> None:
    queue = JobQueue(aging=10.0, window=64)
    bulk = queue.add(encoding(1, 2), pending(), 0, 0.0)
    other = queue.add(encoding(*range(60)), pending(), 0, 0.0)
    quick = queue.add(encoding(3, 4), pending(lane=Lane.INTERACTIVE), 0, 1.0)
    taken = queue.take(SHAPES, 1.0)
    assert taken is not None
    jobs, plan = taken
    assert jobs[0] is quick
    assert {jobs[index] for index in plan.indices} == {quick, other, bulk}


def test_a_text_that_no_device_takes_now_holds_up_nobody() -> None:
    queue = JobQueue(aging=1.0, window=64)
    long = queue.add(encoding(*range(100)), pending(lane=Lane.INTERACTIVE), 0, 0.0)
    short = queue.add(encoding(1, 2), pending(), 0, 0.0)
    assert queue.take(SHAPES, 0.0) is not None
    assert (long.started, short.started) == (False, True)
    assert queue.take(SHAPES, 0.0) is None
    assert queue.take([BatchShape(bins=1, positions=128, segments=8)], 0.0) is not None
    assert long.started


# -- equal texts, and texts that nobody wants ----------------------------------------------------------------------------


def test_equal_texts_in_flight_share_a_job_and_its_result_is_for_all() -> None:
    queue = JobQueue(aging=1.0, window=64)
    first, second, third = pending(), pending(lane=Lane.INTERACTIVE), pending()
    job = queue.add(encoding(5, 6), first, 0, 0.0)
    assert queue.tokens == {Lane.INTERACTIVE: 0, Lane.BULK: 2}
    assert queue.add(encoding(5, 6), second, 0, 0.0) is job
    assert queue.tokens == {Lane.INTERACTIVE: 2, Lane.BULK: 0}
    assert queue.depth.texts == 1
    queue.take(SHAPES, 0.0)
    assert queue.add(encoding(5, 6), third, 0, 0.0) is job
    assert [request for request, _ in queue.finish(job)] == [first, second, third]
    assert queue.add(encoding(5, 6), first, 0, 0.0) is not job
    assert queue.merged == 2


def test_a_text_that_another_client_waits_for_does_not_wait_for_its_backlog() -> None:
    queue = JobQueue(aging=1e9, window=64)
    busy, quiet = Client(name="busy"), Client(name="quiet")
    jobs = [queue.add(encoding(*range(100 * n, 100 * n + ROW)), pending(client=busy), 0, 0.0) for n in range(20)]
    queue.take(SHAPES, 0.0)
    assert queue.add(encoding(*range(1900, 1900 + ROW)), pending(client=quiet), 0, 0.0) is jobs[-1]
    assert jobs[-1].client is quiet
    for _ in range(2):
        queue.take(SHAPES, 0.0)
    assert jobs[-1].started


def test_jobs_that_nobody_waits_for_cost_no_inference() -> None:
    queue = JobQueue(aging=1.0, window=64)
    queue.add(encoding(1), pending(gone=True), 0, 0.0)
    queue.add(encoding(2), pending(deadline=5.0), 0, 0.0)
    assert queue.take(SHAPES, 6.0) is None
    assert queue.depth.texts == queue.depth.tokens == 0
    assert queue.abandoned == 2


def test_a_request_that_is_over_takes_its_jobs_along_but_not_those_that_others_wait_for() -> None:
    queue = JobQueue(aging=1.0, window=64)
    request, other = pending(), pending()
    for number in range(100):
        job = encoding(1, number)
        request.encodings = [*request.encodings, job]
        queue.add(job, request, number, 0.0)
    queue.add(encoding(1, 50), other, 0, 0.0)
    queue.abandon(request)
    assert (queue.depth.texts, queue.depth.tokens, queue.abandoned) == (1, 2, 99)
    assert queue.take(SHAPES, 0.0) is not None


def test_a_merged_job_lives_while_anybody_waits() -> None:
    queue = JobQueue(aging=1.0, window=64)
    queue.add(encoding(1), pending(gone=True), 0, 0.0)
    queue.add(encoding(1), pending(), 0, 0.0)
    assert queue.take(SHAPES, 6.0) is not None


# -- the wait ------------------------------------------------------------------------------------------------------------


def test_what_is_ahead_is_the_clients_own_work_and_the_turns_of_the_others_meanwhile() -> None:
    queue: FairQueue[object] = FairQueue(aging=1.0)
    one, two = Client(name="one"), Client(name="two", weight=2.0)
    for _ in range(10):
        queue.push(object(), one, (False, 2), 100, 0.0)
        queue.push(object(), two, (False, 2), 100, 0.0)
    assert queue.ahead(one, (False, 1)) == 0  # it would be first
    assert queue.ahead(Client(name="three"), (True, 9)) == 0
    assert queue.ahead(two, (False, 2)) == 1500  # half of the other's turns meanwhile
    assert queue.ahead(one, (True, 9)) == 2000  # everything: the other takes two thirds until it has nothing left


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.integers(1, 99)), max_size=50), st.integers(0, 3))
def test_more_work_never_makes_the_wait_shorter_and_it_never_exceeds_everything(
    items: list[tuple[str, int, int]], size: int
) -> None:
    queue: FairQueue[object] = FairQueue(aging=1.0)
    before = 0.0
    for name, rank, tokens in items:
        queue.push(object(), Client(name=name), (False, rank), tokens, 0.0)
        ahead = queue.ahead(Client(name="a"), (False, size))
        assert before <= ahead <= queue.tokens
        assert ahead <= queue.ahead(Client(name="a"), (True, size))
        before = ahead
