"""Admission is arithmetic: what is refused, what never is, and that more work or less time never helps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_proxy import OverloadedError
from npu_proxy.engine.admission import QueueLimits, QueueLoad, Throughput, check_admission, expected_wait
from npu_proxy.types import Lane

BULK, INTERACTIVE = Lane.BULK, Lane.INTERACTIVE
lanes = st.sampled_from(list(Lane))
per_lane = st.fixed_dictionaries({INTERACTIVE: st.integers(0, 500), BULK: st.integers(0, 500)})
throughputs = st.builds(Throughput, tokens=st.floats(1, 1e4), texts=st.floats(1, 100), seconds=st.floats(0.01, 100))
loads = st.builds(QueueLoad, texts=st.integers(0, 50), tokens=per_lane, untokenized=per_lane)
limits_of = st.builds(QueueLimits, texts=st.integers(1, 60), tokens=st.integers(1, 1200))
ROOMY = QueueLimits(texts=10**9, tokens=10**9)
UNKNOWN = Throughput()


def load_of(texts: int = 1, *, interactive: int = 0, bulk: int = 0, untokenized: int = 0) -> QueueLoad:
    """A load of so many texts, with tokens that wait per lane, and texts not yet tokenized in the bulk lane."""
    return QueueLoad(texts=texts, tokens={INTERACTIVE: interactive, BULK: bulk}, untokenized={INTERACTIVE: 0, BULK: untokenized})


def refusal(
    count: int, lane: Lane, seconds: float, load: QueueLoad, limits: QueueLimits, throughput: Throughput
) -> OverloadedError | None:
    """The error that a request gets, None where it is taken."""
    try:
        check_admission(count, lane, seconds, load=load, limits=limits, throughput=throughput)
    except OverloadedError as error:
        return error
    return None


# -- room ----------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 10**6), lanes, st.floats(-10, 1e3), per_lane, limits_of, throughputs)
def test_an_idle_engine_takes_any_request(
    count: int, lane: Lane, seconds: float, tokens: dict[Lane, int], limits: QueueLimits, throughput: Throughput
) -> None:
    load = QueueLoad(texts=0, tokens=tokens, untokenized={INTERACTIVE: count, BULK: count})
    assert refusal(count, lane, seconds, load, limits, throughput) is None


@given(st.integers(1, 60), lanes, st.floats(0.1, 1e3), loads, limits_of)
def test_before_the_first_batch_only_room_counts(
    count: int, lane: Lane, seconds: float, load: QueueLoad, limits: QueueLimits
) -> None:
    full = load.texts + count > limits.texts or sum(load.tokens.values()) > limits.tokens
    error = refusal(count, lane, seconds, load, limits, UNKNOWN)
    assert (error is not None) == (bool(load.texts) and full)
    if error is not None:
        assert (error.kind, error.retry_after) == ("overloaded", 1.0)


def test_the_limits_themselves_are_allowed() -> None:
    limits = QueueLimits(texts=10, tokens=100)
    assert refusal(6, BULK, 9, load_of(4, interactive=40, bulk=60), limits, UNKNOWN) is None
    assert refusal(7, BULK, 9, load_of(4), limits, UNKNOWN) is not None
    assert refusal(1, BULK, 9, load_of(4, interactive=41, bulk=60), limits, UNKNOWN) is not None


def test_a_full_queue_says_when_it_will_have_moved() -> None:
    limits, fast = QueueLimits(texts=9, tokens=100), Throughput(tokens=1000, texts=10, seconds=1)
    slow = Throughput(tokens=100, texts=10, seconds=5)
    waits = [refusal(9, BULK, 9, load_of(9, bulk=80), limits, throughput) for throughput in (fast, slow)]
    assert [error and error.retry_after for error in waits] == [1.0, 4.0]


# -- time ----------------------------------------------------------------------------------------------------------------


def test_the_wait_is_the_work_ahead_over_the_speed() -> None:
    tokens, untokenized = {INTERACTIVE: 40, BULK: 100}, {INTERACTIVE: 2, BULK: 3}
    assert expected_wait(INTERACTIVE, tokens, untokenized, 20, 80) == pytest.approx(1.0)
    assert expected_wait(BULK, tokens, untokenized, 20, 80) == pytest.approx(3.0)


def test_a_request_that_would_wait_most_of_its_time_is_refused_at_once() -> None:
    throughput = Throughput(tokens=100, texts=10, seconds=1)
    load = load_of(bulk=700)  # seven seconds of work
    assert refusal(1, BULK, 10.1, load, ROOMY, throughput) is None
    error = refusal(1, BULK, 9.9, load, ROOMY, throughput)
    assert error is not None
    assert error.retry_after == 1.0
    error = refusal(1, BULK, 5.0, load, ROOMY, throughput)
    assert error is not None
    assert error.retry_after == pytest.approx(3.5)  # by then the rest fits into its time
    assert refusal(1, BULK, 9.9, load_of(bulk=600, untokenized=11), ROOMY, throughput) is not None  # ten tokens a text


def test_interactive_texts_do_not_wait_for_bulk_ones() -> None:
    throughput = Throughput(tokens=100, texts=10, seconds=1)
    load = load_of(bulk=10_000, untokenized=500)
    assert refusal(1, INTERACTIVE, 1.0, load, ROOMY, throughput) is None
    assert refusal(1, BULK, 1.0, load, ROOMY, throughput) is not None
    assert refusal(1, INTERACTIVE, 1.0, load_of(interactive=10_000), ROOMY, throughput) is not None


@given(lanes, st.floats(-100, 0), loads, throughputs)
def test_a_request_without_time_is_left_to_its_deadline(
    lane: Lane, seconds: float, load: QueueLoad, throughput: Throughput
) -> None:
    assert refusal(1, lane, seconds, load, ROOMY, throughput) is None


@given(st.integers(1, 60), st.integers(0, 60), lanes, st.floats(0.1, 100), st.floats(1, 10), loads, limits_of, throughputs)
def test_more_texts_or_less_time_never_help(
    count: int,
    more: int,
    lane: Lane,
    seconds: float,
    longer: float,
    load: QueueLoad,
    limits: QueueLimits,
    throughput: Throughput,
) -> None:
    error = refusal(count, lane, seconds * longer, load, limits, throughput)
    if error is None:
        return
    assert error.retry_after >= 1
    assert refusal(count + more, lane, seconds * longer, load, limits, throughput) is not None
    assert refusal(count, lane, seconds, load, limits, throughput) is not None


# -- speed ---------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 50), st.floats(0.001, 10)), min_size=1, max_size=40))
def test_the_speed_lies_between_the_slowest_and_the_fastest_batch(batches: list[tuple[int, int, float]]) -> None:
    throughput = Throughput()
    for tokens, texts, seconds in batches:
        throughput.add(tokens=tokens, texts=texts, seconds=seconds)
    speeds = [tokens / seconds for tokens, _, seconds in batches]
    lengths = [tokens / texts for tokens, texts, _ in batches]
    assert min(speeds) * 0.9999 <= throughput.tokens_per_second <= max(speeds) * 1.0001
    assert min(lengths) * 0.9999 <= throughput.tokens_per_text <= max(lengths) * 1.0001


def test_the_last_batch_counts_most() -> None:
    slowing, quickening = Throughput(), Throughput()
    for throughput, order in ((slowing, (1.0, 9.0)), (quickening, (9.0, 1.0))):
        for seconds in order:
            throughput.add(tokens=90, texts=1, seconds=seconds)
    assert slowing.tokens_per_second < 180 / 10 < quickening.tokens_per_second


def test_a_batch_that_took_no_time_divides_by_nothing() -> None:
    throughput = Throughput()
    throughput.add(tokens=5, texts=0, seconds=0.0)
    assert (throughput.tokens_per_second, throughput.tokens_per_text) == (0.0, 0.0)
