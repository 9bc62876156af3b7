"""The breaker and the steps of recovery are values: what must hold after any history of failures and recoveries."""

from hypothesis import given
from hypothesis import strategies as st

from npu_proxy.devices.accelerator.breaker import AT_ONCE, Breaker, BreakerPolicy, Circuit, Recovery, backoff
from npu_proxy.devices.failure import Failure, classify_failure, first_line

chances = st.floats(0, 1, exclude_max=True)
steps = st.lists(st.tuples(st.sampled_from([*Failure, None]), st.floats(0.001, 100), chances), max_size=60)


@given(steps)
def test_any_history_keeps_the_breaker_sane(history: list[tuple[Failure | None, float, float]]) -> None:
    breaker, now = Breaker(), 0.0
    for failure, pause, chance in history:
        now += pause
        if failure is None:  # a probe passes
            breaker = breaker.probing().recovered(now) if breaker.state is Circuit.OPEN else breaker
            continue
        before, breaker = breaker, breaker.failed(failure, now, chance)
        if before.state is Circuit.CLOSED and failure in AT_ONCE:
            assert breaker.state is Circuit.OPEN
        if breaker.state is Circuit.OPEN and before.state is not Circuit.OPEN:
            longest = breaker.policy.slow if failure in (Failure.COMPILE, Failure.ABSENT) else breaker.policy.longest
            assert now < breaker.until <= now + longest
            assert breaker.opens >= 1
        if before.state is Circuit.OPEN:
            assert breaker == before  # batches that were under way do not open it again


def test_failures_are_counted_within_a_window_only() -> None:
    policy = BreakerPolicy(failures=3, window=10)
    breaker = Breaker(policy=policy)
    for moment in (0, 6, 12, 18):  # never three within ten seconds
        breaker = breaker.failed(Failure.ERROR, moment, 0.5)
        assert breaker.state is Circuit.CLOSED
    assert breaker.failed(Failure.ERROR, 19, 0.5).state is Circuit.OPEN


def test_the_backoff_doubles_until_the_device_has_worked_for_a_while() -> None:
    policy = BreakerPolicy(window=10, first=1, longest=8)
    breaker, now, waits = Breaker(policy=policy), 100.0, []
    for _ in range(6):
        breaker = breaker.failed(Failure.LOST, now, 0.999999)
        waits.append(round(breaker.until - now))
        now = breaker.until
        breaker = breaker.probing().recovered(now)
        now += 1
    assert waits == [1, 2, 4, 8, 8, 8]
    assert breaker.failed(Failure.LOST, now + 10, 0).opens == 1


@given(st.sampled_from(list(Failure)), st.integers(1, 50), chances)
def test_backoff_has_jitter_in_its_upper_half(failure: Failure, opens: int, chance: float) -> None:
    policy = BreakerPolicy()
    assert backoff(policy, failure, opens, 0.0) * 2 >= backoff(policy, failure, opens, chance)
    assert backoff(policy, failure, opens + 1, chance) >= backoff(policy, failure, opens, chance)


def test_recovery_recompiles_once_and_then_restarts() -> None:
    breaker = Breaker().failed(Failure.LOST, 0, 0.5)
    assert breaker.recovery is Recovery.RECOMPILE
    assert not breaker.needs_operator
    breaker = breaker.probing().failed(Failure.LOST, 1, 0.5)
    assert breaker.recovery is Recovery.RESTART
    for moment in (2, 3):
        breaker = breaker.probing().failed(Failure.LOST, moment, 0.5)
    assert breaker.needs_operator
    restarting = (Failure.CRASH, Failure.HANG, Failure.COMPILE)
    assert all(Breaker().failed(failure, 0, 0.5).recovery is Recovery.RESTART for failure in restarting)


def test_kinds_of_failure_are_recognized_by_the_words_of_an_error() -> None:
    words = {
        "NPU driver wasn't found!": Failure.ABSENT,
        "Could not find an NPU device": Failure.ABSENT,
        "Incompatibility between NPU plugin and driver!": Failure.ABSENT,
        "No available backend": Failure.ABSENT,
        "VCL compiler loading failed": Failure.ABSENT,
        'Cannot load library "x.so": libOpenCL.so.1: cannot open': Failure.ABSENT,
        "L0 zeFenceHostSynchronize result: ZE_RESULT_ERROR_DEVICE_LOST, code 0x70000001": Failure.LOST,
        "Failed Pass StopLocationVerifierPass on Operation": Failure.COMPILE,
        "something new": Failure.ERROR,
    }
    assert {text: classify_failure(text) for text in words} == words


def test_the_most_telling_line_is_shown() -> None:
    text = "Exception from src/inference/src/cpp/core.cpp:268:\nCheck 'x' failed\nCannot load library: libOpenCL.so.1\n"
    assert first_line(RuntimeError(text)) == "Cannot load library: libOpenCL.so.1"
    assert first_line(RuntimeError("")) == "RuntimeError"
