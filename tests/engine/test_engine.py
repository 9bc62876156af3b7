"""The engine over a fake device: every text answered once, in order, whatever fails and whoever stops it."""

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import SMALL_SHAPES, fake_engine, golden, smallest_cosine, until_set
from npu_proxy import (
    AsyncEngine,
    DeadlineError,
    DeviceError,
    DType,
    EmbedRequest,
    EmptyInputError,
    Engine,
    InputError,
    OverloadedError,
    Settings,
    StoppedError,
    TooLongError,
)
from npu_proxy.batch import Batch, Output
from npu_proxy.devices.fake import FakeDevice, fail, fake_vector
from npu_proxy.types import Lane

ROOT = Path(__file__).parents[2]
WORDS = "the cat dog house red green blue runs sleeps eats one two three four five moon star".split()
texts_of_words = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=40).map(" ".join), min_size=1, max_size=40)


def gate() -> tuple[threading.Event, FakeDevice]:
    """A device that answers only when the event is set."""
    event = threading.Event()
    return event, FakeDevice(width=32, shapes=SMALL_SHAPES, script=until_set(event))


@pytest.fixture(scope="module")
def shared() -> Iterator[Engine]:
    with fake_engine(FakeDevice(width=32, shapes=SMALL_SHAPES)) as engine:
        yield engine


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(texts_of_words, min_size=1, max_size=5))
def test_every_text_is_answered_once_in_order_and_alone(shared: Engine, requests: list[list[str]]) -> None:
    callbacks: dict[int, int] = {}
    futures = []
    for number, texts in enumerate(requests):
        future = shared.submit(EmbedRequest(texts=texts, normalize=False))
        future.add_done_callback(lambda _, number=number: callbacks.__setitem__(number, callbacks.get(number, 0) + 1))
        futures.append(future)
    for texts, future in zip(requests, futures, strict=True):
        result = future.result(timeout=20).raise_first()
        for text, vector in zip(texts, result.embeddings, strict=True):
            # What the fake gives to these ids, whoever shared the batch.
            ids = shared.tokenizer.plain([text])[0].ids
            np.testing.assert_array_equal(vector, fake_vector(ids.tolist(), 32))
    assert callbacks == dict.fromkeys(range(len(requests)), 1)
    assert isinstance(shared.device, FakeDevice)
    for batch in shared.device.batches:
        assert all(np.count_nonzero(bin >= 0) <= batch.shape.positions for bin in batch.inputs["segment_ids"])


def test_equal_texts_in_flight_are_embedded_once() -> None:
    event, device = gate()
    with fake_engine(device) as engine:
        first = engine.submit(EmbedRequest(texts=["the moon"] * 3))
        second = engine.submit(EmbedRequest(texts=["the moon", "a star"]))
        time.sleep(0.05)
        event.set()
        assert np.ptp(first.result(5).embeddings, axis=0).max() == 0
        second.result(5).raise_first()
        assert sum(len(batch.encodings) for batch in device.batches) <= 3  # two distinct texts, one of them perhaps begun twice


def test_a_device_failure_fails_its_jobs_and_the_engine_goes_on() -> None:
    calls: list[Batch] = []

    def script(batch: Batch) -> None:
        calls.append(batch)
        if len(calls) == 1:
            raise RuntimeError("something nobody foresaw")
        if len(calls) == 2:
            fail("lost")(batch)

    with fake_engine(FakeDevice(width=32, shapes=SMALL_SHAPES, script=script)) as engine:
        with pytest.raises(Exception, match="the device failed: RuntimeError"):
            engine.embed(["the cat"])
        with pytest.raises(DeviceError, match="lost"):
            engine.embed(["the cat"])
        assert engine.embed(["the cat"]).shape == (1, 32)
        assert all(engine.stats().stages.values())


def test_numbers_that_are_not_finite_fail_their_text_alone() -> None:
    class Rotten(FakeDevice):
        def infer(self, batch: Batch) -> Output:
            output = super().infer(batch)
            for encoding, slot in zip(batch.encodings, batch.slots, strict=True):
                if encoding.tokens == 5:
                    output.vectors[slot.bin, slot.segment, 3] = np.nan
            return output

    with fake_engine(Rotten(width=32, shapes=SMALL_SHAPES)) as engine:
        result = engine.submit(EmbedRequest(texts=["cat", "cat dog moon", "dog"])).result(5)
        assert [type(error) for error in result.errors] == [type(None), DeviceError, type(None)]
        assert np.isnan(result.embeddings[1]).all()
        assert np.isfinite(np.asarray(result.embeddings)[[0, 2]]).all()


def test_one_bad_text_fails_alone() -> None:
    with fake_engine() as engine:
        texts = ["cat", "", "dog", "\ud800", [5, 6], [10**6], []]
        result = engine.submit(EmbedRequest(texts=texts)).result(5)
        kinds = [error.kind if error else "" for error in result.errors]
        assert kinds == ["", "empty", "", "invalid", "", "invalid", "empty"]
        with pytest.raises(EmptyInputError, match="text is empty"):
            engine.embed(["cat", ""])


def test_stop_while_busy_resolves_every_future() -> None:
    event, device = gate()
    engine = fake_engine(device).start()
    futures = [engine.submit(EmbedRequest(texts=[f"{word} {n}" for word in WORDS])) for n in range(20)]
    threading.Timer(0.3, event.set).start()
    engine.stop(drain=0.05)
    done, open_ = wait(futures, timeout=10)
    assert not open_
    kinds = {error.kind if error else "" for future in done for error in future.result().errors}
    assert "stopped" in kinds
    with pytest.raises(StoppedError):
        engine.embed(["cat"])


def test_a_drain_finishes_what_is_open() -> None:
    device = FakeDevice(width=32, shapes=SMALL_SHAPES, seconds=0.01)
    engine = fake_engine(device).start()
    futures = [engine.submit(EmbedRequest(texts=WORDS)) for _ in range(5)]
    engine.stop(drain=20)
    for future in futures:
        future.result(0).raise_first()
    assert device.closed


def test_start_and_stop_from_many_threads_at_once() -> None:
    for _ in range(5):
        engine = fake_engine()
        failures: list[BaseException] = []

        def act(number: int, engine: Engine = engine, failures: list[BaseException] = failures) -> None:
            try:
                (engine.start if number % 2 else engine.stop)()
            except StoppedError:
                pass
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=act, args=(n,)) for n in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not failures
        engine.stop()
        assert engine.state == "stopped"
    assert not [thread for thread in threading.enumerate() if thread.name == "npu-proxy-infer-9"]


def test_a_deadline_answers_in_time_even_when_the_device_hangs() -> None:
    event, device = gate()
    with fake_engine(device) as engine:
        begun = time.monotonic()
        with pytest.raises(DeadlineError, match=r"within 0\.2 seconds"):
            engine.embed(["cat"], timeout=0.2)
        assert time.monotonic() - begun < 5
        event.set()
        assert engine.embed(["cat"]).shape == (1, 32)


def test_cancelled_requests_cost_no_inference() -> None:
    event, device = gate()
    with fake_engine(device) as engine:
        blockers: list[Future] = []
        for number, word in enumerate(("moon", "star"), 1):  # one batch for each of the two streams
            blockers.append(engine.submit(EmbedRequest(texts=[word])))
            while len(device.batches) < number:
                time.sleep(0.001)
        future = engine.submit(EmbedRequest(texts=["cat dog"]))
        assert future.cancel()
        event.set()
        for blocker in blockers:
            blocker.result(5)
        engine.embed(["tree"])
        with pytest.raises(CancelledError):
            future.result(0)
        ids = engine.tokenizer.plain(["cat dog"])[0].ids
        assert not any(np.array_equal(encoding.ids, ids) for batch in device.batches for encoding in batch.encodings)


def test_overload_is_refused_when_it_is_submitted() -> None:
    event, device = gate()
    with fake_engine(device, max_queue_items=20) as engine:
        futures = [engine.submit(EmbedRequest(texts=[f"{word} {n}" for word in WORDS[:10]])) for n in range(2)]
        with pytest.raises(OverloadedError, match="raise `max_queue_items`") as caught:
            engine.submit(EmbedRequest(texts=["one more"]))
        assert caught.value.retry_after >= 1
        event.set()
        for future in futures:
            future.result(5).raise_first()
        engine.embed(["one more"])
        assert engine.stats().counters.refused == 1


def test_a_request_larger_than_the_limit_is_taken_when_nothing_waits() -> None:
    with fake_engine(max_queue_items=10) as engine:
        assert engine.submit(EmbedRequest(texts=WORDS)).result(5).raise_first()


def test_streams_are_ordered_lazy_and_bounded(shared: Engine) -> None:
    read = [0]

    def endless() -> Iterator[str]:
        while True:
            read[0] += 1
            yield f"{WORDS[read[0] % 7]} {WORDS[read[0] % 11]}"

    stream = shared.stream(endless(), batch_size=16, normalize=False)
    vectors = [next(stream) for _ in range(100)]
    assert isinstance(stream, Generator)
    stream.close()
    assert read[0] < 100 + 1024 + 64
    for number, vector in enumerate(vectors, 1):
        text = f"{WORDS[number % 7]} {WORDS[number % 11]}"
        np.testing.assert_array_equal(vector, shared.embed([text], normalize=False)[0])


def test_a_stream_waits_where_a_request_would_be_refused() -> None:
    with fake_engine(FakeDevice(width=32, shapes=SMALL_SHAPES, seconds=0.002), max_queue_items=40) as engine:
        vectors = list(engine.stream((f"{WORDS[n % 17]} {n}" for n in range(300)), batch_size=16))
        assert len(vectors) == 300


def test_parallel_workers_give_the_same_vectors_in_order() -> None:
    folder, texts, vectors = golden("mean")
    with Engine(folder) as engine:
        found = np.stack(list(engine.stream(texts * 8, batch_size=5, parallel=2, normalize=False)))
    assert smallest_cosine(found, np.concatenate([vectors] * 8)) >= 0.99999


def test_a_worker_that_cannot_start_is_an_error_not_a_hang(tmp_path: Path) -> None:
    engine = Engine(tmp_path / "nothing")
    with pytest.raises(DeviceError, match="worker process"):
        list(engine.stream(["a"], parallel=1))


def test_options_do_what_they_say() -> None:
    folder, texts, vectors = golden("mean")
    with Engine(folder) as engine:
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        np.testing.assert_allclose(engine.embed(texts), unit, atol=1e-4)
        cut = engine.embed(texts, dimensions=8)
        np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, rtol=1e-5)
        assert smallest_cosine(cut, vectors[:, :8]) > 0.9999
        assert engine.embed(texts, dtype="float16").dtype == np.float16
        assert engine.embed(texts, dtype=DType.UBINARY).shape == (len(texts), 4)
        query = engine.embed(["cat"], input_type="query")
        np.testing.assert_array_equal(query, engine.embed(["one two cat"]))
        np.testing.assert_array_equal(query, engine.embed(["cat"], prompt_name="query"))
        assert engine.embed_query("cat") == query[0].tolist()
        assert len(engine.embed_documents(["cat", "dog"])) == 2
        long = "sea " * 100 + "moon"
        assert not np.array_equal(engine.embed([long]), engine.embed([long], truncate="start"))
        with pytest.raises(TooLongError, match="48 tokens, however you requested 103"):
            engine.embed([long], truncate="error")
        mistakes: list[dict[str, Any]] = [
            {"dimensions": 0},
            {"dimensions": 33},
            {"dtype": "int4"},
            {"prompt_name": "no"},
            {"truncate": "middle"},
        ]
        for wrong in mistakes:
            with pytest.raises(InputError):
                engine.embed(["cat"], **wrong)
        with pytest.raises(InputError, match="divisible by 8"):
            engine.embed(["cat"], dtype="binary", dimensions=9)
        with pytest.raises(InputError, match="in a list"):
            engine.embed("cat")
        with pytest.raises(EmptyInputError):
            engine.embed([])


def test_async_engine() -> None:
    folder, texts, vectors = golden("mean")

    async def run() -> None:
        async with AsyncEngine(folder) as engine:
            await asyncio.gather(engine.astart(), engine.astart())
            first, second = await asyncio.gather(engine.embed(texts), engine.embed(texts[::-1]))
            np.testing.assert_allclose(first, second[::-1], atol=1e-5)
            streamed = [vector async for vector in engine.stream(iter(texts * 3), batch_size=4, normalize=False)]
            assert smallest_cosine(np.stack(streamed), np.concatenate([vectors] * 3)) > 0.99999
            task = asyncio.create_task(engine.embed(["cat"]))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await asyncio.gather(engine.astop(), engine.astop())

    asyncio.run(run())


def test_aging_and_lanes_in_the_running_engine() -> None:
    """Interactive texts overtake a deep bulk queue."""
    device = FakeDevice(width=32, streams=1, shapes=SMALL_SHAPES, seconds=0.002)
    with fake_engine(device, aging=0.05) as engine:
        bulk = [engine.submit(EmbedRequest(texts=[f"{w} {v} {n}" for w in WORDS for v in WORDS])) for n in range(4)]
        quick: Future = engine.submit(EmbedRequest(texts=["the moon"]))
        quick.result(5)
        assert not all(future.done() for future in bulk)
        for future in bulk:
            future.result(30).raise_first()


def test_settings_refuse_nonsense() -> None:
    from npu_proxy import SettingsError

    mistakes: list[dict[str, Any]] = [{"device": "toaster"}, {"window": 0}, {"timeout": 0}, {"row_tokens": 8}, {"threads": -1}]
    for wrong in mistakes:
        with pytest.raises(SettingsError, match=f"`{next(iter(wrong))}`"):
            Settings(**wrong)


def test_workers_that_read_different_versions_of_a_model_are_not_mixed() -> None:
    from types import SimpleNamespace

    from npu_proxy.engine.parallel import SameModel

    same_model = SameModel()
    results: list[Any] = [SimpleNamespace(fingerprint=version) for version in ("a", "a", "b")]
    assert same_model(results[:2]) == results[:2]
    with pytest.raises(DeviceError, match="different versions of the model"):
        same_model(results[1:])


def test_what_cannot_be_done_in_time_is_refused_at_once_and_counted() -> None:
    device = FakeDevice(shapes=SMALL_SHAPES, seconds=0.1)
    with fake_engine(device, cache_mb=0) as engine:
        engine.embed([f"so that it knows how fast it is {number}" for number in range(64)])
        first = engine.submit(EmbedRequest(texts=[f"the cat {number}" for number in range(200)], lane=Lane.BULK))
        started = time.monotonic()
        with pytest.raises(OverloadedError, match="too long for a request") as error:
            engine.submit(EmbedRequest(texts=["the dog"] * 200, lane=Lane.BULK, deadline=time.monotonic() + 0.3))
        assert time.monotonic() - started < 5
        assert error.value.retry_after >= 1
        assert engine.stats().counters.refused == 1
        assert engine.submit(EmbedRequest(texts=["soon"], lane=Lane.INTERACTIVE)).result().errors == (None,)
        first.cancel()


def test_answered_requests_are_forgotten_whatever_their_deadline() -> None:
    import weakref

    device = FakeDevice()
    with fake_engine(device, cache_mb=0) as engine:
        engine.embed(["a"])
        now = time.monotonic()
        held = engine.submit(EmbedRequest(texts=["b"], deadline=now + 5))
        assert engine._pipeline is not None
        pending = engine._pipeline._pending
        gone: list[weakref.ref[Future]] = []
        for number in range(20):
            future = engine.submit(EmbedRequest(texts=[f"c {number}"], deadline=now + 3000))
            gone.append(weakref.ref(future))
            future.result()
            del future
        held.result()
        device.batches.clear()  # the fake remembers every batch
        gc.collect()
        assert not pending
        assert sum(reference() is not None for reference in gone) <= 2  # what a stage's thread has in hand


def test_a_slow_first_batch_of_one_text_refuses_nobody() -> None:
    release = threading.Event()
    device = FakeDevice(shapes=SMALL_SHAPES, streams=1, script=until_set(release, 0.5))
    with fake_engine(device, cache_mb=0) as engine:
        engine.embed(["a"])  # two tokens in half a second
        release.set()
        still_open = engine.submit(EmbedRequest(texts=["b"]))
        many = engine.submit(EmbedRequest(texts=[f"the cat {number}" for number in range(2000)], lane=Lane.BULK))
        assert still_open.result().errors == (None,)
        assert set(many.result().errors) == {None}


def test_a_program_that_forgets_to_stop_ends_in_peace() -> None:
    program = (
        "from npu_proxy import EmbedRequest, Engine, Pair, Settings\n"
        f"engine = Engine({str(ROOT / 'examples' / 'models' / 'scifact-reranker')!r}, device='cpu').start()\n"
        "pairs = [Pair(f'claim {number}', 'word ' * 600) for number in range(2000)]\n"
        "engine.submit(EmbedRequest(texts=pairs, output_type='scores'))\n"
        "while not engine.stats().counters.batches: pass\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
