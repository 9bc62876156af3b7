"""Engine: loads a model and embeds, reranks and classifies. AsyncEngine (async_engine.py) has the same methods as coroutines.

Longer than most files here: it is the public surface, and most of it is signatures and their docstrings.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack

import numpy.typing as npt

from npu_proxy.cache.entry import CacheKeys
from npu_proxy.cache.tiers import open_cache
from npu_proxy.cache.vectors import VectorCache
from npu_proxy.devices.base import Device
from npu_proxy.devices.fallback import Fallback
from npu_proxy.engine.admission import QueueLimits, estimated_tokens, time_limit
from npu_proxy.engine.calls import (
    BATCH_SIZE,
    Call,
    as_output_type,
    check_batch_size,
    classify_call,
    embed_call,
    raise_first,
    rerank_call,
    sparse_call,
    stream_requests,
    tokens_call,
)
from npu_proxy.engine.components import EngineComponents, load_components
from npu_proxy.engine.counters import Stats
from npu_proxy.engine.encode_options import EncodeOptions
from npu_proxy.engine.finish import finish
from npu_proxy.engine.inputs import text_list, text_stream
from npu_proxy.engine.options import RequestOptions
from npu_proxy.engine.parallel import parallel_results
from npu_proxy.engine.pending import PendingRequest
from npu_proxy.engine.pipeline import Pipeline, PipelineLimits
from npu_proxy.engine.similarity import similarity
from npu_proxy.engine.stream import batches, stream_results
from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.engine.uninterrupted import interruptible, uninterrupted
from npu_proxy.engine.validation import check_numbers, check_output, check_texts, cuts_untrained
from npu_proxy.errors import DeadlineError, InputError, StoppedError
from npu_proxy.models.per_model import settings_of
from npu_proxy.settings import Settings, general_value
from npu_proxy.spec import ModelSpec
from npu_proxy.types import (
    EmbedRequest,
    EmbedResult,
    Label,
    Lane,
    OutputType,
    RerankResult,
    Similarity,
    SparseVector,
    TextInput,
    Vector,
)

_log = logging.getLogger("npu_proxy.engine")

Array = npt.NDArray[Any]
Answer = TypeVar("Answer")
State = Literal["new", "running", "stopping", "stopped"]

_CANCELLED = StoppedError("the caller cancelled this request")


def _close(pipeline: Pipeline, device: Device, cache: VectorCache | None, drain: float) -> None:
    pipeline.stop(drain)
    device.close()
    if cache is not None:
        cache.close()


def _close_later(process: int, close: Callable[[float], None]) -> None:
    """End what a forgotten engine left running. The garbage collector may call this while any lock is held, hence the thread."""
    if os.getpid() == process:
        threading.Thread(target=close, args=(0.0,), name="npu-proxy-forgotten").start()


_started: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """Stop all engines at exit; native threads that are still running would abort the process, as would an interrupt now."""
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    for engine in list(_started):
        engine.stop(drain=0.0)


class Engine:
    """Embeds texts. Use it as a context manager, or let the first call start it. A stopped engine can be started again.

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
        components: Callable[[Settings, threading.Event], EngineComponents] = load_components,
    ) -> None:
        """``model`` and ``device`` override the settings of the same name. Nothing is loaded before ``start``.

        cache: a cache shared with other engines; its owner closes it. None opens the cache that the settings ask for.
        """
        settings = settings or Settings()
        if model is not None:
            settings = replace(settings, model=model)  # type: ignore[reportArgumentType] (one is a list of one)
        if device is not None:
            settings = replace(settings, device=device)
        self.settings: Settings = settings_of(settings, settings.model[0])
        self._load = components
        self._shared_cache = cache
        self._cache = cache
        self._cache_keys: CacheKeys | None = None
        self._warned_of_cut = False
        self._state: State = "new"
        self._change = threading.Lock()
        self._stopping = threading.Event()
        self._process = os.getpid()
        self._pipeline: Pipeline | None = None
        self._components: EngineComponents | None = None
        self._close: Callable[[float], None] | None = None
        self._finalizer: weakref.finalize[..., Engine] | None = None

    # -- life cycle ----------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """`new`, `running`, `stopping` or `stopped`."""
        return self._state

    def start(self) -> Self:
        """Load and compile the model. Does nothing if the engine is running; starts a stopped engine again, on new devices."""
        with self._change:
            if self._state == "running":
                return self
            stopping = self._stopping = threading.Event()
            try:
                components = uninterrupted(lambda: self._load(self.settings, stopping), lambda made: made.device.close())
            except BaseException:
                stopping.set()
                raise
            opened: VectorCache | None = None
            try:
                opened = open_cache(self.settings) if self._shared_cache is None else None
                self._open(components, opened if self._shared_cache is None else self._shared_cache)
            except BaseException:
                components.device.close()
                if opened is not None:
                    opened.close()
                raise
            self._components = components
            self._process = os.getpid()
            self._state = "running"
            assert self._pipeline is not None
            self._close = partial(_close, self._pipeline, components.device, opened)
            self._finalizer = weakref.finalize(self, _close_later, self._process, self._close)
            self._finalizer.atexit = False  # _stop_all does it
            _started.add(self)
        return self

    def _open(self, components: EngineComponents, cache: VectorCache | None) -> None:
        settings = self.settings
        self._cache = cache
        if cache is not None:
            if isinstance(components.device, Fallback):
                components.device.on_wrong = lambda origin: cache.void([origin])
            configuration = (settings.sanitize, settings.on_empty, general_value(settings.cache_prefix))
            self._cache_keys = CacheKeys(components.spec.fingerprint, *configuration)
        limits = PipelineLimits(
            batch_delay=settings.batch_delay,
            aging=settings.aging,
            window=settings.window,
            queue=QueueLimits(texts=settings.max_queue_items, tokens=settings.max_queue_tokens),
        )
        self._pipeline = Pipeline(components.tokenizer, components.device, components.spec, limits, cache, components.canaries)

    def stop(self, drain: float | None = None) -> None:
        """Let open requests finish for up to ``drain`` seconds (default: the setting `drain`), fail the rest, end all threads.

        If the engine is starting, the start is given up.
        """
        if self._is_forked():
            return
        self._stopping.set()
        with self._change:
            if self._state == "running" and self._finalizer is not None and self._close is not None:
                self._state = "stopping"
                self._finalizer.detach()
                _started.discard(self)
                uninterrupted(partial(self._close, self.settings.drain if drain is None else drain))
            self._state = "stopped"

    def change_limits(self, settings: Settings) -> None:
        """Use the limits and times of these settings for new requests; nothing else changes."""
        names = ("timeout", "bulk_timeout", "interactive_texts", "max_queue_items", "max_queue_tokens", "drain")
        self.settings = replace(self.settings, **{name: getattr(settings, name) for name in names})
        if self._pipeline is not None:
            self._pipeline.limit(QueueLimits(texts=settings.max_queue_items, tokens=settings.max_queue_tokens))

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # After an error, the caller does not need the requests that are still open.
        self.stop(drain=0.0 if error else None)

    # -- components ----------------------------------------------------------------------------------------------

    @property
    def spec(self) -> ModelSpec:
        """The model's spec: width, limits, prompts, fingerprint. Starts the engine if needed."""
        return self._ensure_started()[0].spec

    @property
    def tokenizer(self) -> RequestTokenizer:
        """The model's tokenizer and prompts. Starts the engine if needed."""
        return self._ensure_started()[0].tokenizer

    @property
    def device(self) -> Device:
        """The device that computes the batches. Starts the engine if needed."""
        return self._ensure_started()[0].device

    @property
    def cache(self) -> VectorCache | None:
        """The vector cache; None if the settings ask for none."""
        return self._cache

    def stats(self) -> Stats:
        """A snapshot of the counters, the queue depth and the stages. Starts the engine if needed."""
        return self._ensure_started()[1].stats()

    # -- verbs ---------------------------------------------------------------------------------------------------

    def submit(self, request: EmbedRequest, deadline: float | None = None) -> Future[EmbedResult]:
        """Queue a request. ``deadline``, in time.monotonic() seconds, overrides the request's own.

        Returns a future for an EmbedResult, which holds an error for each text that failed. If the future is cancelled, texts
        of the request that are still waiting are not computed.

        Raises InputError if the whole request is invalid, OverloadedError if the queue is full or too slow for the deadline, and
        StoppedError if the engine is not running.
        """
        components, pipeline = self._ensure_started()
        if not isinstance(request.texts, list | tuple):
            request = replace(request, texts=text_list(request.texts))
        options = self._checked(request, components)
        future: Future[EmbedResult] = Future()

        def on_done(pending: PendingRequest) -> None:
            pipeline.forget(pending)
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = finish(pending, components.spec)
            except Exception as error:  # for this caller, not for the stage that delivered the last text
                future.set_exception(error)
            else:
                future.set_result(result)

        now = time.monotonic()
        if deadline is None:
            deadline = request.deadline
        if deadline is None:
            deadline = now + self._time_limit(request, options, pipeline)
        pending = PendingRequest(request, deadline, now, on_done)
        if self._cache is not None and self._cache_keys is not None and not request.chunking.spans:
            scope = (f"client {request.client.name}",) if self.settings.cache_scope == "key" else ()
            pending.cache_keys = self._cache_keys.make(request.texts, (*options.key, *scope))
            pending.resolve_cached(enumerate(self._cache.recall(pending.cache_keys)))
            if not pending.unfinished:
                return future
        few = pending.unfinished <= self.settings.interactive_texts
        pipeline.submit(pending, options, request.lane or (Lane.INTERACTIVE if few else Lane.BULK))
        future.add_done_callback(lambda done: pending.fail_all(_CANCELLED) if done.cancelled() else None)
        return future

    def embed(self, texts: Iterable[TextInput], *, batch_size: int = BATCH_SIZE, **options: Unpack[RequestOptions]) -> Array:
        """Embed texts; returns vectors [n, width] in their order, in ``dtype`` (float32 by default; n strings for base64).

        texts: any collection of texts, such as a list, an array or a column of a table. batch_size: texts per request; a few
        requests are in progress at a time, and the device packs what they contain. If a text fails, raises its error.
        """
        return self._answer(embed_call(self.settings, texts, batch_size, options))

    def stream(
        self,
        texts: Iterable[TextInput],
        *,
        batch_size: int = BATCH_SIZE,
        parallel: int | None = None,
        **options: Unpack[RequestOptions],
    ) -> Iterator[Array]:
        """Yield one vector per text, in order, from an iterable of any length, in bounded memory.

        batch_size: texts per request; a few requests are in progress at a time. parallel: None computes in this process; N
        starts N worker processes with one engine each (0: one process per core), for offline work on many cores.
        """
        return _vectors(self.results(texts, batch_size=batch_size, parallel=parallel, **options))

    def results(
        self,
        texts: Iterable[TextInput],
        *,
        batch_size: int = BATCH_SIZE,
        parallel: int | None = None,
        output_type: OutputType | str = OutputType.DENSE,
        **options: Unpack[RequestOptions],
    ) -> Iterator[EmbedResult]:
        """Like ``stream``, but yield one EmbedResult per batch, with token counts and the errors of individual texts."""
        check_batch_size(batch_size)
        lists = batches(text_stream(texts), batch_size)
        if parallel is not None:
            return parallel_results(type(self), self.settings, lists, parallel, options, as_output_type(output_type))
        requests = stream_requests(self.settings, lists, options, as_output_type(output_type))
        return stream_results(requests, self.submit, self._wait, self.settings.bulk_timeout)

    def embed_query(self, text: str) -> list[float]:
        """Embed one query, with the model's query prompt if it has one; returns a list (LangChain's signature)."""
        return self.embed([text], input_type="query")[0].tolist()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents, with the model's document prompt if it has one; returns lists (LangChain's signature)."""
        return self.embed(texts, input_type="document").tolist() if texts else []

    def rerank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_n: int | None = None,
        raw: bool = False,
        batch_size: int = BATCH_SIZE,
        **options: Unpack[RequestOptions],
    ) -> list[RerankResult]:
        """Rank documents by how well they answer a query, best first. Needs a cross-encoder or a late-interaction model.

        raw: return logits instead of scores from 0 to 1. truncate=`chunk` scores a long document by its best part. The options
        are truncate, chunking, max_tokens, lane and timeout.
        """
        return self._answer(rerank_call(self.settings, self.spec, query, documents, batch_size, options, top_n=top_n, raw=raw))

    def classify(
        self,
        texts: Iterable[TextInput],
        *,
        top_n: int | None = None,
        raw: bool = False,
        batch_size: int = BATCH_SIZE,
        **options: Unpack[RequestOptions],
    ) -> list[list[Label]]:
        """Labels of each text (or Pair), best first. Needs a classifier. raw: return logits instead of probabilities."""
        return self._answer(classify_call(self.settings, self.spec, texts, batch_size, options, top_n=top_n, raw=raw))

    def embed_sparse(
        self, texts: Iterable[TextInput], *, batch_size: int = BATCH_SIZE, **options: Unpack[RequestOptions]
    ) -> list[SparseVector]:
        """One sparse vector per text: weights of vocabulary entries (SPLADE, or the lexical weights of bge-m3)."""
        return self._answer(sparse_call(self.settings, texts, batch_size, options))

    def embed_tokens(
        self, texts: Iterable[TextInput], *, batch_size: int = BATCH_SIZE, **options: Unpack[RequestOptions]
    ) -> list[Vector]:
        """One array [tokens, width] per text. Needs a late-interaction model, or a dense one with the setting `pooling`=`none`."""
        return self._answer(tokens_call(self.settings, texts, batch_size, options))

    def similarity(self, left: Array, right: Array, how: Similarity | None = None) -> Array:
        """Similarity [n, m] of vectors [n, width] and [m, width]. how: defaults to the measure that the model's files define."""
        return similarity(left, right, how or self.spec.similarity)

    # -- internal ------------------------------------------------------------------------------------------------

    def _answer(self, call: Call[Answer]) -> Answer:
        """Wait for the results of a call. If one has an error, or the caller interrupts, the others are cancelled."""
        results: list[EmbedResult] = []
        offset = 0
        with closing(stream_results(call.requests, self.submit, self._wait, call.patience)) as stream:
            for result in stream:
                results.append(raise_first(result, offset))
                offset += len(result.errors)
        return call.combine(results)

    def _time_limit(self, request: EmbedRequest, options: EncodeOptions, pipeline: Pipeline) -> float:
        """Seconds for a request that sets no limit, by its size."""
        settings = self.settings
        seconds = pipeline.seconds_for(estimated_tokens(request.texts, options.most_tokens))
        if seconds is None and len(request.texts) <= settings.interactive_texts:
            return settings.timeout
        return time_limit(seconds, timeout=settings.timeout, bulk_timeout=settings.bulk_timeout)

    def _checked(self, request: EmbedRequest, components: EngineComponents) -> EncodeOptions:
        """How to tokenize a request. Raises InputError if the model or the device cannot do what it asks for."""
        spec = components.spec
        check_texts(request.texts)
        check_output(request, spec)
        check_numbers(request, spec)
        options = components.tokenizer.options(request)
        if options.late_chunking and all(shape.segments == 1 for shape in components.device.shapes):
            message = "late chunking needs several vectors per text; turn on `packing` and set `device` to one without a graph file"
            raise InputError(message, param="late")
        most = max(shape.segments for shape in components.device.shapes)
        if len(options.chunking.boundaries) >= most:
            raise InputError(f"late chunking has up to {most} chunks with `boundaries`; send fewer", param="boundaries")
        if cuts_untrained(spec, request) and not self._warned_of_cut:
            self._warned_of_cut = True
            message = "%s was not trained for fewer dimensions than %d (Matryoshka), which costs quality (docs/dimensions.md)"
            _log.warning(message, spec.name, spec.width)
        return options

    def _is_forked(self) -> bool:
        """Whether this is a forked child's copy of the engine; its threads and device belong to the parent."""
        return self._state != "new" and os.getpid() != self._process

    def _ensure_started(self) -> tuple[EngineComponents, Pipeline]:
        """Start the engine if it is new. Raises StoppedError if it was stopped (and not started again) or forked."""
        if self._is_forked():
            raise StoppedError("this engine was started before a fork; create a new one in each process")
        if self._state == "new":
            self.start()
        if self._components is None or self._pipeline is None or self._state == "stopped":
            raise StoppedError("the engine was stopped; start it again, or create a new one")
        return self._components, self._pipeline

    def _wait(self, future: Future[EmbedResult]) -> EmbedResult:
        """Wait for a result. Normally the deadline ends the wait; the timeout here catches an engine that has died."""
        try:
            return interruptible(future, max(self.settings.timeout, self.settings.bulk_timeout) * 2 + 60)
        except FutureTimeoutError:
            raise DeadlineError("the engine did not respond; this is a bug in npu-proxy, please report it") from None


def _vectors(results: Iterator[EmbedResult]) -> Iterator[Array]:
    offset = 0
    for result in results:
        yield from raise_first(result, offset).embeddings  # type: ignore[misc]  # rows of an array, or strings
        offset += len(result.errors)
