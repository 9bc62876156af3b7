"""The three stages over a fake device: each text answered once, whichever stage fails, and whoever goes, waits or stops."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from conftest import GOLDEN
from npu_proxy import DeadlineError, DeviceError, EmbedRequest, InputError, NpuProxyError, StoppedError
from npu_proxy.batch import Batch, BatchShape, Encoding, Output
from npu_proxy.devices.fake import FakeDevice, fail, fake_vector
from npu_proxy.engine import pipeline as pipeline_module
from npu_proxy.engine.admission import QueueLimits
from npu_proxy.engine.chunking import ChunkedText, combine_chunks
from npu_proxy.engine.encode_options import EncodeOptions
from npu_proxy.engine.outputs import kept_output
from npu_proxy.engine.pending import PendingRequest
from npu_proxy.engine.pipeline import Pipeline, PipelineLimits
from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.models.layout import read_spec
from npu_proxy.spec import ModelSpec
from npu_proxy.types import Lane, Span, TextInput, TextResult, Truncate

SPEC = read_spec(GOLDEN / "mean")
TOKENIZER = RequestTokenizer(SPEC)
OPTIONS = EncodeOptions(limit=SPEC.max_length)
SHORT = (BatchShape(bins=1, positions=64, segments=4),)
ALONE = (BatchShape(bins=1, positions=64, segments=1),)
"""A text per batch."""
LIMITS = PipelineLimits(batch_delay=0.0, aging=1.0, window=64, queue=QueueLimits(texts=10_000, tokens=1_000_000))
SECONDS = 20
"""The longest that any test waits for anything."""


class Gate:
    """A script for a device: says that a batch has begun, and lets it go on once opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self._begun = threading.Semaphore(0)

    def __call__(self, _: Batch) -> None:
        self._begun.release()
        self.opened.wait(SECONDS)

    def wait_begun(self) -> None:
        assert self._begun.acquire(timeout=SECONDS)


class ScriptedTokenizer(RequestTokenizer):
    """The golden tokenizer; ``script`` is called with the texts before they are encoded. Remembers what it was given."""

    def __init__(self, script: Callable[[Sequence[TextInput]], object] = lambda _: None) -> None:
        super().__init__(SPEC)
        self.given: list[list[TextInput]] = []
        self._script = script

    def encode(self, texts: Sequence[TextInput], options: EncodeOptions) -> list[Encoding | ChunkedText | NpuProxyError]:
        self.given.append(list(texts))
        self._script(texts)
        return super().encode(texts, options)


class Running:
    """A pipeline under test."""

    def __init__(self, device: FakeDevice, tokenizer: RequestTokenizer, limits: PipelineLimits) -> None:
        self.device = device
        self.pipeline = Pipeline(tokenizer, device, SPEC, limits)

    def submit(
        self,
        texts: Sequence[TextInput],
        *,
        seconds: float = 60.0,
        lane: Lane = Lane.INTERACTIVE,
        options: EncodeOptions = OPTIONS,
        prepare: Callable[[PendingRequest], None] = lambda _: None,
        done: Callable[[], None] = lambda: None,
    ) -> Future[PendingRequest]:
        """A future of the request, once each of its texts has a result or an error."""
        future: Future[PendingRequest] = Future()

        def on_done(pending: PendingRequest) -> None:
            self.pipeline.forget(pending)
            future.set_result(pending)  # raises where a request is finished twice
            done()

        now = time.monotonic()
        pending = PendingRequest(EmbedRequest(texts=texts), now + seconds, now, on_done)
        prepare(pending)
        self.pipeline.submit(pending, options, lane)
        return future

    def ask(self, *texts: TextInput) -> PendingRequest:
        return self.submit(texts).result(SECONDS)


@contextmanager
def running(
    device: FakeDevice | None = None, tokenizer: RequestTokenizer = TOKENIZER, limits: PipelineLimits = LIMITS
) -> Iterator[Running]:
    device = device or FakeDevice(shapes=SHORT)
    made = Running(device, tokenizer, limits)
    try:
        yield made
    finally:
        made.pipeline.stop(0)
        device.close()


def ids_of(text: TextInput) -> np.ndarray:
    return TOKENIZER.plain([text])[0].ids


def check_right(pending: PendingRequest) -> None:
    """Each text has the vector that the fake gives to its ids, and no error."""
    assert pending.errors == [None] * len(pending.errors)
    for text, result in zip(pending.request.texts, pending.results, strict=True):
        assert result is not None
        np.testing.assert_array_equal(result.vector, fake_vector(ids_of(text).tolist(), 8))


def kinds(pending: PendingRequest) -> list[str]:
    return [error.kind if error else "" for error in pending.errors]


def was_computed(device: FakeDevice, text: TextInput) -> bool:
    wanted = ids_of(text)
    return any(np.array_equal(encoding.ids, wanted) for batch in device.batches for encoding in batch.encodings)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.001)


# -- order ---------------------------------------------------------------------------------------------------------------


def test_results_are_in_order_when_batches_come_back_in_another() -> None:
    second_is_done = threading.Event()

    def script(batch: Batch) -> None:
        if np.array_equal(batch.encodings[0].ids, ids_of("the cat")):
            second_is_done.wait(SECONDS)

    with running(FakeDevice(shapes=ALONE, script=script)) as made:
        late = made.submit(["the cat", "a dog", "the moon and a star"])
        check_right(made.submit(["one two three"]).result(SECONDS))  # behind it, and yet done before
        assert not late.done()
        second_is_done.set()
        check_right(late.result(SECONDS))


def test_an_interactive_text_waits_for_one_slice_of_a_bulk_request_at_most() -> None:
    began, opened = threading.Event(), threading.Event()

    def script(_: Sequence[TextInput]) -> None:
        began.set()
        opened.wait(SECONDS)

    tokenizer = ScriptedTokenizer(script)
    with running(tokenizer=tokenizer) as made:
        bulk = made.submit([f"the cat {number}" for number in range(300)], lane=Lane.BULK)
        assert began.wait(SECONDS)
        quick = made.submit(["the moon"])
        opened.set()
        check_right(quick.result(SECONDS))
        check_right(bulk.result(SECONDS))
    assert tokenizer.given[1] == ["the moon"]
    assert len(tokenizer.given[0]) < 100


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that only go on when they are woken."""
    monkeypatch.setattr(pipeline_module, "HANDOFF_SECONDS", 3 * SECONDS)


@pytest.mark.usefixtures("patient")
def test_a_text_alone_does_not_wait_for_company() -> None:
    with running(limits=replace(LIMITS, batch_delay=60.0)) as made:
        check_right(made.ask("the cat"))


def test_texts_that_come_together_go_together() -> None:
    with running() as made:
        check_right(made.ask("the cat", "the dog", "the moon", "a star"))
        assert [len(batch.slots) for batch in made.device.batches] == [4]


def test_the_device_gets_as_many_batches_as_it_has_streams() -> None:
    gate = Gate()
    with running(FakeDevice(shapes=ALONE, streams=2, script=gate)) as made:
        future = made.submit(["the cat", "the dog", "the moon"])
        gate.wait_begun()
        gate.wait_begun()
        assert made.pipeline.stats().depth.texts == 1
        gate.opened.set()
        check_right(future.result(SECONDS))


def test_what_is_known_already_is_not_computed() -> None:
    known = TextResult(np.ones(8, np.float32), 4, truncated=False, device="cache")
    with running() as made:
        pending = made.submit(["the cat", "the dog"], prepare=lambda request: request.resolve(0, known)).result(SECONDS)
        assert pending.results[0] is known
        assert kinds(pending) == ["", ""]
        assert not was_computed(made.device, "the cat")
        assert was_computed(made.device, "the dog")


# -- stages that raise ---------------------------------------------------------------------------------------------------


class Panic(BaseException):
    """As the bindings of a Rust library raise: no Exception."""


@pytest.mark.parametrize("error", [ValueError("nobody foresaw it"), Panic(), InputError("not this one", param="input")])
def test_a_tokenizer_that_raises_fails_the_texts_in_its_hands(error: BaseException) -> None:
    def script(texts: Sequence[TextInput]) -> None:
        if "bad" in texts:
            raise error

    with running(tokenizer=ScriptedTokenizer(script)) as made:
        pending = made.submit([*(f"the cat {number}" for number in range(100)), "bad"]).result(SECONDS)
        failed = kinds(pending).index("invalid" if isinstance(error, InputError) else "internal")
        assert 0 < failed < 100
        assert len(set(kinds(pending)[failed:])) == 1
        assert set(kinds(pending)[:failed]) == {""}
        check_right(made.ask("the cat"))
        assert made.pipeline.stats().counters.faults == 0


def test_a_device_that_does_not_take_a_batch_fails_it_alone() -> None:
    class Refusing(FakeDevice):
        refuses = True

        def submit(self, batch: Batch) -> Future[Output]:
            if self.refuses:
                self.refuses = False
                raise RuntimeError("nobody foresaw it")
            return super().submit(batch)

    with running(Refusing(shapes=SHORT, streams=1)) as made:
        assert kinds(made.ask("the cat", "the dog")) == ["internal", "internal"]
        check_right(made.ask("the cat"))  # its stream is free again


def test_a_device_that_fails_and_one_that_was_closed_are_told_apart() -> None:
    class Closed(FakeDevice):
        def submit(self, batch: Batch) -> Future[Output]:
            future: Future[Output] = Future()
            future.cancel()
            future.set_running_or_notify_cancel()
            return future

    with running(FakeDevice(shapes=SHORT, script=fail())) as made:
        pending = made.ask("the cat")
        assert isinstance(pending.errors[0], DeviceError)
        assert made.pipeline.stats().counters.errors == {"device": 1}
    with running(Closed(shapes=SHORT)) as made:
        assert isinstance(made.ask("the cat").errors[0], StoppedError)


def test_a_text_that_cannot_be_finished_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(spec: object, encoding: Encoding, *more: object) -> object:
        if np.array_equal(encoding.ids, ids_of("the dog")):
            raise ZeroDivisionError
        return kept_output(spec, encoding, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline_module, "kept_output", script)
    with running() as made:
        pending = made.ask("the cat", "the dog", "the moon")
        assert kinds(pending) == ["", "internal", ""]
        assert len(made.device.batches) == 1
        assert all(made.pipeline.stats().stages.values())


def test_chunks_that_cannot_be_combined_fail_their_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(spec: ModelSpec, chunks: Sequence[TextResult], spans: Sequence[Span], *, pair: bool) -> TextResult:
        if len(chunks) > 1:
            raise ZeroDivisionError
        return combine_chunks(spec, chunks, spans, pair=pair)

    monkeypatch.setattr(pipeline_module, "combine_chunks", script)
    long = "the moon " * 200
    options = TOKENIZER.options(EmbedRequest(texts=[long], truncate=Truncate.CHUNK))
    with running() as made:
        pending = made.submit([long, "the cat"], options=options).result(SECONDS)
        assert kinds(pending) == ["internal", ""]
        assert all(made.pipeline.stats().stages.values())


def test_a_stage_whose_step_raises_is_counted_and_goes_on() -> None:
    class Forgetful(FakeDevice):
        asked = 0

        @property
        def shapes(self) -> Sequence[BatchShape]:
            self.asked += 1
            if self.asked == 1:
                raise OSError("it has no shapes now")
            return SHORT

        @shapes.setter
        def shapes(self, _: Sequence[BatchShape]) -> None: ...

    def explode() -> None:
        raise OSError("the caller's own code")

    with running(Forgetful()) as made:
        check_right(made.ask("the cat"))  # the text has waited in the queue
        assert made.pipeline.stats().counters.faults == 1
        made.submit(["the dog"], done=explode).result(SECONDS)
        until(lambda: made.pipeline.stats().counters.faults == 2)
        check_right(made.ask("the moon"))
        assert all(made.pipeline.stats().stages.values())


def test_a_chunk_that_fails_fails_its_text_once() -> None:
    calls: list[Batch] = []

    def script(batch: Batch) -> None:
        calls.append(batch)
        if len(calls) == 2:
            fail("lost")(batch)

    long = "the cat sleeps in the red house " * 20
    options = TOKENIZER.options(EmbedRequest(texts=[long], truncate=Truncate.CHUNK))
    with running(FakeDevice(shapes=ALONE, streams=1, script=script)) as made:
        pending = made.submit([long, "the dog"], options=options).result(SECONDS)
        assert kinds(pending) == ["device", ""]
        again = made.submit([long, "the dog"], options=options).result(SECONDS)
        assert kinds(again) == ["", ""]
        assert again.results[0] is not None
        assert len(again.results[0].chunks) > 3
        assert made.pipeline.stats().open_texts == 0


# -- those who do not wait -----------------------------------------------------------------------------------------------


def test_a_deadline_is_kept_while_texts_are_queued_and_they_cost_nothing() -> None:
    gate = Gate()
    with running(FakeDevice(shapes=ALONE, streams=1, script=gate)) as made:
        blocker = made.submit(["the moon"])
        gate.wait_begun()
        late = made.submit(["the cat", "the dog"], seconds=0.05)
        patient = made.submit(["a star"])
        pending = late.result(SECONDS)  # although the device never answers
        assert all(isinstance(error, DeadlineError) for error in pending.errors)
        assert not blocker.done()
        gate.opened.set()
        check_right(blocker.result(SECONDS))
        check_right(patient.result(SECONDS))
        assert not was_computed(made.device, "the cat")
        assert not was_computed(made.device, "the dog")
        counters = made.pipeline.stats().counters
        assert (counters.abandoned, counters.errors, counters.texts) == (2, {"deadline": 2}, 2)


def test_a_deadline_that_has_passed_is_said_at_once() -> None:
    with running() as made:
        pending = made.submit(["the cat"], seconds=-1.0).result(SECONDS)
        assert kinds(pending) == ["deadline"]
        check_right(made.ask("the dog"))


@pytest.mark.usefixtures("patient")
def test_an_earlier_deadline_is_kept_behind_a_later_one() -> None:
    gate = Gate()
    with running(FakeDevice(shapes=ALONE, streams=1, script=gate)) as made:
        late = made.submit(["the moon"], seconds=50)
        gate.wait_begun()
        assert kinds(made.submit(["the cat"], seconds=0.05).result(SECONDS)) == ["deadline"]
        assert not late.done()
        gate.opened.set()
        check_right(late.result(SECONDS))


def leave(request: PendingRequest) -> None:
    """What Engine does when the caller cancels the future."""
    request.fail_all(StoppedError("cancelled"))


def test_texts_of_callers_who_left_are_dropped_at_once_wherever_they_wait() -> None:
    gate, tokenizing, tokenized = Gate(), threading.Event(), threading.Event()

    def script(texts: Sequence[TextInput]) -> None:
        if "a star" in texts:
            tokenizing.set()
            tokenized.wait(SECONDS)

    tokenizer = ScriptedTokenizer(script)
    requests: list[PendingRequest] = []
    with running(FakeDevice(shapes=ALONE, streams=1, script=gate), tokenizer) as made:
        first = made.submit(["the moon"])
        gate.wait_begun()
        made.submit(["the cat"], prepare=requests.append)
        until(lambda: made.pipeline.stats().depth.texts == 1)
        being_tokenized = made.submit(["a star"], prepare=requests.append)
        assert tokenizing.wait(SECONDS)
        made.submit(["the dog", "the house"], prepare=requests.append)
        stays = made.submit(["the sea"])
        leave(requests[0])
        leave(requests[2])
        stats = made.pipeline.stats()
        assert (stats.depth.texts, stats.open_texts, stats.counters.abandoned) == (0, 3, 3)
        leave(requests[1])
        assert kinds(being_tokenized.result(SECONDS)) == ["stopped"]
        tokenized.set()
        gate.opened.set()
        check_right(first.result(SECONDS))
        check_right(stays.result(SECONDS))
        assert not any("the dog" in texts for texts in tokenizer.given)
        for text in ("the cat", "a star"):
            assert not was_computed(made.device, text)


def test_chunks_of_a_caller_who_left_are_dropped() -> None:
    gate = Gate()
    requests: list[PendingRequest] = []
    options = replace(OPTIONS, truncate=Truncate.CHUNK)
    with running(FakeDevice(shapes=ALONE, streams=1, script=gate)) as made:
        made.submit(["the moon"])
        gate.wait_begun()
        made.submit(["sea " * 5 * SPEC.max_length], options=options, prepare=requests.append)
        until(lambda: made.pipeline.stats().depth.texts > 1)
        leave(requests[0])
        assert made.pipeline.stats().depth.texts == 0
        gate.opened.set()


def test_a_text_that_another_caller_wants_too_is_computed() -> None:
    gate = Gate()
    requests: list[PendingRequest] = []
    with running(FakeDevice(shapes=ALONE, streams=1, script=gate)) as made:
        made.submit(["the moon"])
        gate.wait_begun()
        made.submit(["the cat"], prepare=requests.append)
        stays = made.submit(["the cat"])
        until(lambda: made.pipeline.stats().counters.merged == 1)
        leave(requests[0])
        gate.opened.set()
        check_right(stays.result(SECONDS))


# -- equal texts ---------------------------------------------------------------------------------------------------------


def test_equal_texts_are_computed_once_and_each_knows_whether_it_was_cut() -> None:
    gate = Gate()
    whole = "sea " * (SPEC.max_length - 2)
    with running(FakeDevice(shapes=ALONE, streams=1, script=gate)) as made:
        made.submit(["the moon"])
        gate.wait_begun()
        futures = [made.submit([whole, "the cat"], lane=Lane.BULK), made.submit(["the cat", whole + "sea"])]
        until(lambda: made.pipeline.stats().counters.merged == 2)
        assert made.pipeline.stats().depth.texts == 2
        gate.opened.set()
        first, second = (future.result(SECONDS) for future in futures)
        check_right(first)
        check_right(second)
        cut = [[result and result.truncated for result in pending.results] for pending in (first, second)]
        assert cut == [[False, False], [False, True]]
        assert made.pipeline.stats().counters.texts == 3


# -- stopping ------------------------------------------------------------------------------------------------------------


def test_a_drain_refuses_new_texts_and_finishes_those_it_has() -> None:
    gate = Gate()
    with running(FakeDevice(shapes=ALONE, streams=1, script=gate)) as made:
        futures = [made.submit([f"the cat {number}" for number in range(5)]) for _ in range(3)]
        gate.wait_begun()
        stopping = threading.Thread(target=made.pipeline.stop, args=(SECONDS,))
        stopping.start()

        def is_refused() -> bool:
            try:
                futures.append(made.submit(["the dog"]))
            except StoppedError as error:
                return error.kind == "stopped"
            return False

        until(is_refused)
        assert not any(future.done() for future in futures)
        gate.opened.set()
        stopping.join(SECONDS)
        assert not stopping.is_alive()
        for future in futures:
            check_right(future.result(0))
        assert not any(made.pipeline.stats().stages.values())


def test_what_the_drain_leaves_fails_once() -> None:
    gate = Gate()
    with running(FakeDevice(shapes=ALONE, streams=1, script=gate)) as made:
        futures = [made.submit(["the cat", f"the dog {number}"], lane=lane) for number, lane in enumerate(Lane)]
        gate.wait_begun()
        begun = time.monotonic()
        made.pipeline.stop(0)
        assert time.monotonic() - begun < 5
        for future in futures:
            assert kinds(future.result(0)) == ["stopped", "stopped"]
        stats = made.pipeline.stats()
        assert (stats.open_texts, stats.depth.texts, stats.depth.tokens) == (0, 0, 0)
        assert not any(stats.stages.values())
        gate.opened.set()  # the answer to the batch under way finds nobody
        with pytest.raises(StoppedError):
            made.submit(["the moon"])
        made.pipeline.stop(0)  # again does nothing


# -- counters ------------------------------------------------------------------------------------------------------------


def test_counters_are_those_of_the_batches() -> None:
    with running() as made:
        futures = [made.submit([f"the cat {number} {word}" for word in ("sleeps", "eats")]) for number in range(40)]
        futures.append(made.submit(["", "the cat"]))
        for future in futures:
            future.result(SECONDS)
        stats, batches = made.pipeline.stats(), made.device.batches
        counters = stats.counters
        assert (counters.requests, counters.texts, counters.batches) == (41, 81, len(batches))
        assert counters.tokens == sum(encoding.tokens for batch in batches for encoding in batch.encodings)
        assert counters.positions == sum(batch.shape.tokens for batch in batches)
        assert counters.executed == {"fake": 81}
        assert (counters.errors, counters.fallbacks, counters.faults) == ({"empty": 1}, {}, 0)
        assert sum(size * count for size, count in counters.batch_texts.items()) == 81
        assert sum(size * count for size, count in counters.batch_tokens.items()) == counters.tokens
        assert counters.infer_seconds > 0
        assert (stats.open_texts, stats.depth.texts, set(stats.lane_tokens.values())) == (0, 0, {0})
        assert stats.stages == {"tokenize": True, "dispatch": True, "finish": True}
        counters.executed["fake"] = counters.requests = 0  # a snapshot is a copy
        assert made.pipeline.stats().counters.executed == {"fake": 81}
        assert made.pipeline.stats().counters.requests == 41


def test_texts_of_the_second_device_are_counted_and_the_request_knows_why() -> None:
    class Second(FakeDevice):
        def infer(self, batch: Batch) -> Output:
            return replace(super().infer(batch), fallback="the first is away")

    with running(Second(shapes=SHORT)) as made:
        pending = made.ask("the cat", "the dog")
        assert pending.fallbacks == {"the first is away"}
        counters = made.pipeline.stats().counters
        assert counters.fallbacks == counters.executed == {"fake": 2}


# -- what is logged ------------------------------------------------------------------------------------------------------


def test_timeouts_refusals_fallbacks_and_retries_are_logged_without_a_text(caplog: pytest.LogCaptureFixture) -> None:
    class Second(FakeDevice):
        def infer(self, batch: Batch) -> Output:
            return replace(super().infer(batch), fallback="npu is recovering", retries=1)

    gate = Gate()
    limits = replace(LIMITS, queue=QueueLimits(texts=3, tokens=10**6))
    with running(Second(shapes=ALONE, streams=1, script=gate), limits=limits) as made:
        first = made.submit(["the moon"])
        gate.wait_begun()
        late = [made.submit(["the cat"], seconds=0.05), made.submit(["the dog"], seconds=0.06)]
        with pytest.raises(NpuProxyError):
            made.submit(["a star"])
        for future in late:
            assert kinds(future.result(SECONDS)) == ["deadline"]
        gate.opened.set()
        check_right(first.result(SECONDS))
    lines = [record.getMessage() for record in caplog.records]
    for kind in ("timeout", "refused", "fallback", "retry"):
        assert sum(f": {kind}: " in line for line in lines) == 1, lines
    assert any("0 of 1 texts done" in line and "device fake" in line for line in lines)
    assert any("npu is recovering" in line for line in lines)
    for text in ("the cat", "the dog", "the moon", "a star"):
        assert text not in caplog.text


def test_a_kind_of_notice_is_logged_once_in_ten_seconds_with_the_number_left_out(caplog: pytest.LogCaptureFixture) -> None:
    from npu_proxy.engine.notices import Notices

    now = [0.0]
    notices = Notices("model", clock=lambda: now[0])
    for seconds in (0.0, 1.0, 9.9, 10.0, 10.1, 25.0):
        now[0] = seconds
        notices.warn("timeout", f"at {seconds}")
    notices.warn("refused", "too")
    assert [record.getMessage() for record in caplog.records] == [
        "model: timeout: at 0.0",
        "model: timeout: at 10.0 (2 more since the last such line)",
        "model: timeout: at 25.0 (1 more since the last such line)",
        "model: refused: too",
    ]


# -- small requests are tokenized together -------------------------------------------------------------------------------


def test_small_requests_that_wait_are_tokenized_together_and_one_at_fault_fails_alone() -> None:
    waiting, go_on = threading.Event(), threading.Event()

    def script(texts: Sequence[TextInput]) -> None:
        if "a star" in texts:
            waiting.set()
            go_on.wait(SECONDS)
        if "the house" in texts:
            raise RuntimeError("panic")

    tokenizer = ScriptedTokenizer(script)
    with running(tokenizer=tokenizer) as made:
        first = made.submit(["a star"])
        assert waiting.wait(SECONDS)
        futures = [made.submit([f"the cat {number}"]) for number in range(100)]
        go_on.set()
        for future in (first, *futures):
            check_right(future.result(SECONDS))
        assert len(tokenizer.given) <= 4  # of 64 texts at most
        waiting.clear()
        go_on.clear()
        again = made.submit(["a star", "again"])
        assert waiting.wait(SECONDS)
        futures = [made.submit([text]) for text in ("the moon", "the house", "the sea")]
        go_on.set()
        check_right(again.result(SECONDS))
        assert [kinds(future.result(SECONDS)) for future in futures] == [[""], ["internal"], [""]]
