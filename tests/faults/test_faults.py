"""Every fault under a thousand concurrent requests: each answered once, correctly, in time, by the device the result names."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import CASES
from load import Figures, Load, accelerator, expected_vectors, faulty_components, faulty_engine, texts

from conftest import golden
from npu_proxy import DeviceError, EmbedRequest, EmbedResult, Engine, Settings, StoppedError, UnavailableError
from npu_proxy.devices.worker.faults import Fault
from npu_proxy.system import available_threads
from npu_proxy.targets import TARGETS

QUICK: dict[str, Any] = {
    "heartbeat_timeout": 1.0,
    "row_timeout": 2.0,
    "compile_timeout": 20.0,
    "breaker_longest": 1.0,
    "breaker_backoff": 0.1,
    "probe_interval": 0.0,
    "compile_cache_mb": 0,
    "cache_mb": 0,
}
MODEL = str(golden("mean")[0])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def expected(store: Path) -> dict[str, np.ndarray]:
    return expected_vectors(MODEL, store, texts(2000))


@pytest.fixture
def engine(store: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    running = faulty_engine(model=MODEL, store=store, **(QUICK | getattr(request, "param", {})))
    yield running
    running.stop(0)


def ask(engine: Engine, text: str = "the cat sleeps") -> EmbedResult:
    return engine.submit(EmbedRequest(texts=[text])).result(timeout=40)


def figures_of(name: str, engine: Engine, expected: dict[str, np.ndarray]) -> Figures:
    """Inject a fault under load, wait until the device is back, and go on for a while; nothing is wrong or lost."""
    load = Load(engine, expected)
    load.wait_for(300)
    CASES[name](engine, load)
    assert load.wait_back(60) < 60
    load.wait_for(1500)
    figures = load.finish()
    assert (figures.wrong, figures.twice, figures.lost) == (0, 0, 0), figures
    assert not figures.errors, figures.reasons
    return figures


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_fault_loses_nothing_and_the_device_comes_back(name: str, engine: Engine, expected: dict[str, np.ndarray]) -> None:
    figures = figures_of(name, engine, expected)
    assert figures.right + figures.errors.total() == figures.requests
    assert figures.late <= 1
    # The device that the results name is the one that the metrics count.
    assert set(figures.devices) == {"npu-sim", "cpu"}
    counters = engine.stats().counters
    for device, answers in figures.devices.items():
        assert counters.executed[device] <= answers <= counters.executed[device] + counters.merged
    assert counters.fallbacks["cpu"] == counters.executed["cpu"]
    assert ask(engine).device == "npu-sim"


def test_wrong_vectors_are_found_by_the_probe(engine: Engine) -> None:
    assert ask(engine).device == "npu-sim"
    accelerator(engine).inject(Fault.WRONG)
    with pytest.raises(DeviceError, match="cosine"):
        engine.device.probe()
    result = ask(engine)
    assert result.device == "cpu"
    assert "cosine" in result.fallback
    accelerator(engine).inject(Fault.NONE)


def test_a_device_that_never_was_right_is_quarantined_and_stays_quarantined(tmp_path: Path) -> None:
    settings = QUICK | {"model": MODEL, "store": tmp_path}
    for fault in (Fault.WRONG, Fault.NONE):  # the second time nothing is wrong, but the verdict is known
        engine = Engine(settings=Settings(device="npu-sim,cpu", **settings), components=faulty_components(fault)).start()
        try:
            assert accelerator(engine).wait_decided(30)
            report = engine.device.reports()[0]
            assert report.state == "quarantined"
            assert "cosine" in report.reason
            result = ask(engine)
            assert result.device == "cpu"
            assert "quarantined" in result.fallback
        finally:
            engine.stop(0)


def test_a_slot_that_is_wrong_from_the_start_is_compiled_again_before_it_serves(tmp_path: Path) -> None:
    settings = QUICK | {"model": MODEL, "store": tmp_path}
    components = faulty_components(Fault.SLOT_AT_START)
    engine = Engine(settings=Settings(device="npu-sim,cpu", **settings), components=components).start()
    try:
        assert accelerator(engine).wait_decided(60)
        report = engine.device.reports()[0]
        assert (report.state, report.reason, report.slots) == ("serving", "", available_threads())
        assert report.certified is not None
        assert report.certified > 0.9999
        assert report.examined == 1
    finally:
        engine.stop(0)


def test_the_probe_examines_slots_and_shapes_in_turn(engine: Engine) -> None:
    device = accelerator(engine)
    for fault, count in ((Fault.NONE, 20), (Fault.SLOT_WEIGHTS, 0)):
        device.inject(fault)
        for _ in range(count):
            device.probe()

    def probe_all() -> None:
        for _ in range(20):  # one of the slots is wrong
            device.probe()

    with pytest.raises(DeviceError, match="cosine"):
        probe_all()
    assert not device.ready


def test_a_doubted_device_returns_after_an_examination(engine: Engine) -> None:
    device = accelerator(engine)
    device.doubt("two computations of a batch differ")
    assert ask(engine).device == "cpu"
    end = time.monotonic() + 30
    while not device.ready and time.monotonic() < end:
        threading.Event().wait(0.05)
    assert ask(engine).device == "npu-sim"


@pytest.mark.parametrize("engine", [{"fallback": False}], indirect=True)
def test_without_fallback_there_is_a_clear_error_and_then_an_answer_again(engine: Engine) -> None:
    assert [report.name for report in engine.device.reports()] == ["npu-sim"]
    accelerator(engine).inject(Fault.LOST)
    error = ask(engine).errors[0]
    assert error is not None
    assert "DEVICE_LOST" in str(error)
    end = time.monotonic() + 30
    while (error := (result := ask(engine)).errors[0]) is not None and time.monotonic() < end:
        assert isinstance(error, UnavailableError)
        assert "recovering" in str(error)
        threading.Event().wait(0.05)
    assert result.device == "npu-sim"


@pytest.mark.parametrize("engine", [{"hedge": 0.2, "row_timeout": 20.0}], indirect=True)
def test_a_late_batch_is_answered_by_the_next_device_first(engine: Engine) -> None:
    assert ask(engine).device == "npu-sim"
    accelerator(engine).inject(Fault.SLOW)
    start = time.monotonic()
    result = ask(engine, "a text of its own")
    assert result.device == "cpu"
    assert "did not finish a batch in time" in result.fallback
    assert time.monotonic() - start < 2.5
    assert accelerator(engine).ready


@pytest.mark.parametrize("engine", [{"hedge": 0.2, "row_timeout": 20.0, "requests": 1}], indirect=True)
def test_batches_behind_a_hanging_one_do_not_wait_for_it(engine: Engine) -> None:
    """The only slot hangs for longer than the requests may take: each of them goes to the next device in time."""
    accelerator(engine).inject(Fault.HANG)
    start = time.monotonic()
    answers = [ask(engine, f"text {number} of its own") for number in range(5)]
    assert {answer.device for answer in answers} == {"cpu"}
    assert time.monotonic() - start < 10


def test_an_absent_device_costs_nothing(store: Path) -> None:
    """Its thread looks for it now and then, and waits in between."""
    if not TARGETS["npu"].missing():
        pytest.skip("this machine has an NPU")
    with Engine(settings=Settings(device="npu,cpu", model=(MODEL,), store=store, **QUICK)) as engine:
        accelerator(engine).wait_decided(10)
        threading.Event().wait(0.5)
        start = time.process_time()
        threading.Event().wait(1.0)
        assert time.process_time() - start < 0.3
        report = engine.device.reports()[0]
        assert (report.state, report.worker_pid) == ("absent", None)
        assert "modprobe intel_vpu" in report.reason
        assert ask(engine).device == "cpu"


def test_an_engine_that_waits_for_its_only_device_can_be_stopped(store: Path) -> None:
    slow: dict[str, Any] = {**QUICK, "compile_timeout": 60.0}
    settings = Settings(device="npu-sim", model=(MODEL,), store=store, **slow)
    engine = Engine(settings=settings, components=faulty_components(Fault.COMPILE_HANG))
    failures: list[Exception] = []

    def start() -> None:
        try:
            engine.start()
        except UnavailableError as error:
            failures.append(error)

    starting = threading.Thread(target=start)
    starting.start()
    threading.Event().wait(1.0)
    begun = time.monotonic()
    engine.stop()
    starting.join(10)
    assert time.monotonic() - begun < 8
    assert "compiling" in str(failures[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_told_that_the_engine_is_not_its_own(engine: Engine) -> None:
    child = os.fork()
    if not child:
        code = 1
        try:
            engine.embed(["one"])
        except StoppedError as error:
            engine.stop()
            code = 0 if "fork" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert ask(engine).device == "npu-sim"


def test_a_signal_to_the_whole_group_leaves_the_drain_its_worker(engine: Engine) -> None:
    worker = engine.device.reports()[0].worker_pid
    assert worker is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker, number)
    assert not gone(worker, 0.5)
    assert ask(engine).device == "npu-sim"


def test_a_damaged_certificate_is_no_certificate(tmp_path: Path) -> None:
    settings = QUICK | {"model": MODEL, "store": tmp_path}
    faulty_engine(**settings).stop(0)
    stored = list((tmp_path / "certificates").glob("*.json"))
    assert stored
    for file in stored:
        file.write_bytes(b'{"subject": "\xff\xfe"')
    engine = faulty_engine(**settings)
    assert ask(engine).device == "npu-sim"
    engine.stop(0)


OWNER = """
import sys
from pathlib import Path
from npu_proxy import Engine, Settings
engine = Engine(settings=Settings(model=sys.argv[1], store=Path(sys.argv[2]), device="npu-sim,cpu")).start()
engine.device._devices[0].wait_decided(60)
print("pid", engine.device.reports()[0].worker_pid, flush=True)
sys.stdin.read()
"""


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process has ended (a zombie has) within some time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        threading.Event().wait(0.05)
    return False


def named_memory(pid: int) -> set[Path]:
    """The files in /dev/shm that a process has mapped or open; other tests have theirs there at the same time."""
    names = [line.split(maxsplit=5)[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed in the meantime
            names.append(str(link.readlink()))
    return {Path(name) for name in names if name.startswith("/dev/shm/")}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("stop_worker", [False, True])
def test_killing_the_owner_leaves_no_worker_and_no_memory(store: Path, stop_worker: bool) -> None:
    command = [sys.executable, "-c", OWNER, MODEL, str(store)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        found = re.match(r"pid (\d+)", owner.stdout.readline())
        assert found is not None
        worker = int(found[1])
        assert not named_memory(owner.pid) | named_memory(worker)  # memory without a name cannot be left behind
        if stop_worker:
            os.kill(worker, signal.SIGSTOP)
        owner.kill()
        assert gone(worker)


def test_stopping_the_engine_ends_the_worker(store: Path) -> None:
    engine = faulty_engine(model=MODEL, store=store, **QUICK)
    worker = engine.device.reports()[0].worker_pid
    assert worker is not None
    device = engine.device
    engine.stop()
    assert gone(worker)
    assert device.reports()[0].state == "stopped"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["killed ten times", "hangs in the batch", "a slot with other weights"])
def test_the_second_runtime_answers_while_the_first_is_killed_hangs_or_is_wrong(
    name: str, store: Path, expected: dict[str, np.ndarray]
) -> None:
    engine = faulty_engine(model=MODEL, store=store, **(QUICK | {"device": "npu-sim,onnx"}))
    try:
        assert set(figures_of(name, engine, expected).devices) == {"npu-sim", "onnx"}
    finally:
        engine.stop(0)
