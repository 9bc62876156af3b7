"""Engine: the pipeline with a life cycle and verbs. AsyncEngine (async_engine.py) is the same, awaited."""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, Unpack

import numpy as np
import numpy.typing as npt

from npu_proxy.cache.entry import Keys
from npu_proxy.cache.vectors import VectorCache
from npu_proxy.devices.base import Device
from npu_proxy.engine.finish import check_output, finish
from npu_proxy.engine.options import Options, check_options, check_texts, request_of
from npu_proxy.engine.parts import Parts, load, open_cache
from npu_proxy.engine.pipeline import Limits, Pipeline, Stats
from npu_proxy.engine.similarity import similarity
from npu_proxy.engine.tokenize import TextEncoder
from npu_proxy.engine.verbs import (
    Label,
    Ranked,
    check_classifier,
    labels,
    probabilities,
    rank_requests,
    ranking,
    sparse_of,
    tokens_of,
)
from npu_proxy.errors import DeadlineError, InputError, OverloadedError, StoppedError
from npu_proxy.settings import Settings
from npu_proxy.types import (
    EmbedRequest,
    EmbedResult,
    Kind,
    Lane,
    ModelSpec,
    Similarity,
    SparseVector,
    TextInput,
    Ticket,
    Vector,
)

Array = npt.NDArray[Any]
State = Literal["new", "running", "stopping", "stopped"]

_started: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """A program that ends without stopping its engines ends in peace: native threads that still compute would abort it."""
    for engine in list(_started):
        engine.stop(drain=0.0)


class Engine:
    """Embeds texts. A context manager; starts at the first use as well, and stops once.

    >>> with Engine() as engine:                                                        # doctest: +SKIP
    ...     engine.embed(["one text", "another"]).shape
    (2, 384)
    """

    def __init__(
        self,
        model: str | Path | None = None,
        device: str | None = None,
        settings: Settings | None = None,
        *,
        cache: VectorCache | None = None,
        parts: Callable[[Settings, threading.Event], Parts] = load,
    ) -> None:
        """``model`` and ``device`` override the settings' own. Nothing is loaded before ``start``.

        cache: shared with other engines and closed by its owner; None opens one as the settings say.
        """
        settings = settings or Settings()
        self.settings = replace(
            settings,
            model=settings.model if model is None else (str(model),),
            device=settings.device if device is None else device,
        )
        self._load = parts
        self._cache = cache
        self._own_cache: VectorCache | None = None
        self._keys: Keys | None = None
        self._state: State = "new"
        self._change = threading.Lock()
        self._stopping = threading.Event()
        self._process = os.getpid()
        self._pipeline: Pipeline | None = None
        self._parts: Parts | None = None

    # -- life ----------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """`new`, `running`, `stopping` or `stopped`."""
        return self._state

    def start(self) -> Self:
        """Load and compile the model; does nothing when running. Raises StoppedError after a stop."""
        with self._change:
            if self._state == "running":
                return self
            if self._state != "new":
                raise StoppedError("this engine was stopped; make a new one")
            parts = self._load(self.settings, self._stopping)
            try:
                self._open(parts)
            except BaseException:
                parts.device.close()
                if self._own_cache is not None:
                    self._own_cache.close()
                raise
            self._parts = parts
            self._process = os.getpid()
            self._state = "running"
            _started.add(self)
        return self

    def _open(self, parts: Parts) -> None:
        own = self.settings
        if self._cache is None:
            self._cache = self._own_cache = open_cache(own)
        if self._cache is not None:
            self._keys = Keys(parts.spec.fingerprint, own.sanitize, own.on_empty, own.cache_prefix)
        limits = Limits(
            batch_delay=own.batch_delay,
            aging=own.aging,
            window=own.window,
            max_items=own.max_queue_items,
            max_tokens=own.max_queue_tokens,
        )
        self._pipeline = Pipeline(parts.encoder, parts.device, parts.spec, limits, self._cache)

    def stop(self, drain: float | None = None) -> None:
        """Finish open requests for up to ``drain`` seconds (the setting's by default), fail the rest, end all threads."""
        if self._forked():
            return
        self._stopping.set()
        with self._change:
            if self._pipeline is not None and self._parts is not None and self._state == "running":
                self._state = "stopping"
                self._pipeline.stop(self.settings.drain if drain is None else drain)
                self._parts.device.close()
                if self._own_cache is not None:
                    self._own_cache.close()
            self._state = "stopped"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # After an error nobody waits for what is still under way.
        self.stop(drain=0.0 if error else None)

    # -- what it is ----------------------------------------------------------------------------------------------

    @property
    def spec(self) -> ModelSpec:
        """The model that is served: width, limits, prompts, fingerprint."""
        return self._running()[0].spec

    @property
    def encoder(self) -> TextEncoder:
        """The model's tokenizer and prompts."""
        return self._running()[0].encoder

    @property
    def device(self) -> Device:
        """The device that embeds."""
        return self._running()[0].device

    @property
    def cache(self) -> VectorCache | None:
        """Where vectors are kept; None where the settings want none."""
        return self._cache

    def stats(self) -> Stats:
        """Counters, queue depth and the life of the stages, at this moment."""
        return self._running()[1].stats()

    # -- verbs ---------------------------------------------------------------------------------------------------

    def submit(self, request: EmbedRequest, deadline: float | None = None) -> Future[EmbedResult]:
        """Queue a request; ``deadline`` (time.monotonic() seconds) stands in for its own.

        The future gives an EmbedResult, with an error a text where one failed.

        Cancelling it drops the request's texts before they cost inference. Raises InputError for a request that is
        wrong as a whole, OverloadedError at the queue's limit, StoppedError when the engine is not running.
        """
        parts, pipeline = self._running()
        check_texts(request.texts)
        check_output(request, parts.spec)
        manner = parts.encoder.manner(request)
        if manner.late and all(shape.segments == 1 for shape in parts.device.shapes):
            message = "late chunks are several vectors of one text; set `packing` on, and `device` to none that runs a graph file"
            raise InputError(message, param="late")
        future: Future[EmbedResult] = Future()

        def done(ticket: Ticket) -> None:
            pipeline.forget(ticket)
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = finish(ticket, parts.spec)
            except Exception as error:  # whatever it is belongs to this caller, not to the stage that answered last
                future.set_exception(error)
            else:
                future.set_result(result)

        now = time.monotonic()
        if deadline is None:
            deadline = now + self.settings.timeout if request.deadline is None else request.deadline
        ticket = Ticket(request, deadline, now, done, future.cancelled)
        if self._cache is not None and self._keys is not None and not request.chunking.spans:
            ticket.keys = self._keys.of(request.texts, manner.key)
            ticket.recall(enumerate(self._cache.recall(ticket.keys)))
            if not ticket.open:
                return future
        few = ticket.open <= self.settings.interactive_texts
        pipeline.submit(ticket, manner, request.lane or (Lane.INTERACTIVE if few else Lane.BULK))
        future.add_done_callback(lambda done: ticket.fail_all(_CANCELLED) if done.cancelled() else None)
        return future

    def embed(self, texts: Sequence[TextInput], **options: Unpack[Options]) -> Array:
        """Vectors [n, width] of texts, in order; float32 unless ``dtype`` says otherwise ([n] strings for base64).

        Raises the first error of any text, once all of them are done.
        """
        if isinstance(texts, str):
            raise InputError("texts must be a list of texts; for one text call embed_query, or embed([text])", param="texts")
        if len(texts) > BATCH_SIZE:
            return np.stack(list(self.stream(texts, **options)))
        result = self._wait(self.submit(request_of(texts, options, self.settings.timeout)))
        return np.asarray(result.raise_first().embeddings)

    def stream(
        self, texts: Iterable[TextInput], *, batch_size: int = 256, parallel: int | None = None, **options: Unpack[Options]
    ) -> Iterator[Array]:
        """One vector a text, in order, from any iterable, with bounded memory however long it is.

        batch_size: texts a request; a few requests are under way at once. parallel: None works in this process; N
        starts N worker processes of their own engines (0: one a core), for offline work on many cores.
        """
        for result in self.results(texts, batch_size=batch_size, parallel=parallel, **options):
            yield from result.raise_first().embeddings  # type: ignore[misc]  # rows of an array, or strings

    def results(
        self, texts: Iterable[TextInput], *, batch_size: int = 256, parallel: int | None = None, **options: Unpack[Options]
    ) -> Iterator[EmbedResult]:
        """As ``stream``, but a whole EmbedResult a batch, with token counts and the errors of single texts."""
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}", param="batch_size")
        if parallel is not None:
            from npu_proxy.engine.parallel import results as parallel_results

            yield from parallel_results(self.settings, _batches(texts, batch_size), parallel, options)
            return
        under_way: deque[Future[EmbedResult]] = deque()
        try:
            for batch in _batches(texts, batch_size):
                under_way.append(self._submit_patiently(batch, options, under_way))
                while under_way and (under_way[0].done() or len(under_way) * batch_size > STREAM_TEXTS):
                    yield self._wait(under_way.popleft())
            while under_way:
                yield self._wait(under_way.popleft())
        finally:
            for future in under_way:
                future.cancel()

    def embed_query(self, text: str) -> list[float]:
        """One vector as a list, with the model's query prompt where it has one (the LangChain signature)."""
        return self.embed([text], input_type="query")[0].tolist()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Vectors as lists, with the model's document prompt where it has one (the LangChain signature)."""
        return self.embed(texts, input_type="document").tolist() if texts else []

    def rerank(
        self, query: str, documents: Sequence[str], *, top_n: int | None = None, raw: bool = False, **options: Unpack[Options]
    ) -> list[Ranked]:
        """Documents by how well they answer a query, the best first; for cross-encoders and late-interaction models.

        raw: logits in place of scores from 0 to 1. truncate=`chunk` takes a long document's best part. Of the options there are
        truncate, chunking, max_tokens and timeout.
        """
        check_options(options, ("truncate", "chunking", "max_tokens", "timeout"))
        asked = request_of([query], options, self.settings.bulk_timeout)
        spec = self.spec
        futures: list[Future[EmbedResult]] = []
        try:
            futures.extend(
                self.submit(request)
                for request in rank_requests(
                    spec,
                    query,
                    documents,
                    top_n=top_n,
                    truncate=asked.truncate,
                    chunking=asked.chunking,
                    max_tokens=asked.max_tokens,
                    deadline=asked.deadline,
                )
            )
            return ranking(spec, [self._wait(future) for future in futures], top_n=top_n, raw=raw)
        finally:
            for future in futures:  # where one failed, nobody waits for the others
                future.cancel()

    def classify(
        self, texts: Sequence[TextInput], *, top_n: int | None = None, raw: bool = False, **options: Unpack[Options]
    ) -> list[list[Label]]:
        """Of each text (or Pair) the labels of a classifier by falling score. raw: logits in place of probabilities."""
        check_classifier(self.spec, top_n)
        request = request_of(texts, options, self.settings.bulk_timeout)
        result = self._wait(self.submit(replace(request, want=Kind.SCORES)))
        return labels(self.spec, probabilities(self.spec, result, raw=raw), top_n)

    def embed_sparse(self, texts: Sequence[TextInput], **options: Unpack[Options]) -> list[SparseVector]:
        """Weights of vocabulary entries, a text (SPLADE, or the lexical weights of bge-m3)."""
        request = request_of(texts, options, self.settings.bulk_timeout)
        return sparse_of(self._wait(self.submit(replace(request, want=Kind.SPARSE))))

    def embed_tokens(self, texts: Sequence[TextInput], **options: Unpack[Options]) -> list[Vector]:
        """A vector a token, [tokens, width] a text: late interaction, or a dense model with the setting `pooling` at `none`."""
        request = request_of(texts, options, self.settings.bulk_timeout)
        return tokens_of(self._wait(self.submit(replace(request, want=Kind.TOKENS))))

    def similarity(self, one: Array, other: Array, how: Similarity | None = None) -> Array:
        """How alike vectors [n, width] and [m, width] are, [n, m], as the model's files say, or as ``how`` does."""
        return similarity(one, other, how or self.spec.similarity)

    # -- inside --------------------------------------------------------------------------------------------------

    def _forked(self) -> bool:
        """Whether this is a copy in a forked child: the threads and the device are the parent's."""
        return self._state != "new" and os.getpid() != self._process

    def _running(self) -> tuple[Parts, Pipeline]:
        if self._forked():
            raise StoppedError("this engine was started before a fork; make a new one in each process")
        if self._state == "new":
            self.start()
        if self._parts is None or self._pipeline is None or self._state == "stopped":
            raise StoppedError("the engine is not running; make a new one")
        return self._parts, self._pipeline

    def _submit_patiently(
        self, batch: Sequence[TextInput], options: Options, under_way: deque[Future[EmbedResult]]
    ) -> Future[EmbedResult]:
        """Submit; while the queue is full, wait for own work to finish, or a moment, up to the bulk timeout."""
        give_up = time.monotonic() + self.settings.bulk_timeout
        while True:
            try:
                return self.submit(request_of(batch, options, self.settings.bulk_timeout))
            except OverloadedError as error:
                left = give_up - time.monotonic()
                if left <= 0:
                    raise
                pending = next((future for future in under_way if not future.done()), None) or Future[EmbedResult]()
                try:
                    pending.exception(timeout=min(left, error.retry_after))
                except FutureTimeoutError:
                    continue

    def _wait(self, future: Future[EmbedResult]) -> EmbedResult:
        """The deadline ends the wait; this limit is for the case that the engine itself is gone."""
        try:
            return future.result(timeout=max(self.settings.timeout, self.settings.bulk_timeout) * 2 + 60)
        except FutureTimeoutError:
            future.cancel()
            raise DeadlineError("the engine gave no answer at all; this is a fault of npu-proxy, please report it") from None


_CANCELLED = StoppedError("the caller cancelled this request")

BATCH_SIZE = 256
"""Texts of one request when a caller brings more at once."""
STREAM_TEXTS = 1024
"""Texts a stream keeps under way."""


def _batches(texts: Iterable[TextInput], size: int) -> Iterator[Sequence[TextInput]]:
    source = iter(texts)
    while batch := list(itertools.islice(source, size)):
        yield batch
