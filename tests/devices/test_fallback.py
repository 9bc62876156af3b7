"""The chain over fake devices: order, reasons, late batches, and which error is raised when all fail."""

import threading
import time
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import GOLDEN, until_set
from npu_proxy import DeviceError, EmbedRequest, Engine, Settings, SettingsError, UnavailableError
from npu_proxy.batch import Batch, BatchShape, Canary, Encoding, Output, Slot
from npu_proxy.devices.fake import FakeDevice, fail
from npu_proxy.devices.fallback import Fallback
from npu_proxy.devices.threads import DeviceThreads
from npu_proxy.targets import TARGETS, device_chain, supported

SHAPE = BatchShape(bins=1, positions=8, segments=1)


def make_batch(ids: int = 3) -> Batch:
    """One text, due in an hour."""
    encoding = Encoding(np.arange(1, ids + 1, dtype=np.int32), truncated=False)
    arrays = {"input_ids": np.zeros((1, 8), np.int32), "segment_ids": np.full((1, 8), -1, np.int32)}
    arrays["input_ids"][0, :ids], arrays["segment_ids"][0, :ids] = encoding.ids, 0
    return Batch([encoding], [Slot(0, 0)], SHAPE, arrays, deadline=time.monotonic() + 3600)


def run(chain: Fallback) -> Output:
    return chain.submit(make_batch()).result(timeout=10)


def late(seconds: float, *, fails: bool = False, name: str = "late") -> FakeDevice:
    """A device that finishes or fails only after ``seconds``."""

    def script(_: Batch) -> None:
        threading.Event().wait(seconds)
        if fails:
            raise DeviceError("it never came")

    return FakeDevice(name=name, script=script)


def test_the_first_that_is_ready_answers_and_the_reason_is_told() -> None:
    first, second = FakeDevice(name="one", script=fail("broken")), FakeDevice(name="two")
    with_reason = run(Fallback([first, second], probe_every=0))
    assert (with_reason.device, with_reason.fallback) == ("two", "broken")
    first.ready = False
    assert "one is serving" in run(Fallback([first, second], probe_every=0)).fallback
    alone = run(Fallback([second], probe_every=0))
    assert (alone.device, alone.fallback) == ("two", "")


def test_shapes_and_streams_are_those_of_the_device_that_would_answer() -> None:
    first, second = FakeDevice(name="one", streams=8), FakeDevice(name="two", streams=2, shapes=[SHAPE])
    chain = Fallback([first, second], probe_every=0)
    assert (chain.streams, chain.max_streams) == (8, 8)
    first.ready = False
    assert (chain.streams, chain.max_streams, chain.shapes) == (2, 8, [SHAPE])
    assert chain.ready
    second.ready = False
    assert not chain.ready
    with pytest.raises(UnavailableError, match="one is serving; two is serving"):
        run(chain)
    chain = Fallback([first, second], probe_every=0, max_retries=2)
    with pytest.raises(UnavailableError) as error:
        run(chain)
    assert str(error.value) == "no device is ready: one is serving; two is serving"


def test_the_last_error_is_raised_when_all_fail() -> None:
    with pytest.raises(DeviceError, match="second"):
        run(Fallback([FakeDevice(script=fail("first")), FakeDevice(script=fail("second"))], probe_every=0))


def test_a_late_batch_is_started_on_the_next_device_and_the_first_answer_counts() -> None:
    chain = Fallback([late(0.3), FakeDevice(name="two")], hedge=0.01, probe_every=0)
    output = run(chain)
    assert (output.device, output.fallback) == ("two", "late did not finish a batch in time")
    chain = Fallback([late(0.1), FakeDevice(name="two", seconds=0.5)], hedge=0.01, probe_every=0)
    output = run(chain)
    assert (output.device, output.fallback) == ("late", "")
    chain = Fallback([late(0.1), FakeDevice(name="two", script=fail())], hedge=0.01, probe_every=0)
    assert run(chain).device == "late"
    second = FakeDevice(name="two", seconds=0.3)
    chain = Fallback([late(0.1, fails=True), second], hedge=0.01, probe_every=0)
    assert run(chain).device == "two"
    assert len(second.batches) == 1
    with pytest.raises(DeviceError, match="scripted failure"):
        run(Fallback([late(0.1, fails=True), FakeDevice(name="two", script=fail())], hedge=0.01, probe_every=0))
    chain.close()
    assert second.closed


def test_a_late_batch_goes_down_the_whole_chain() -> None:
    """The second is late as well, and the third answers; a device that is no longer ready is skipped."""
    chain = Fallback([late(0.5, name="one"), late(0.5, name="two"), FakeDevice(name="three")], hedge=0.01, probe_every=0)
    output = run(chain)
    reasons = "one did not finish a batch in time; two did not finish a batch in time"
    assert (output.device, output.fallback) == ("three", reasons)
    down = FakeDevice(name="two", script=fail())
    down.ready = False
    output = run(Fallback([late(0.5), down, FakeDevice(name="three")], hedge=0.01, probe_every=0))
    assert output.device == "three"
    assert not down.batches
    chain.close()


def test_a_chain_is_read_and_what_is_wrong_with_it_is_named() -> None:
    assert device_chain("npu, GPU,cpu") == ["npu", "gpu", "cpu"]
    assert device_chain("auto")[-1] == "cpu"
    for wrong, words in {
        "toaster": "names `toaster`",
        "npu,npu": "each device once",
        "": "each device once",
        "npu,debug": "only be used alone",
        "auto,cpu": "only be used alone",
    }.items():
        with pytest.raises(SettingsError, match=words):
            device_chain(wrong)


def test_a_device_is_the_same_however_it_is_written() -> None:
    for written, meant in {"ONNX": "onnx", " Debug,": "debug", "AUTO": "auto", "NPU-sim , cpu": "npu-sim,cpu"}.items():
        assert Settings(device=written).device == meant
    with pytest.raises(SettingsError, match="supports only fp32"):
        Settings(device="ONNX", precision="int8")


def test_no_more_batches_are_hedged_than_there_are_places() -> None:
    """Behind a slow device the next one is not flooded: a batch without a place waits for the late run."""
    gate = threading.Event()
    first = FakeDevice(name="late", streams=1, seconds=0.2)
    second = FakeDevice(name="two", streams=1, script=until_set(gate, 5))
    chain = Fallback([first, second], hedge=0.01, probe_every=0)
    runs: list[Future[Output]] = [chain.submit(make_batch()) for _ in range(4)]
    assert [future.result(timeout=5).device for future in runs] == ["late"] * 4
    assert len(second.batches) == 1
    gate.set()
    chain.close()


def test_only_properties_that_a_plugin_lists_are_set() -> None:
    assert supported({"PERFORMANCE_HINT": "LATENCY", "NPU_TURBO": True}, {"PERFORMANCE_HINT": "RW"}) == {
        "PERFORMANCE_HINT": "LATENCY"
    }


def test_npu_sim_has_the_rules_of_an_npu() -> None:
    assert TARGETS["npu-sim"].kind is TARGETS["npu"].kind
    assert TARGETS["npu"].kind.static
    assert TARGETS["npu"].kind.isolated


def test_a_batch_packed_for_another_device_goes_to_one_that_takes_it() -> None:
    first = FakeDevice(name="one")
    first.takes = lambda shape: False
    output = run(Fallback([first, FakeDevice(name="two")], probe_every=0))
    assert (output.device, output.fallback) == ("two", "one was not ready when the batch was packed")
    assert not first.batches


def test_texts_too_long_for_an_accelerator_go_to_the_device_behind_it(tmp_path: Path) -> None:
    settings = Settings(device="npu-sim,cpu", accelerator_tokens=32, compile_cache_mb=0, cache_mb=0, store=tmp_path)
    short, long = "the cat", "the cat sleeps in the red house " * 5
    folder = GOLDEN / "mean"
    with Engine(folder, settings=settings) as engine, Engine(folder, device="cpu") as cpu:
        end = time.monotonic() + 60
        while engine.device.reports()[0].state != "serving" and time.monotonic() < end:
            time.sleep(0.05)
        for text, device, reason in ((short, "npu-sim", ""), (long, "cpu", "npu-sim does not take texts of this length")):
            result = engine.submit(EmbedRequest(texts=[text])).result(timeout=60).raise_first()
            assert (result.device, result.fallback) == (device, reason)
            np.testing.assert_allclose(np.asarray(result.embeddings), cpu.embed([text]), atol=1e-4)
    with Engine(folder, settings=replace(settings, device="npu-sim")) as alone:  # without a device behind it
        assert alone.submit(EmbedRequest(texts=[long])).result(timeout=60).raise_first().device == "npu-sim"


class Wrong(FakeDevice):
    """A device whose vectors are wrong until it is doubted."""

    def infer(self, batch: Batch) -> Output:
        output = super().infer(batch)
        return output if self.doubts else replace(output, vectors=-output.vectors)

    @property
    def ready(self) -> bool:  # type: ignore[override]
        return True


def test_one_in_so_many_batches_without_a_canary_is_computed_twice() -> None:
    first, second = FakeDevice(name="one"), FakeDevice(name="two")
    chain = Fallback([first, second], probe_every=0, verify_every=3)
    outputs = [run(chain) for _ in range(7)]
    assert [(output.device, output.fallback) for output in outputs] == [("one", "")] * 7
    assert (len(first.batches), len(second.batches)) == (7, 2)
    guarded = replace(make_batch(), canaries=[Canary(0, make_batch().encodings[0], Slot(0, 0))])
    for _ in range(6):
        chain.submit(guarded).result(timeout=10)
    assert len(second.batches) == 2
    assert not first.doubts
    assert not second.doubts


def test_if_two_computations_differ_both_devices_are_examined_and_the_last_answers() -> None:
    first, second = Wrong(name="one"), FakeDevice(name="two")
    output = run(Fallback([first, second], probe_every=0, verify_every=1))
    np.testing.assert_array_equal(output.vectors[0, 0], second.infer(make_batch()).vectors[0, 0])
    assert (output.device, output.fallback) == ("two", "two computations of a batch differ, on one and on two")
    assert first.doubts == second.doubts == ["two computations of a batch differ, on one and on two"]


def test_a_device_that_is_alone_is_examined_when_it_contradicts_itself() -> None:
    class Fickle(Wrong):
        def infer(self, batch: Batch) -> Output:
            return FakeDevice.infer(self, batch) if len(self.batches) == 1 else super().infer(batch)

    alone = Fickle(name="one")
    output = run(Fallback([alone], probe_every=0, verify_every=1))
    np.testing.assert_array_equal(output.vectors[0, 0], FakeDevice().infer(make_batch()).vectors[0, 0])
    assert (output.device, output.fallback, len(alone.doubts)) == ("one", "", 1)


def test_if_no_other_computation_is_possible_the_first_counts() -> None:
    first, second = FakeDevice(name="one"), FakeDevice(name="two", script=fail())
    assert run(Fallback([first, second], probe_every=0, verify_every=1)).device == "one"


# -- retries -------------------------------------------------------------------------------------------------------------


def failing(times: int, name: str = "flaky") -> FakeDevice:
    """A device that fails so many times."""
    left = [times]

    def script(_: Batch) -> None:
        if left[0]:
            left[0] -= 1
            raise DeviceError("not now")

    return FakeDevice(name=name, script=script)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_batch_that_failed_on_every_device_starts_again(count: int, failures: int) -> None:
    devices = [failing(failures, name=f"device {number}") for number in range(count)]
    output = run(Fallback(devices, probe_every=0, max_retries=2))
    assert output.retries == failures
    assert output.device == "device 0"
    assert ("not now" in output.fallback) == bool(failures)


@pytest.mark.parametrize("count", [1, 2])
def test_after_the_last_retry_the_error_is_raised(count: int) -> None:
    devices = [failing(3, name=f"device {number}") for number in range(count)]
    chain = Fallback(devices, probe_every=0, max_retries=1)
    with pytest.raises(DeviceError, match="not now"):
        run(chain)
    assert [len(device.batches) for device in devices] == [2] * count
    chain = Fallback([failing(1)], probe_every=0, max_retries=0)
    with pytest.raises(DeviceError, match="not now"):
        run(chain)


def test_there_is_no_retry_after_the_deadline() -> None:
    chain = Fallback([failing(1)], probe_every=0, max_retries=5)
    batch = replace(make_batch(), deadline=time.monotonic() + 0.05)
    with pytest.raises(DeviceError, match="not now"):
        chain.submit(batch).result(10)


def test_a_device_that_comes_back_between_attempts_answers() -> None:
    device = FakeDevice(name="one")
    device.ready = False
    chain = Fallback([device], probe_every=0, max_retries=3)
    future = chain.submit(make_batch())
    threading.Timer(0.15, lambda: setattr(device, "ready", True)).start()
    assert future.result(10).retries >= 1


def test_retries_are_counted() -> None:
    from npu_proxy.engine.components import EngineComponents
    from npu_proxy.engine.tokenize import RequestTokenizer
    from npu_proxy.models.layout import read_spec

    spec = read_spec(GOLDEN / "mean")
    flaky = FakeDevice(width=spec.width, script=failing(2)._script)
    made = EngineComponents(spec=spec, tokenizer=RequestTokenizer(spec), device=Fallback([flaky], probe_every=0, max_retries=2))
    with Engine(settings=Settings(cache_mb=0), components=lambda _settings, _stopping: made) as engine:
        assert engine.embed(["a"]).shape == (1, spec.width)
        assert engine.stats().counters.retries == 2


# -- probes --------------------------------------------------------------------------------------------------------------


def test_a_probe_has_a_time_limit_and_what_it_found_is_the_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_proxy.devices.probes._SECONDS", 0.1)
    stuck, fine = FakeDevice(name="stuck"), FakeDevice(name="fine")
    release = threading.Event()
    monkeypatch.setattr(stuck, "probe", lambda: release.wait(10))
    chain = Fallback([stuck, fine], probe_every=0)
    assert chain.probes.trouble() == ""
    with pytest.raises(DeviceError, match="stuck did not compute golden texts"):
        chain.probe()
    assert chain.probes.trouble() == ""  # another device is fine
    fine.ready = False
    assert "stuck did not compute" in chain.probes.trouble()
    assert "fine is" in chain.probes.trouble()
    run(Fallback([stuck], probe_every=0))
    release.set()
    chain.probe()
    assert chain.probes.trouble() == ""
    chain.close()


def test_a_device_that_is_only_busy_does_not_fail_its_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_proxy.devices.probes._SECONDS", 0.2)
    device, release = FakeDevice(name="busy"), threading.Event()
    monkeypatch.setattr(device, "probe", lambda: release.wait(10))
    chain = Fallback([device], probe_every=0)
    threading.Timer(0.1, lambda: chain.submit(make_batch())).start()
    chain.probe()
    assert chain.probes.trouble() == ""
    release.set()
    chain.close()


# -- closed while batches wait -------------------------------------------------------------------------------------------


class Closing(FakeDevice):
    """A device that is closed while its first batch waits for another one, as when it is made anew."""

    left = 1

    def submit(self, batch: Batch) -> Future[Output]:
        if not self.left:
            return super().submit(batch)
        self.left -= 1
        threads, go_on = DeviceThreads(1, self.name), threading.Event()
        busy = threads.submit(go_on.wait, 10)
        waiting = threads.submit(self.infer, batch)
        closing = threading.Thread(target=threads.close)
        closing.start()
        wait([waiting], 10)
        go_on.set()
        closing.join()
        assert busy.result()
        return waiting


def test_a_batch_whose_device_is_closed_goes_to_the_next_one_or_starts_again() -> None:
    output = run(Fallback([Closing(name="one"), FakeDevice(name="two")], probe_every=0))
    assert (output.device, output.fallback) == ("two", "one is closed")
    output = run(Fallback([Closing(name="one")], probe_every=0, max_retries=1))
    assert (output.device, output.retries) == ("one", 1)
    with pytest.raises(DeviceError, match="is closed"):
        run(Fallback([Closing(name="one")], probe_every=0))


def test_after_a_hedge_that_failed_no_device_is_asked_twice() -> None:
    second, third = FakeDevice(name="two", script=fail("two")), FakeDevice(name="three", script=fail("three"))
    chain = Fallback([late(0.2, fails=True), second, third], hedge=0.01, probe_every=0)
    with pytest.raises(DeviceError, match="three"):
        run(chain)
    assert [len(device.batches) for device in (second, third)] == [1, 1]


def test_a_device_that_never_finishes_does_not_use_up_the_places_of_hedges() -> None:
    release = threading.Event()
    stuck = FakeDevice(name="stuck", streams=1, script=until_set(release))
    chain = Fallback([stuck, FakeDevice(name="two", streams=1)], hedge=0.01, probe_every=0)
    assert [run(chain).device for _ in range(10)] == ["two"] * 10
    release.set()
    chain.close()
