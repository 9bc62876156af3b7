"""The CPU behind a breaker: if it hangs, fails or is wrong, it is made anew and compared; nothing wrong gets out."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from conftest import GOLDEN
from npu_proxy import DeviceError, Engine, Settings, UnavailableError
from npu_proxy.batch import Batch, Output
from npu_proxy.devices.accelerator.breaker import BreakerPolicy
from npu_proxy.devices.failure import BatchError, Failure
from npu_proxy.devices.fake import FakeDevice, fail
from npu_proxy.devices.fallback import Fallback
from npu_proxy.devices.watched import Watched, WatchPlan
from npu_proxy.engine.components import EngineComponents
from npu_proxy.engine.golden import GoldenBatches
from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.models.layout import read_spec

SPEC = read_spec(GOLDEN / "mean")
TOKENIZER = RequestTokenizer(SPEC)
GOLDEN_TEXTS = GoldenBatches(TOKENIZER, SPEC)
SECONDS = 20.0


class Spoiled(FakeDevice):
    """A device whose vectors pass through ``change``."""

    change: Callable[[np.ndarray], np.ndarray] = staticmethod(lambda vectors: vectors)

    def infer(self, batch: Batch) -> Output:
        output = super().infer(batch)
        return Output(type(self).change(output.vectors) if self.spoiled else output.vectors, output.device, output.seconds)

    spoiled = False


@contextmanager
def watched(make: Callable[[], FakeDevice], seconds: float = 10.0) -> Iterator[Watched]:
    policy = BreakerPolicy(failures=3, first=0.05, longest=0.1, slow=0.1)
    device = Watched(WatchPlan(make=make, golden=GOLDEN_TEXTS, policy=policy, batch_seconds=seconds, least_cosine=0.999))
    try:
        yield device
    finally:
        device.close()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def batch() -> Batch:
    return GOLDEN_TEXTS(FakeDevice().shapes[0])


def fakes(*scripts: Callable[[Batch], None]) -> tuple[list[FakeDevice], Callable[[], FakeDevice]]:
    """Devices made so far, and a function that makes the next one, with its own script; the last script is used for the rest."""
    made: list[FakeDevice] = []

    def make() -> FakeDevice:
        made.append(FakeDevice(width=SPEC.width, name="cpu", script=scripts[min(len(made), len(scripts) - 1)]))
        return made[-1]

    return made, make


def after(count: int, then: Callable[[Batch], object]) -> Callable[[Batch], None]:
    """Do nothing for so many batches, then the other script."""
    seen = [0]

    def script(batch: Batch) -> None:
        seen[0] += 1
        if seen[0] > count:
            then(batch)

    return script


def nothing(_: Batch) -> None:
    return


def test_three_errors_open_the_breaker_and_a_new_device_takes_over() -> None:
    made, make = fakes(after(1, fail("broken")), nothing)
    with watched(make) as device:
        for _ in range(3):
            with pytest.raises(DeviceError, match="broken"):
                device.submit(batch()).result(SECONDS)
        assert not device.ready or len(made) == 2
        until(lambda: device.ready)
        assert len(made) == 2
        until(lambda: made[0].closed)
        device.submit(batch()).result(SECONDS)
        (report,) = device.reports()
        assert (report.breaker, report.restarts) == ("closed", 1)


def test_a_batch_that_hangs_fails_in_time_and_the_device_is_made_anew() -> None:
    release = threading.Event()
    made, make = fakes(after(1, lambda _: release.wait(SECONDS)), nothing)
    with watched(make, seconds=0.3) as device:
        with pytest.raises(BatchError, match="did not finish a batch within") as error:
            device.submit(batch()).result(SECONDS)
        assert error.value.failure is Failure.HANG
        until(lambda: device.ready)
        device.submit(batch()).result(SECONDS)
        assert len(made) == 2
        release.set()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_open_the_breaker_at_once(value: float) -> None:
    devices: list[Spoiled] = []

    class Nan(Spoiled):
        change = staticmethod(lambda vectors: np.full_like(vectors, value))

    def make() -> FakeDevice:
        devices.append(Nan(width=SPEC.width, name="cpu"))
        return devices[-1]

    with watched(make) as device:
        devices[0].spoiled = True
        with pytest.raises(DeviceError, match="not finite"):
            device.submit(batch()).result(SECONDS)
        until(lambda: device.ready and len(devices) == 2)
        device.submit(batch()).result(SECONDS)


def test_a_new_device_that_computes_something_else_never_serves() -> None:
    devices: list[Spoiled] = []

    class Reversed(Spoiled):
        change = staticmethod(lambda vectors: np.ascontiguousarray(vectors[..., ::-1]))

    def make() -> FakeDevice:
        devices.append(Reversed(width=SPEC.width, name="cpu", script=after(1, fail("broken")) if not devices else nothing))
        devices[-1].spoiled = 0 < len(devices) - 1 < 3
        return devices[-1]

    with watched(make) as device:
        for _ in range(3):
            with pytest.raises(DeviceError):
                device.submit(batch()).result(SECONDS)
        until(lambda: len(devices) >= 3)
        assert not device.ready
        with pytest.raises(DeviceError, match="not ready"):
            device.submit(batch()).result(SECONDS)
        until(lambda: device.ready)
        assert len(devices) == 4
        until(lambda: all(made.closed for made in devices[:3]))


def test_when_nobody_is_trusted_requests_are_refused_and_none_is_answered_wrong() -> None:
    made, make = fakes(after(1, fail("broken")), fail("still broken"))
    with watched(make) as device:
        chain = Fallback([device], probe_every=0)
        components = EngineComponents(spec=SPEC, tokenizer=TOKENIZER, device=chain)
        with Engine(settings=Settings(cache_mb=0), components=lambda _settings, _stopping: components) as engine:
            for number in range(3):
                with pytest.raises(DeviceError):
                    engine.embed([f"the cat {number}"])
            until(lambda: not device.ready and len(made) > 2)
            assert not chain.ready
            assert "still broken" in chain.probes.trouble()
            with pytest.raises(UnavailableError, match="no device is ready"):
                engine.embed(["the dog"])


def test_a_cancelled_batch_is_cancelled_inside_too() -> None:
    release = threading.Event()
    _, make = fakes(after(1, lambda _: release.wait(SECONDS)))
    with watched(make) as device:
        running = [device.submit(batch()) for _ in range(20)]
        assert running[-1].cancel()
        release.set()
        for future in running[:-1]:
            future.result(SECONDS)
        assert device.ready


def test_every_batch_in_progress_ends_when_the_device_is_made_anew() -> None:
    release = threading.Event()
    made, make = fakes(after(1, lambda _: release.wait(SECONDS)), nothing)
    with watched(make, seconds=0.5) as device:
        first = device.submit(batch())
        time.sleep(0.3)
        second = device.submit(batch())  # not late yet when the first one is
        for future in (first, second):
            with pytest.raises(BatchError):
                future.result(SECONDS)
        until(lambda: device.ready)
        assert len(made) == 2
        release.set()
