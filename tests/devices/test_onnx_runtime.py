"""The second runtime: the same vectors as the first for every family, and an answer when the first is killed, hung or wrong."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import GOLDEN
from npu_proxy import DeviceError, Engine, Settings, SettingsError
from npu_proxy.batch import Batch, text_outputs
from npu_proxy.devices import onnx_graph
from npu_proxy.devices.certify import KnownOutputs
from npu_proxy.devices.cpu import OpenVinoCpu
from npu_proxy.devices.onnx_runtime import OnnxRuntime
from npu_proxy.engine.golden import GoldenBatches
from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.models.layout import read_spec
from npu_proxy.targets import device_chain

FOLDERS = sorted(folder for folder in GOLDEN.iterdir() if (folder / "config.json").exists() and not read_spec(folder).refused)
MEAN = GOLDEN / "mean"
TEXTS = [f"the cat sleeps {number}" for number in range(40)]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_family_gives_the_same_in_both_runtimes(folder: Path) -> None:
    spec = read_spec(folder)
    golden = GoldenBatches(RequestTokenizer(spec), spec)
    cpu = OpenVinoCpu(spec, threads=2, golden=golden)
    onnx = OnnxRuntime(spec, threads=2, batch_tokens=512, packed=True, golden=golden)
    try:
        known = KnownOutputs(golden, 0.99999, lambda batch: cpu.submit(batch).result())
        assert known.compare(onnx) > 0.99999
        onnx.probe()
        onnx.probe()
        for shape in cpu.shapes[:5]:
            batch = golden(shape)
            expected, found = (device.submit(batch).result().vectors for device in (cpu, onnx))
            np.testing.assert_allclose(text_outputs(batch, found), text_outputs(batch, expected), atol=2e-4)
    finally:
        cpu.close()
        onnx.close()


def test_the_chain_may_end_in_a_second_runtime_or_put_it_anywhere() -> None:
    assert device_chain("npu, gpu,cpu,ONNX") == ["npu", "gpu", "cpu", "onnx"]
    assert device_chain("onnx,cpu") == ["onnx", "cpu"]
    assert device_chain("cpu,npu") == ["cpu", "npu"]
    for wrong in ("cpu,ir", "cpu,debug", "auto,onnx", "onnx,onnx"):
        with pytest.raises(SettingsError):
            device_chain(wrong)


def test_it_answers_alone_first_or_last_with_the_same_fingerprint() -> None:
    with Engine(MEAN, "cpu") as engine:
        expected, fingerprint = engine.embed(TEXTS), engine.spec.fingerprint
    with Engine(MEAN, "onnx,cpu", Settings(cache_mb=0)) as engine:
        assert engine.spec.fingerprint == fingerprint
        np.testing.assert_allclose(engine.embed(TEXTS), expected, atol=1e-5)
        assert set(engine.stats().counters.executed) == {"onnx"}
        (report, _) = engine.device.reports()
        assert report.certified is not None
        assert report.certified > 0.9999
        for text in TEXTS:
            engine.embed([text])
        assert engine.device.reports()[0].guarded > 0


def test_what_it_cannot_do_is_refused_by_name_when_the_engine_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(onnx_graph, "_RENAMED", {k: v for k, v in onnx_graph._RENAMED.items() if k != "Add"})
        with pytest.raises(DeviceError, match="has the operation Add"):
            Engine(MEAN, "cpu,onnx").start()
    with monkeypatch.context() as patched:
        patched.setattr(onnx_graph, "_LARGEST_BYTES", 1000)
        with pytest.raises(DeviceError, match="too large"):
            Engine(MEAN, "cpu,onnx").start()
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "onnx", None)
        with pytest.raises(SettingsError, match=r"npu-proxy\[onnx\]"):
            Engine(MEAN, "cpu,onnx").start()


def test_two_runtimes_that_differ_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graph, "_RENAMED", {**onnx_graph._RENAMED, "Add": "Sub"})
    with pytest.raises(DeviceError, match="onnx computes golden texts at cosine"):
        Engine(MEAN, "cpu,onnx").start()


# -- the first runtime fails ---------------------------------------------------------------------------------------------


class Trouble:
    """Changes what OpenVINO's CPU device does with a batch, from when it is switched on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, does: Callable[[np.ndarray], np.ndarray]) -> None:
        self.on = threading.Event()
        original = OpenVinoCpu._run

        def run(cpu: OpenVinoCpu, slot: Any, batch: Batch) -> np.ndarray:
            vectors = original(cpu, slot, batch)
            return does(vectors) if self.on.is_set() else vectors

        monkeypatch.setattr(OpenVinoCpu, "_run", run)


@contextmanager
def both(**settings: Any) -> Iterator[tuple[Engine, dict[str, np.ndarray]]]:
    with Engine(MEAN, "cpu", Settings(cache_mb=0)) as engine:
        expected = dict(zip(TEXTS, engine.embed(TEXTS), strict=True))
    quick = {"cache_mb": 0, "breaker_backoff": 0.1, "breaker_longest": 0.2, "probe_interval": 0.0, "profile": False, **settings}
    with Engine(MEAN, "cpu,onnx", Settings(**quick)) as engine:
        yield engine, expected


def ask(engine: Engine, expected: dict[str, np.ndarray], seconds: float, until: Callable[[], bool] = lambda: False) -> int:
    """Embed one text after another, compare every answer, and return how many there were."""
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end and not until():
        text = TEXTS[count % len(TEXTS)]
        np.testing.assert_allclose(engine.embed([text, TEXTS[0]])[0], expected[text], atol=1e-4)
        count += 1
    return count


def fails(_: np.ndarray) -> np.ndarray:
    raise DeviceError("OpenVINO is broken")


WRONG: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "wrong": lambda vectors: np.ascontiguousarray(vectors[..., ::-1]),
    "NaN": lambda vectors: np.full_like(vectors, np.nan),
    "fails": fails,
}


@pytest.mark.parametrize("name", WRONG)
def test_every_answer_is_right_while_the_first_runtime_is_wrong_and_it_serves_again_later(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trouble = Trouble(monkeypatch, WRONG[name])
    with both() as (engine, expected):
        assert ask(engine, expected, 0.3) > 0
        trouble.on.set()
        assert ask(engine, expected, 2.0) > 10
        executed = engine.stats().counters.executed
        assert executed["onnx"] > 10
        assert "cpu" in {report.name for report in engine.device.reports() if report.breaker != "closed"}
        trouble.on.clear()
        ask(engine, expected, 20.0, until=lambda: engine.device.reports()[0].breaker == "closed")
        before = engine.stats().counters.executed["cpu"]
        ask(engine, expected, 0.5)
        assert engine.stats().counters.executed["cpu"] > before


def test_every_answer_is_right_and_in_time_while_the_first_runtime_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def hangs(vectors: np.ndarray) -> np.ndarray:
        release.wait(30)
        return vectors

    trouble = Trouble(monkeypatch, hangs)
    with both(row_timeout=0.1, hedge=0.2) as (engine, expected):
        assert ask(engine, expected, 0.3) > 0
        trouble.on.set()
        begun = time.monotonic()
        assert ask(engine, expected, 3.0) > 10
        assert time.monotonic() - begun < 20
        assert engine.stats().counters.executed["onnx"] > 10
        trouble.on.clear()
        release.set()
        ask(engine, expected, 20.0, until=lambda: engine.device.reports()[0].breaker == "closed")
        before = engine.stats().counters.executed["cpu"]
        ask(engine, expected, 0.5)
        assert engine.stats().counters.executed["cpu"] > before
