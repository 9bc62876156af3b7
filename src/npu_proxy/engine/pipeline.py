"""The three stages of embedding, one thread each: tokenize, dispatch (batches to the device), finish.

Decisions are made elsewhere (admission.py, queue.py, packing.py). A stage never stops because of an error: any exception in a
step fails the jobs of that step, and the stage continues. One lock guards all shared state; nothing slow is done while it is
held. Every wait has a timeout.

This file is longer than most because the stages share one lock and pass jobs to each other; they are best read together.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from npu_proxy.batch import Batch, Encoding, Output, output_for
from npu_proxy.cache.vectors import VectorCache
from npu_proxy.devices.base import Device
from npu_proxy.engine.admission import QueueLimits, QueueLoad, RecentRatio, check_admission, estimated_tokens
from npu_proxy.engine.chunking import ChunkedText, combine_chunks, split_result
from npu_proxy.engine.counters import Counters, Stats
from npu_proxy.engine.encode_options import EncodeOptions
from npu_proxy.engine.fair_queue import FairQueue, rank_of
from npu_proxy.engine.notices import Notices
from npu_proxy.engine.outputs import is_kept_output, kept_output
from npu_proxy.engine.packing import aligned, full_shape, pack
from npu_proxy.engine.pending import Job, PendingRequest, PendingRequests
from npu_proxy.engine.queue import JobQueue
from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.errors import DeadlineError, DeviceError, NpuProxyError, OverloadedError, StoppedError
from npu_proxy.spec import ModelSpec
from npu_proxy.types import Lane, OutputType, Pair, TextResult

_log = logging.getLogger("npu_proxy.engine")

HANDOFF_SECONDS = 0.5
"""Maximum length of a stage's wait, after which it checks whether to stop."""
_AGAIN_SECONDS = 0.05
"""How long to wait for a device that takes the texts that are left."""
_SLICE = 64
"""Texts tokenized at once; an interactive text waits for at most one such slice of a bulk request."""


@dataclass(frozen=True, kw_only=True)
class PipelineLimits:
    """The settings that the pipeline uses. batch_delay, aging: seconds. window: number of texts that packing may choose from."""

    batch_delay: float
    aging: float
    window: int
    queue: QueueLimits


@dataclass(frozen=True, slots=True, eq=False)
class _Slice:
    """Some texts of a request, waiting for the tokenizer. tokens: about how many they have."""

    request: PendingRequest
    options: EncodeOptions
    indices: Sequence[int]
    tokens: int


@dataclass(frozen=True, slots=True)
class _Computed:
    """The jobs of a batch, in the order of its slots, and the device's output or error."""

    jobs: Sequence[Job]
    batch: Batch | None
    outcome: Output | NpuProxyError


_Encoded = Sequence[tuple[_Slice, Sequence[Encoding | ChunkedText | NpuProxyError]]]
"""Slices, and what became of each of their texts."""


class Pipeline:
    """Accepts pending requests and finishes each of their texts exactly once. Thread-safe."""

    def __init__(
        self,
        tokenizer: RequestTokenizer,
        device: Device,
        spec: ModelSpec,
        limits: PipelineLimits,
        cache: VectorCache | None = None,
        canaries: Sequence[Encoding] | None = None,
    ) -> None:
        """canaries: golden texts for the free room of batches (devices/canary.py); None also leaves echoes out."""
        self._tokenizer = tokenizer
        self._cache = cache
        self._device = device
        self._spec = spec
        self._layout = spec.batch_layout
        self._limits = limits
        self._lock = threading.Lock()
        self._slices_changed = threading.Condition(self._lock)
        self._jobs_changed = threading.Condition(self._lock)
        self._idle = threading.Condition(self._lock)
        self._slices: FairQueue[_Slice] = FairQueue(limits.aging)
        self._slices_of: dict[int, set[_Slice]] = {}
        """The same, by the number of their request."""
        self._tokenizing = 0
        self._tokens_per_second = RecentRatio()
        """Of all streams together."""
        self._tokens_per_estimate = RecentRatio()
        """How many tokens texts had per token that was estimated before."""
        self._last_batch = 0.0
        self._in_flight = 0
        """Number of batches that the device is computing."""
        self._canaries = canaries
        self._turns = itertools.count()
        align = self._layout.align
        canary_tokens = max((aligned(canary.tokens, align) for canary in canaries or ()), default=0)
        self._jobs = JobQueue(aging=limits.aging, window=limits.window, align=align, canary_tokens=canary_tokens)
        self._pending = PendingRequests()
        self._computed: queue.SimpleQueue[_Computed | None] = queue.SimpleQueue()
        self._counters = Counters()
        self._notices = Notices(spec.name)
        self._accepting = True
        self._stopping = threading.Event()
        steps = (("tokenize", self._tokenize), ("dispatch", self._dispatch), ("finish", self._finish))
        self._threads = [threading.Thread(target=self._run, args=step, name=f"npu-proxy-{step[0]}", daemon=True) for step in steps]
        for thread in self._threads:
            thread.start()

    # -- called from outside -------------------------------------------------------------------------------------

    def submit(self, request: PendingRequest, options: EncodeOptions, lane: Lane) -> None:
        """Accept a request. Raises OverloadedError (see check_admission), or StoppedError if the pipeline is stopping."""
        missing = [index for index, result in enumerate(request.results) if result is None]
        slices = [
            _Slice(
                request,
                options,
                indices,
                estimated_tokens([request.request.texts[index] for index in indices], options.most_tokens),
            )
            for start in range(0, len(missing), _SLICE)
            if (indices := missing[start : start + _SLICE])
        ]
        tokens = sum(part.tokens for part in slices)
        request.rank = rank_of(lane, tokens)
        with self._lock:
            if not self._accepting:
                raise StoppedError("the engine is stopping or was stopped; start it again, or create a new one")
            load = self._load(request, tokens, len(missing) * options.most_tokens)
            try:
                check_admission(
                    len(missing),
                    request.client,
                    request.deadline - request.submitted_at,
                    load=load,
                    limits=self._limits.queue,
                    tokens_per_second=self._tokens_per_second.value,
                )
            except OverloadedError as error:
                self._counters.refused += 1
                self._notices.warn("refused", f"{len(missing)} texts, about {tokens} tokens: {error}")
                raise
            self._counters.requests += 1
            if self._pending.add(request, len(missing)):
                self._computed.put(None)  # wake the finish stage, which waits for a later deadline
            for part in slices:
                self._slices.push(part, request.client, request.rank, part.tokens, request.submitted_at)
            self._slices_of[request.number] = set(slices)
            self._slices_changed.notify()

    def seconds_for(self, tokens: int) -> float | None:
        """Seconds that texts of about so many tokens take at the recent speed; None if that is unknown."""
        speed = self._tokens_per_second.value
        return (self._tokens_per_estimate.value or 1.0) * tokens / speed if speed else None

    def limit(self, queue: QueueLimits) -> None:
        """Use these limits for new requests."""
        self._limits = replace(self._limits, queue=queue)

    def _load(self, request: PendingRequest, tokens: int, most: int) -> QueueLoad:
        """The current load, for a new request of about so many tokens, and of ``most`` if each text is as long as it may be."""
        client, rank = request.client, request.rank
        # Vectors from disk or a server cost no inference; which texts have one is not known yet.
        unknown = self._cache is not None and self._cache.has_tiers
        untokenized = 0 if unknown else self._slices.ahead(client, rank) + tokens
        ratio = self._tokens_per_estimate.value or 1.0
        return QueueLoad(
            texts=self._pending.texts,
            tokens=self._jobs.depth.tokens,
            client_texts=self._pending.by_client[client.name],
            ahead=self._jobs.ahead(client, rank) + ratio * untokenized,
            own=0.0 if unknown else min(ratio * tokens, most),
        )

    def forget(self, request: PendingRequest) -> None:
        """Remove a request that is over, and drop what of it still waits; called by its ``on_done``."""
        with self._lock:
            if not self._pending.remove(request):
                return
            for part in self._slices_of.pop(request.number, ()):
                self._slices.drop(part)
                self._jobs.abandoned += len(part.indices)
            errors = list(filter(None, request.errors))
            if errors:
                self._jobs.abandon(request)
            for error in errors:
                self._counters.count_error(error.kind)
            if not self._pending:
                self._idle.notify_all()

    def stats(self) -> Stats:
        """A consistent snapshot of the counters and the queue."""
        with self._lock:
            return Stats(
                counters=self._counters.copy(merged=self._jobs.merged, abandoned=self._jobs.abandoned),
                depth=self._jobs.depth,
                lane_tokens=dict(self._jobs.tokens),
                open_texts=self._pending.texts,
                stages={thread.name.removeprefix("npu-proxy-"): thread.is_alive() for thread in self._threads},
                tokens_per_second=self._tokens_per_second.value,
            )

    def stop(self, drain: float) -> None:
        """Refuse new requests, give open ones ``drain`` seconds to finish, fail the rest, and end the threads."""
        with self._lock:
            self._accepting = False
            self._idle.wait_for(lambda: not self._pending, timeout=drain)
            self._stopping.set()
            self._slices_changed.notify_all()
            self._jobs_changed.notify_all()
        self._computed.put(None)  # wake the finish stage
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=10 * HANDOFF_SECONDS)
        with self._lock:
            self._jobs.clear()
            unfinished = self._pending.all()
        for request in unfinished:
            request.fail_all(StoppedError("the engine was stopped before this text was embedded"))

    def _run(self, name: str, step: Callable[[], None]) -> None:
        while not self._stopping.is_set():
            try:
                step()
            except BaseException:  # the step has already failed its jobs
                _log.exception("stage %s: unexpected error, continuing", name)
                with self._lock:
                    self._counters.faults += 1
                self._stopping.wait(0.01)

    # -- tokenize ------------------------------------------------------------------------------------------------

    def _tokenize(self) -> None:
        """Encode the next texts, of one request or of several small ones, and queue them together."""
        with self._lock:
            self._slices_changed.wait_for(lambda: len(self._slices) or self._stopping.is_set(), timeout=HANDOFF_SECONDS)
            if not self._slices or self._stopping.is_set():
                return
            slices = self._next_slices(time.monotonic())
            self._tokenizing += 1
        encoded: _Encoded = []
        try:
            encoded = self._encode(slices)
        finally:
            self._enqueue(encoded)

    def _next_slices(self, now: float) -> Sequence[_Slice]:
        """Remove the slice whose turn it is, and others of its rank and with its options, up to ``_SLICE`` texts."""
        lead, *others = self._slices.first(_SLICE, now)
        self._slices.lead(lead, now)
        slices, texts = [lead], len(lead.indices)
        for part in others:
            alike = part.request.rank == lead.request.rank and part.options == lead.options
            if alike and texts + len(part.indices) <= _SLICE:
                slices.append(part)
                texts += len(part.indices)
        for part in slices:
            self._slices.start(part)
            self._slices_of[part.request.number].discard(part)
        return slices

    def _encode(self, slices: Sequence[_Slice]) -> _Encoded:
        """The slices, without the texts that are cached or that nobody waits for, and the encodings or errors of their texts."""
        start = time.monotonic()
        wanted = [part for part in slices if part.request.unfinished]
        with self._lock:
            self._jobs.abandoned += sum(len(part.indices) for part in slices) - sum(len(part.indices) for part in wanted)
        try:
            parts = [self._without_cached(part) for part in wanted]
            texts = [part.request.request.texts[index] for part in parts for index in part.indices]
            encodings = iter(self._tokenizer.encode(texts, slices[0].options))
        except BaseException as error:  # a Rust panic is not an Exception
            if len(wanted) > 1:  # only one of them may be at fault
                return [pair for part in wanted for pair in self._encode([part])]
            return [(part, [_wrapped(error, "tokenizing failed")] * len(part.indices)) for part in wanted]
        seconds = time.monotonic() - start
        for part in parts:
            part.request.tokenize_seconds += seconds * len(part.indices) / max(1, len(texts))
        return [(part, list(islice(encodings, len(part.indices)))) for part in parts]

    def _without_cached(self, part: _Slice) -> _Slice:
        """Finish the texts whose vectors are on disk or on a server; return the slice without them."""
        if self._cache is None or not self._cache.has_tiers or not part.request.cache_keys:
            return part
        keys = [part.request.cache_keys[index] for index in part.indices]
        entries = self._cache.fetch(keys, self._seconds_per_text(), lambda entry: is_kept_output(self._spec, entry.vector))
        part.request.resolve_cached(zip(part.indices, entries, strict=True))
        missing = [index for index, entry in zip(part.indices, entries, strict=True) if entry is None]
        return replace(part, indices=missing)

    def _seconds_per_text(self) -> float:
        """Mean device time per text; 0 before the first batch."""
        counters = self._counters
        return counters.infer_seconds / counters.texts / self._device.streams if counters.texts else 0.0

    def _enqueue(self, encoded: _Encoded) -> None:
        now = time.monotonic()
        with self._lock:
            self._tokenizing -= 1
            for part, encodings in encoded:
                if part.request.unfinished:
                    self._add_jobs(part, encodings, now)
            self._jobs_changed.notify_all()
        for part, encodings in encoded:
            for index, encoding in zip(part.indices, encodings, strict=True):
                if isinstance(encoding, NpuProxyError):
                    part.request.fail(index, encoding)
            if part.request.request.output_type is OutputType.TOKENS:
                error = part.request.too_large(part.request.tokens * self._spec.width)
                if error is not None:
                    part.request.fail_all(error)

    def _add_jobs(self, part: _Slice, encodings: Sequence[Encoding | ChunkedText | NpuProxyError], now: float) -> None:
        request, tokens = part.request, 0
        for index, encoding in zip(part.indices, encodings, strict=True):
            if isinstance(encoding, Encoding):
                request.encodings[index] = encoding
                self._jobs.add(encoding, request, index, now)
                tokens += encoding.tokens
            elif isinstance(encoding, ChunkedText):
                chunks = self._chunk_request(request, index, encoding)
                for number, chunk in enumerate(encoding.encodings):
                    self._jobs.add(chunk, chunks, number, now)
                    tokens += chunk.tokens
        if tokens:
            self._tokens_per_estimate.add(tokens, part.tokens)
        request.tokens += tokens

    def _chunk_request(self, request: PendingRequest, index: int, chunked: ChunkedText) -> PendingRequest:
        """Make a request for the chunks of one text; when it is done, the combined result is delivered for that text."""

        def on_done(chunks: PendingRequest) -> None:
            if (error := next(filter(None, chunks.errors), None)) is not None:
                request.fail(index, error)
                return
            pairs = zip(filter(None, chunks.results), chunked.encodings, strict=True)
            results = [part for result, encoding in pairs for part in split_result(result, encoding)]
            is_pair = isinstance(request.request.texts[index], Pair)
            request.fallbacks |= chunks.fallbacks
            request.queued_seconds = max(request.queued_seconds, chunks.queued_seconds)
            request.infer_seconds += chunks.infer_seconds
            try:
                combined = combine_chunks(self._spec, results, chunked.spans, pair=is_pair)
            except Exception as error:  # only this text fails, not the rest of the batch that its last chunk was in
                request.fail(index, _wrapped(error, "combining chunks failed"))
                return
            origins = {part.origin for part in results}
            if len(origins) == 1:
                self._resolve(request, index, replace(combined, origin=origins.pop()))
            else:  # if one of the devices turned out to be wrong, nothing would tell that this result is void
                request.resolve(index, combined)

        texts = replace(request.request, texts=[""] * len(chunked.encodings))
        chunks = PendingRequest(texts, request.deadline, request.submitted_at, on_done, request.rank)
        chunks.encodings = list(chunked.encodings)
        request.parts.append(chunks)
        return chunks

    # -- dispatch ------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Submit the next batch if there is work and the device has a free stream; first wait briefly for texts still to come."""
        with self._lock:
            self._jobs_changed.wait_for(lambda: self._ready() or self._stopping.is_set(), HANDOFF_SECONDS)
            oldest = self._jobs.oldest()
            if oldest is not None and not self._full_batch_waits() and self._more_coming():
                due = oldest + self._limits.batch_delay
                self._jobs_changed.wait_for(self._wait_is_over, timeout=max(0.0, min(HANDOFF_SECONDS, due - time.monotonic())))
            if self._stopping.is_set() or not self._ready():
                return
            next_batch = self._jobs.take(self._device.shapes, time.monotonic())
            if next_batch is None:  # nothing waits, or only texts that no device takes now
                self._jobs_changed.wait(_AGAIN_SECONDS)
                return
            self._in_flight += 1
        candidates, plan = next_batch
        jobs = [candidates[index] for index in plan.indices]
        try:
            deadline = min(job.deadline for job in jobs)
            encodings = [job.encoding for job in candidates]
            turn = None if self._canaries is None else next(self._turns)
            batch = pack(encodings, plan, self._layout, self._spec.output_type, deadline, self._canaries or (), turn)
            future = self._device.submit(batch)
        except BaseException as error:  # these jobs fail; the stage continues
            self._hand_over(_Computed(jobs, None, _wrapped(error, "packing failed")))
        else:
            future.add_done_callback(lambda future: self._hand_over(_Computed(jobs, batch, _outcome(future))))

    def _hand_over(self, computed: _Computed) -> None:
        """Pass a computed batch to the finish stage. Called by the device's threads."""
        self._computed.put(computed)
        with self._lock:
            self._in_flight -= 1
            self._jobs_changed.notify()

    def _ready(self) -> bool:
        return self._in_flight < self._device.streams and self._jobs.oldest() is not None

    def _full_batch_waits(self) -> bool:
        return self._jobs.depth.tokens >= full_shape(self._device.shapes).tokens

    def _wait_is_over(self) -> bool:
        return self._stopping.is_set() or self._full_batch_waits() or not self._more_coming()

    def _more_coming(self) -> bool:
        """Whether more texts will join the queue soon."""
        return bool(self._tokenizing or self._slices)

    # -- finish --------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        with self._lock:
            next_deadline = self._pending.next_deadline
        try:
            wait = min(HANDOFF_SECONDS, max(0.001, next_deadline - time.monotonic()))
            computed = self._computed.get(timeout=wait)
        except queue.Empty:
            computed = None
        if computed is not None:
            self._deliver(computed)
        self._expire(time.monotonic())

    def _deliver(self, computed: _Computed) -> None:
        jobs, batch, outcome = computed.jobs, computed.batch, computed.outcome
        with self._lock:
            waiters = [self._jobs.finish(job) for job in jobs]
            if batch is not None and isinstance(outcome, Output):
                self._count(batch, outcome)
                self._report(batch, outcome)
        now = time.monotonic()
        for index, (job, waiting) in enumerate(zip(jobs, waiters, strict=True)):
            if batch is None or isinstance(outcome, NpuProxyError):
                assert isinstance(outcome, NpuProxyError)
                for request, position in waiting:
                    request.fail(position, outcome)
                continue
            try:
                result = self._result(outcome, batch, index)
            except Exception as error:  # only this text fails, not its batch
                result = _wrapped(error, "finishing failed")
            for request, position in waiting:
                if isinstance(result, NpuProxyError):
                    request.fail(position, result)
                    continue
                if outcome.fallback:
                    request.fallbacks.add(outcome.fallback)
                request.queued_seconds = max(request.queued_seconds, now - outcome.seconds - job.queued_at)
                request.infer_seconds += outcome.seconds * job.encoding.tokens / max(1, batch.tokens)
                known = request.encodings[position]
                truncated = known is not None and known.truncated  # two texts with equal tokens may differ in this
                same = result.truncated == truncated
                self._resolve(request, position, result if same else replace(result, truncated=truncated))

    def _resolve(self, request: PendingRequest, index: int, result: TextResult) -> None:
        """Deliver a text's result, and cache it."""
        if self._cache is not None and request.cache_keys:
            self._cache.keep(request.cache_keys[index], replace(result, chunks=()) if result.chunks else result)
        request.resolve(index, result)

    def _result(self, output: Output, batch: Batch, index: int) -> TextResult | DeviceError:
        """The result of one text of a batch, or a DeviceError if its numbers are not finite."""
        raw, encoding = output_for(batch, index, output.vectors), batch.encodings[index]
        if not np.isfinite(raw).all():
            return DeviceError(f"device {output.device} returned numbers that are not finite")
        vector = kept_output(self._spec, encoding, raw, self._tokenizer.special_ids)
        return TextResult(vector, encoding.tokens, encoding.truncated, output.device, origin=output.origin)

    def _count(self, batch: Batch, output: Output) -> None:
        now = time.monotonic()
        if self._is_typical(batch):
            seconds = min(output.seconds, now - self._last_batch)
            self._tokens_per_second.add(batch.tokens, seconds)
        self._last_batch = now
        self._counters.count_batch(batch, output)

    def _report(self, batch: Batch, output: Output) -> None:
        """Log that another device than the first computed a batch, or that it took several attempts."""
        size = f"{len(batch.slots)} texts, {batch.tokens} tokens, {output.seconds:.3g} s of computing"
        if output.fallback:
            self._notices.warn("fallback", f"computed on {output.device}: {output.fallback} ({size})")
        if output.retries:
            self._notices.warn("retry", f"computed on {output.device} at attempt {output.retries + 1} ({size})")

    def _whereabouts(self, request: PendingRequest) -> str:
        """How far a request has come."""
        done, count = sum(result is not None for result in request.results), len(request.results)
        tokenized = sum(encoding is not None for encoding in request.encodings)
        stage = "tokenizing" if tokenized + request.cached < count else "waiting for the device or being computed"
        tokens = sum(encoding.tokens for encoding in request.encodings if encoding is not None)
        times = f"tokenizing took {request.tokenize_seconds:.3g} s, the slowest finished text queued {request.queued_seconds:.3g} s"
        return f"{done} of {count} texts done, the others {stage}; {tokens} tokens; {times}; device {self._device.name}"

    def _is_typical(self, batch: Batch) -> bool:
        """Whether a batch is full enough to measure throughput; tokens in the small batches of a short queue cost far more."""
        full = full_shape(self._device.shapes)
        return 2 * batch.tokens >= full.tokens or 2 * len(batch.slots) >= full.bins * full.segments

    def _expire(self, now: float) -> None:
        """Fail the requests whose deadline has passed; the queue drops their jobs later."""
        with self._lock:
            expired = self._pending.expired(now)
        for request in expired:
            if request.unfinished:
                seconds = request.deadline - request.submitted_at
                what = f"not done within {seconds:.3g} seconds" if seconds > 0 else "the deadline had passed before submission"
                self._notices.warn("timeout", f"{what}: {self._whereabouts(request)}")
                request.fail_all(DeadlineError(f"{what}; increase the timeout, or send fewer texts at once"))


def _outcome(future: Future[Output]) -> Output | NpuProxyError:
    try:
        return future.result()
    except CancelledError:
        return StoppedError("the device was closed before this text was embedded")
    except BaseException as error:  # any error is reported for these texts
        return _wrapped(error, "the device failed")


def _wrapped(error: BaseException, what: str) -> NpuProxyError:
    if isinstance(error, NpuProxyError):
        return error
    _log.error("%s", what, exc_info=error)
    return NpuProxyError(f"{what}: {type(error).__name__}")
