"""A worker process on its own: batches through shared memory, everything it may die or hang of, and what is left of it."""

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from conftest import SMALL_SHAPES, golden, smallest_cosine
from npu_proxy.batch import Batch, BatchShape, Output, text_outputs
from npu_proxy.devices.failure import BatchError, Failure
from npu_proxy.devices.worker.faults import Fault
from npu_proxy.devices.worker.process import WorkerLimits, WorkerProcess, WorkerTask
from npu_proxy.devices.worker.shared_memory import MemoryLayout
from npu_proxy.engine.packing import fill_bins, pack
from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.models.layout import read_spec
from npu_proxy.targets import TARGETS

FOLDER, TEXTS, VECTORS = golden("mean")
SPEC = read_spec(FOLDER)
TASK = WorkerTask(target=TARGETS["npu-sim"], spec=SPEC, properties={"INFERENCE_NUM_THREADS": 2}, slots=2, faults=True)
LAYOUT = MemoryLayout(shapes=SMALL_SHAPES, layout=SPEC.batch_layout, slots=2)
ENCODINGS = RequestTokenizer(SPEC).plain(TEXTS)
SECONDS = 30
"""The longest that any test waits for anything."""
PATIENT = WorkerLimits(compile=60, batch=60, heartbeat=60)
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, or stops a process")


def batch_of(*indices: int, shape: BatchShape = SMALL_SHAPES[0]) -> Batch:
    """A batch of some of the golden texts."""
    encodings = [ENCODINGS[index] for index in indices]
    plan = fill_bins([encoding.tokens for encoding in encodings], shape)
    assert sorted(plan.indices) == list(range(len(encodings)))
    return pack(encodings, plan, SPEC.batch_layout)


def expected(batch: Batch) -> np.ndarray:
    """The golden vectors of a batch's texts, in the order of its slots."""
    own = {encoding.key: vector for encoding, vector in zip(ENCODINGS, VECTORS, strict=True)}
    return np.stack([own[encoding.key] for encoding in batch.encodings])


def check_right(batch: Batch, output: Output) -> None:
    assert smallest_cosine(text_outputs(batch, output.vectors), expected(batch)) > 0.9999
    assert output.device == "npu-sim"
    assert output.seconds > 0


def compute(worker: WorkerProcess, *indices: int, shape: BatchShape = SMALL_SHAPES[0]) -> None:
    batch = batch_of(*indices, shape=shape)
    check_right(batch, worker.submit(batch, SECONDS).result(SECONDS))


def failure_of(future: Future[Output]) -> Failure:
    error = future.exception(SECONDS)
    assert isinstance(error, BatchError), error
    return error.failure


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.005)


def wait_busy(worker: WorkerProcess) -> None:
    """Until a batch has been sent to the process."""
    until(lambda: any(slot.since for slot in worker.slots))


@contextmanager
def started(fault: Fault = Fault.NONE, *, open_slots: int = 2) -> Iterator[WorkerProcess]:
    """A worker that has compiled, unless its fault is that it does not."""
    worker = WorkerProcess(TASK, LAYOUT, fault=fault)
    try:
        if open_slots:
            worker.hello(SECONDS)
            worker.open(range(open_slots))
        yield worker
    finally:
        worker.kill()


@pytest.fixture(scope="module")
def worker() -> Iterator[WorkerProcess]:
    """One that the tests leave as they found it."""
    with started() as made:
        yield made


# -- a worker that works -------------------------------------------------------------------------------------------------


def test_it_says_what_it_runs_on_and_computes_every_shape(worker: WorkerProcess) -> None:
    assert worker.trouble(PATIENT) is None
    for shape in SMALL_SHAPES:
        compute(worker, 0, shape=shape)
        compute(worker, 2, 0, 1, shape=shape)
    compute(worker, 3, 1, 0, 2, shape=SMALL_SHAPES[1])


def test_batches_at_once_do_not_mix_and_an_output_is_the_callers_own(worker: WorkerProcess) -> None:
    batches = [batch_of(number % len(TEXTS)) for number in range(12)]
    outputs = [worker.submit(batch, SECONDS) for batch in batches]
    for batch, output in zip(batches, outputs, strict=True):  # the memory of the first has been used again since
        check_right(batch, output.result(SECONDS))
    assert outputs[0].result().vectors.base is None


@pytest.mark.parametrize(("fault", "failure"), [(Fault.ERROR, Failure.ERROR), (Fault.LOST, Failure.LOST)])
def test_an_error_fails_its_batch_and_the_next_one_is_right(worker: WorkerProcess, fault: Fault, failure: Failure) -> None:
    worker.inject(fault)
    assert failure_of(worker.submit(batch_of(0), SECONDS)) is failure
    compute(worker, 0, 1)
    assert worker.trouble(PATIENT) is None


def test_it_compiles_again_when_asked_to_in_the_same_process(worker: WorkerProcess) -> None:
    pid = worker.process.pid
    worker.recompile(SECONDS)
    hello = worker.hello(SECONDS)
    assert hello.slots == 2
    worker.open(range(2))
    assert hello.seconds > 0
    assert hello.openvino
    assert (hello.failure, hello.error) == ("", "")
    compute(worker, 1, 2)
    assert worker.process.pid == pid


def test_a_failed_compilation_is_told_and_another_may_succeed(worker: WorkerProcess) -> None:
    worker.inject(Fault.COMPILE_FAIL)
    worker.recompile(SECONDS)
    with pytest.raises(BatchError) as caught:
        worker.hello(SECONDS)
    assert caught.value.failure is Failure.COMPILE
    assert isinstance(worker.submit(batch_of(0), SECONDS, 0).exception(SECONDS), BatchError)  # it has no graph
    worker.inject(Fault.NONE)
    worker.recompile(SECONDS)
    worker.hello(SECONDS)
    worker.open(range(2))
    compute(worker, 0)


@linux
def test_a_worker_that_gives_no_sign_of_life_hangs_until_it_does(worker: WorkerProcess) -> None:
    limits = WorkerLimits(compile=60, batch=60, heartbeat=1.0)
    os.kill(worker.process.pid, signal.SIGSTOP)
    try:
        until(lambda: worker.trouble(limits))
        trouble = worker.trouble(limits)
        assert trouble is not None
        assert trouble.failure is Failure.HANG
    finally:
        os.kill(worker.process.pid, signal.SIGCONT)
    until(lambda: worker.trouble(limits) is None)
    compute(worker, 0)


# -- one that does not ---------------------------------------------------------------------------------------------------


def test_a_worker_that_dies_takes_its_batch_along_and_says_how() -> None:
    with started() as worker:
        worker.inject(Fault.HANG)
        under_way = worker.submit(batch_of(0), SECONDS)
        wait_busy(worker)
        assert not under_way.done()
        worker.process.kill()
        assert failure_of(under_way) is Failure.CRASH
        worker.process.wait(SECONDS)
        trouble = worker.trouble(PATIENT)
        assert trouble is not None
        assert trouble.failure is Failure.CRASH
        assert f"{int(signal.SIGKILL)}" in str(trouble)
        assert failure_of(worker.submit(batch_of(1), SECONDS)) is Failure.CRASH
        with pytest.raises(BatchError) as caught:
            worker.hello(SECONDS)
        assert caught.value.failure is Failure.CRASH


def test_a_batch_that_is_not_done_in_time_is_given_up_and_none_follows() -> None:
    with started(open_slots=1) as worker:
        worker.inject(Fault.HANG)
        assert failure_of(worker.submit(batch_of(0), 0.3)) is Failure.HANG
        begun = time.monotonic()
        assert failure_of(worker.submit(batch_of(1), SECONDS)) is Failure.HANG  # at once: its slot may still be written to
        with pytest.raises(BatchError) as caught:
            worker.recompile(SECONDS)
        assert caught.value.failure is Failure.HANG
        assert time.monotonic() - begun < 5
        assert worker.trouble(PATIENT) is None  # it is alive
        trouble = worker.trouble(WorkerLimits(compile=60, batch=0.2, heartbeat=60))
        assert trouble is not None
        assert trouble.failure is Failure.HANG


def test_a_compilation_that_hangs_ends_by_its_limit_and_nothing_gets_in_before() -> None:
    with started(Fault.COMPILE_HANG, open_slots=0) as worker:
        assert failure_of(worker.submit(batch_of(0), 0.05)) is Failure.BUSY
        with pytest.raises(BatchError) as caught:
            worker.hello(0.2)
        assert caught.value.failure is Failure.COMPILE
        assert "`compile_timeout`" in str(caught.value)


def mapped() -> int:
    """How many times this process maps the memory of a worker."""
    return Path("/proc/self/maps").read_text().count("memfd:npu-proxy")


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def kill_while_busy() -> None:
    before = descriptors()
    with started(open_slots=1) as worker:
        assert mapped() > 0
        pid = worker.process.pid
        worker.inject(Fault.HANG)
        futures = [worker.submit(batch_of(0), SECONDS), worker.submit(batch_of(1), SECONDS)]
        wait_busy(worker)
        worker.kill(BatchError(Failure.NUMBERS, "a reason of its own"))
        error = futures[0].exception(SECONDS)
        assert isinstance(error, BatchError)
        assert (error.failure, str(error)) == (Failure.NUMBERS, "a reason of its own")
        assert isinstance(futures[1].exception(SECONDS), BatchError)
        assert isinstance(worker.submit(batch_of(0), SECONDS).exception(SECONDS), BatchError)
        assert worker.process.returncode == -signal.SIGKILL
        assert not Path(f"/proc/{pid}").exists()
        assert descriptors() == before + 1  # the map of the memory has its own, until the object is gone


@linux
def test_killing_it_wakes_those_who_wait_and_leaves_nothing(worker: WorkerProcess) -> None:
    compute(worker, 0)  # so that its thread is there before
    gc.collect()
    before = (mapped(), descriptors(), threading.active_count())
    kill_while_busy()
    gc.collect()
    assert (mapped(), descriptors(), threading.active_count()) == before
