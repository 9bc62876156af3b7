"""The chain over fake devices: order, reasons, lateness, and that the last device's word is final."""

import math
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import GOLDEN
from npu_proxy import DeviceError, EmbedRequest, Engine, Settings, SettingsError, UnavailableError
from npu_proxy.devices.base import LateError
from npu_proxy.devices.fake import FakeDevice, fail
from npu_proxy.devices.fallback import Fallback
from npu_proxy.devices.kinds import TARGETS, chain, supported
from npu_proxy.graph.packed import RowShape
from npu_proxy.types import Encoding, Job, Lane, Pack, Slot

SHAPE = RowShape(bins=1, positions=8, segments=1)


def row(ids: int = 3) -> Pack:
    job = Job(encoding=Encoding(np.arange(1, ids + 1, dtype=np.int32), truncated=False), lane=Lane.BULK, queued_at=0, waiters=[])
    arrays = {"input_ids": np.zeros((1, 8), np.int32), "segment_ids": np.full((1, 8), -1, np.int32)}
    arrays["input_ids"][0, :ids], arrays["segment_ids"][0, :ids] = job.encoding.ids, 0
    pack = Pack([job], [Slot(0, 0)], SHAPE, arrays)
    job.waiters.append((_Ticket(), 0))
    return pack


class _Ticket:
    deadline = time.monotonic() + 3600


class Late(FakeDevice):
    """Late in every row; what it was late with comes after ``seconds``, or fails."""

    def __init__(self, seconds: float, *, fails: bool = False) -> None:
        super().__init__(name="late")
        self._late, self._fails = seconds, fails

    def infer(self, pack: Pack, late: float = math.inf):
        def pending():
            threading.Event().wait(self._late)
            if self._fails:
                raise DeviceError("it never came")
            return super(Late, self).infer(pack)

        raise LateError("late", pending)


def test_the_first_that_is_ready_answers_and_the_reason_is_told() -> None:
    first, second = FakeDevice(name="one", script=fail("broken")), FakeDevice(name="two")
    with_reason = Fallback([first, second], probe_every=0).infer(row())
    assert (with_reason.device, with_reason.fallback) == ("two", "broken")
    first.ready = False
    assert "one is serving" in Fallback([first, second], probe_every=0).infer(row()).fallback
    alone = Fallback([second], probe_every=0).infer(row())
    assert (alone.device, alone.fallback) == ("two", "")


def test_shapes_and_streams_are_those_of_whoever_would_answer() -> None:
    first, second = FakeDevice(name="one", streams=8), FakeDevice(name="two", streams=2, shapes=[SHAPE])
    chain = Fallback([first, second], probe_every=0)
    assert (chain.streams, chain.most_streams) == (8, 8)
    first.ready = False
    assert (chain.streams, chain.most_streams, chain.shapes) == (2, 8, [SHAPE])
    assert chain.ready
    second.ready = False
    assert not chain.ready
    with pytest.raises(UnavailableError, match="one is serving; two is serving"):
        chain.infer(row())


def test_the_last_error_stands_when_all_fail() -> None:
    with pytest.raises(DeviceError, match="second"):
        Fallback([FakeDevice(script=fail("first")), FakeDevice(script=fail("second"))], probe_every=0).infer(row())


def test_a_late_row_is_started_on_the_next_device_and_the_first_answer_counts() -> None:
    chain = Fallback([Late(0.3), FakeDevice(name="two")], hedge=0.01, probe_every=0)
    output = chain.infer(row())
    assert (output.device, output.fallback) == ("two", "late")
    chain = Fallback([Late(0.01), FakeDevice(name="two", seconds=0.3)], hedge=0.01, probe_every=0)
    assert chain.infer(row()).device == "late"
    chain = Fallback([Late(0.01), FakeDevice(name="two", script=fail())], hedge=0.01, probe_every=0)
    assert chain.infer(row()).device == "late"
    chain = Fallback([Late(0.0, fails=True), FakeDevice(name="two", seconds=0.1)], hedge=0.01, probe_every=0)
    assert chain.infer(row()).device == "two"
    with pytest.raises(DeviceError, match="scripted failure"):
        Fallback([Late(0.0, fails=True), FakeDevice(name="two", script=fail())], hedge=0.01, probe_every=0).infer(row())
    chain.close()
    assert chain._devices[1].closed


def test_a_late_row_goes_down_the_whole_chain() -> None:
    """The second is late as well, the third is the one that answers; a device that is no longer ready is passed over."""
    chain = Fallback([Late(0.5), Late(0.5), FakeDevice(name="three")], hedge=0.01, probe_every=0)
    output = chain.infer(row())
    assert (output.device, output.fallback) == ("three", "late; late")
    down = FakeDevice(name="two", script=fail())
    down.ready = False
    output = Fallback([Late(0.5), down, FakeDevice(name="three")], hedge=0.01, probe_every=0).infer(row())
    assert output.device == "three"
    assert not down.packs
    chain.close()


def test_a_chain_is_read_and_what_is_wrong_with_it_is_named() -> None:
    assert chain("npu, GPU,cpu") == ["npu", "gpu", "cpu"]
    assert chain("auto")[-1] == "cpu"
    for wrong, words in {
        "toaster": "names `toaster`",
        "cpu,npu": "behind `cpu`",
        "npu,npu": "each device once",
        "": "each device once",
        "npu,debug": "only stand alone",
        "auto,cpu": "only stand alone",
    }.items():
        with pytest.raises(SettingsError, match=words):
            chain(wrong)


def test_a_device_is_the_same_however_it_is_written() -> None:
    for written, meant in {"ONNX": "onnx", " Debug,": "debug", "AUTO": "auto", "NPU-sim , cpu": "npu-sim,cpu"}.items():
        assert Settings(device=written).device == meant
    with pytest.raises(SettingsError, match="knows only fp32"):
        Settings(device="ONNX", precision="int8")


def test_no_more_rows_race_than_there_are_places() -> None:
    """Behind a slow device the next one is not flooded: who finds no place waits for the late row."""
    gate = threading.Event()
    first, second = Late(0.2), FakeDevice(name="two", script=lambda pack: gate.wait(5) and None)
    first.streams = first.most_streams = 1
    second.streams = second.most_streams = 1
    chain = Fallback([first, second], hedge=0.01, probe_every=0)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(chain.infer(row()).device)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert answers == ["late"] * 4
    assert len(second.packs) == 1
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


def test_a_row_packed_for_another_device_goes_to_one_that_takes_it() -> None:
    first = FakeDevice(name="one")
    first.takes = lambda shape: False
    output = Fallback([first, FakeDevice(name="two")], probe_every=0).infer(row())
    assert (output.device, output.fallback) == ("two", "one was not ready when the row was packed")
    assert not first.packs


def test_texts_too_long_for_an_accelerator_go_to_the_device_behind_it(tmp_path: Path) -> None:
    settings = Settings(device="npu-sim,cpu", accelerator_tokens=32, compile_cache_mb=0, cache_mb=0, store=tmp_path)
    short, long = "the cat", "the cat sleeps in the red house " * 5
    folder = GOLDEN / "mean"
    with Engine(folder, settings=settings) as engine, Engine(folder, device="cpu") as cpu:
        end = time.monotonic() + 60
        while engine.device.reports()[0].state != "serving" and time.monotonic() < end:
            time.sleep(0.05)
        for text, device, reason in ((short, "npu-sim", ""), (long, "cpu", "npu-sim takes no row for a text that long")):
            result = engine.submit(EmbedRequest(texts=[text])).result(timeout=60).raise_first()
            assert (result.device, result.fallback) == (device, reason)
            np.testing.assert_allclose(result.embeddings, cpu.embed([text]), atol=1e-4)
    with Engine(folder, settings=replace(settings, device="npu-sim")) as alone:  # nothing stands behind it
        assert alone.submit(EmbedRequest(texts=[long])).result(timeout=60).raise_first().device == "npu-sim"
