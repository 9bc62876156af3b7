"""Admission is arithmetic: what is refused, what never is, and that more work or less time never helps."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_proxy import OverloadedError, Pair, RequestTooLargeError
from npu_proxy.engine.admission import QueueLimits, QueueLoad, RecentRatio, check_admission, estimated_tokens, time_limit
from npu_proxy.types import NO_CLIENT, Client

speeds = st.floats(1, 1e5)
loads = st.builds(
    QueueLoad, texts=st.integers(0, 50), tokens=st.integers(0, 1000), client_texts=st.integers(0, 50), ahead=st.floats(0, 1e5)
)
limits_of = st.builds(QueueLimits, texts=st.integers(1, 60), tokens=st.integers(1, 1200))
ROOMY = QueueLimits(texts=10**9, tokens=10**9)


def load_of(texts: int = 1, *, tokens: float = 0, ahead: float = 0, client_texts: int = 0) -> QueueLoad:
    return QueueLoad(texts=texts, tokens=tokens, ahead=ahead, client_texts=client_texts)


def refusal(
    count: int, seconds: float, load: QueueLoad, limits: QueueLimits = ROOMY, speed: float = 0.0, client: Client = NO_CLIENT
) -> OverloadedError | None:
    """The error that a request gets, None where it is taken. speed: in tokens per second."""
    try:
        check_admission(count, client, seconds, load=load, limits=limits, tokens_per_second=speed)
    except OverloadedError as error:
        return error
    return None


# -- time ----------------------------------------------------------------------------------------------------------------


@given(st.none() | st.floats(0, 1e6), st.floats(0.1, 1e3), st.floats(0.1, 1e4))
def test_a_large_request_has_more_time_up_to_the_bulk_limit(seconds: float | None, timeout: float, bulk: float) -> None:
    limit = time_limit(seconds, timeout=timeout, bulk_timeout=bulk)
    assert timeout <= limit <= max(timeout, bulk)
    assert seconds is None or limit >= min(bulk, seconds)
    if seconds is not None:
        assert time_limit(2 * seconds, timeout=timeout, bulk_timeout=bulk) >= limit


@given(st.integers(2, 10**4), st.floats(0.1, 1e3), st.floats(1, 1e7), speeds, st.integers(0, 3))
def test_what_cannot_be_computed_in_time_is_refused_with_what_can(
    count: int, seconds: float, own: float, speed: float, waiting: int
) -> None:
    def ask(count: int, own: float) -> None:
        load = QueueLoad(texts=waiting, tokens=0, ahead=0, client_texts=0, own=own)
        check_admission(count, NO_CLIENT, seconds, load=load, limits=ROOMY, tokens_per_second=speed)

    if own / speed <= seconds:
        ask(count, own)
    elif own / speed > 2 * seconds:
        with pytest.raises(RequestTooLargeError, match="send up to") as error:
            ask(count, own)
        fitting = int(re.findall(r"up to (\d+) such", str(error.value))[0])
        assert 1 <= fitting <= count
        if fitting > 1:
            ask(fitting, own * fitting / count)


# -- room ----------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 10**6), st.floats(-10, 1e3), st.floats(0, 1e6), limits_of, speeds)
def test_an_idle_engine_takes_any_request(count: int, seconds: float, ahead: float, limits: QueueLimits, speed: float) -> None:
    assert refusal(count, seconds, load_of(0, tokens=500, ahead=ahead), limits, speed) is None


@given(st.integers(1, 60), st.floats(0.1, 1e3), loads, limits_of)
def test_before_the_first_batch_only_room_counts(count: int, seconds: float, load: QueueLoad, limits: QueueLimits) -> None:
    full = load.texts + count > limits.texts or load.tokens > limits.tokens
    error = refusal(count, seconds, load, limits)
    assert (error is not None) == (bool(load.texts) and full)
    if error is not None:
        assert (error.kind, error.retry_after) == ("overloaded", 1.0)


def test_the_limits_themselves_are_allowed() -> None:
    limits = QueueLimits(texts=10, tokens=100)
    assert refusal(6, 9, load_of(4, tokens=100), limits) is None
    assert refusal(7, 9, load_of(4), limits) is not None
    assert refusal(1, 9, load_of(4, tokens=101), limits) is not None


def test_a_full_queue_says_when_it_will_have_moved() -> None:
    limits = QueueLimits(texts=9, tokens=100)
    waits = [refusal(9, 9, load_of(9, tokens=80), limits, speed) for speed in (1000, 20)]
    assert [error and error.retry_after for error in waits] == [1.0, 4.0]


@given(st.integers(1, 60), st.integers(0, 60), st.integers(1, 100))
def test_a_client_with_a_limit_has_at_most_that_many_texts_in_the_queue(count: int, waiting: int, limit: int) -> None:
    client = Client(name="a", max_texts=limit)
    for texts in (0, waiting):
        error = refusal(count, 9, load_of(texts, client_texts=waiting), client=client)
        assert (error is not None) == (waiting + count > limit)
        assert error is None or error.kind == "client_limit"


# -- time ----------------------------------------------------------------------------------------------------------------


def test_a_request_that_would_wait_most_of_its_time_is_refused_at_once() -> None:
    load = load_of(ahead=700)  # seven seconds of work
    assert refusal(1, 10.1, load, speed=100) is None
    error = refusal(1, 9.9, load, speed=100)
    assert error is not None
    assert error.retry_after == 1.0
    error = refusal(1, 5.0, load, speed=100)
    assert error is not None
    assert error.retry_after == pytest.approx(3.5)  # by then the rest fits into its time


def test_only_what_is_computed_before_counts_for_the_wait() -> None:
    assert refusal(1, 1.0, load_of(tokens=10_000), speed=100) is None
    assert refusal(1, 1.0, load_of(tokens=10_000, ahead=10_000), speed=100) is not None


@given(st.floats(-100, 0), loads, speeds)
def test_a_request_without_time_is_left_to_its_deadline(seconds: float, load: QueueLoad, speed: float) -> None:
    assert refusal(1, seconds, load, speed=speed) is None


@given(st.integers(1, 60), st.integers(0, 60), st.floats(0.1, 100), st.floats(1, 10), loads, limits_of, speeds)
def test_more_texts_or_less_time_never_help(
    count: int, more: int, seconds: float, longer: float, load: QueueLoad, limits: QueueLimits, speed: float
) -> None:
    error = refusal(count, seconds * longer, load, limits, speed)
    if error is None:
        return
    assert error.retry_after >= 1
    assert refusal(count + more, seconds * longer, load, limits, speed) is not None
    assert refusal(count, seconds, load, limits, speed) is not None


# -- estimates -----------------------------------------------------------------------------------------------------------


def test_tokens_are_estimated_from_the_length_of_a_text_up_to_the_limit() -> None:
    assert estimated_tokens(["a" * 40, [1, 2, 3], Pair("a" * 20, "b" * 20)], 100) == 12 + 5 + 12
    assert estimated_tokens(["a" * 4000, "b" * 4000], 100) == 200
    assert estimated_tokens([], 100) == 0


@given(st.lists(st.tuples(st.integers(1, 1000), st.floats(0.001, 10)), min_size=1, max_size=40))
def test_the_speed_lies_between_the_slowest_and_the_fastest_batch(batches: list[tuple[int, float]]) -> None:
    speed = RecentRatio()
    for tokens, seconds in batches:
        speed.add(tokens, seconds)
    speeds = [tokens / seconds for tokens, seconds in batches]
    assert min(speeds) * 0.9999 <= speed.value <= max(speeds) * 1.0001


def test_the_last_batch_counts_most() -> None:
    slowing, quickening = RecentRatio(), RecentRatio()
    for speed, order in ((slowing, (1.0, 9.0)), (quickening, (9.0, 1.0))):
        for seconds in order:
            speed.add(90, seconds)
    assert slowing.value < 180 / 10 < quickening.value


def test_a_batch_that_took_no_time_divides_by_nothing() -> None:
    speed = RecentRatio()
    assert speed.value == 0.0
    speed.add(5, 0.0)
    assert speed.value == 0.0
