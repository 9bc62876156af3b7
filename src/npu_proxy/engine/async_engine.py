"""AsyncEngine: the methods of Engine as coroutines. It wraps an Engine and awaits its futures; nothing blocks the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import numpy.typing as npt

from npu_proxy.cache.vectors import VectorCache
from npu_proxy.devices.base import Device
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
    tokens_call,
)
from npu_proxy.engine.counters import Stats
from npu_proxy.engine.engine import Engine, State
from npu_proxy.engine.inputs import as_text, text_stream
from npu_proxy.engine.options import RequestOptions, make_request
from npu_proxy.engine.parallel import parallel_results
from npu_proxy.engine.similarity import similarity
from npu_proxy.engine.stream import batches, batches_async, in_thread, stream_results_async
from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.settings import Settings
from npu_proxy.spec import ModelSpec
from npu_proxy.types import (
    EmbedRequest,
    EmbedResult,
    Label,
    OutputType,
    RerankResult,
    Similarity,
    SparseVector,
    TextInput,
    Vector,
)

Answer = TypeVar("Answer")
Array = npt.NDArray[Any]


class AsyncEngine:
    """Engine's methods as coroutines. Use ``async with``, or astart and astop, which may be called repeatedly and concurrently.

    Cancelling a task drops what its call has waiting; only the batches being computed are finished.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        device: str | None = None,
        settings: Settings | None = None,
        *,
        engine: Engine | None = None,
    ) -> None:
        """Wrap ``engine``, or a new Engine made with the other arguments."""
        self.engine: Engine = engine or Engine(model, device, settings)

    # -- life cycle ----------------------------------------------------------------------------------------------

    async def astart(self) -> Self:
        """Load the model without blocking the event loop. A stopped engine can be started again."""
        await asyncio.to_thread(self.engine.start)
        return self

    async def astop(self, drain: float | None = None) -> None:
        """Stop without blocking the event loop."""
        await asyncio.to_thread(self.engine.stop, drain)

    async def __aenter__(self) -> Self:
        return await self.astart()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.astop(drain=0.0 if error else None)

    # -- components, as in Engine; start the engine first, or these block while it starts ------------------------

    @property
    def settings(self) -> Settings:
        """The engine's settings."""
        return self.engine.settings

    @property
    def state(self) -> State:
        """`new`, `running`, `stopping` or `stopped`."""
        return self.engine.state

    @property
    def spec(self) -> ModelSpec:
        """The model's spec."""
        return self.engine.spec

    @property
    def tokenizer(self) -> RequestTokenizer:
        """The model's tokenizer and prompts."""
        return self.engine.tokenizer

    @property
    def device(self) -> Device:
        """The device that computes the batches."""
        return self.engine.device

    @property
    def cache(self) -> VectorCache | None:
        """The vector cache; None if the settings ask for none."""
        return self.engine.cache

    def change_limits(self, settings: Settings) -> None:
        """Like Engine.change_limits."""
        self.engine.change_limits(settings)

    def stats(self) -> Stats:
        """A snapshot of the counters, the queue depth and the stages."""
        return self.engine.stats()

    # -- verbs ---------------------------------------------------------------------------------------------------

    async def submit(self, request: EmbedRequest, deadline: float | None = None) -> EmbedResult:
        """Like Engine.submit; cancelling the task drops the request."""
        await self._ready()
        return await asyncio.wrap_future(self.engine.submit(request, deadline))

    async def embed(self, texts: Iterable[TextInput], *, batch_size: int = BATCH_SIZE, **options: Unpack[RequestOptions]) -> Array:
        """Like Engine.embed."""
        return await self._answer(embed_call(self.settings, texts, batch_size, options))

    async def stream(
        self,
        texts: Iterable[TextInput] | AsyncIterable[TextInput],
        *,
        batch_size: int = BATCH_SIZE,
        parallel: int | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncIterator[Array]:
        """Like Engine.stream; takes asynchronous iterables too. Others are read in a thread of their own."""
        offset = 0
        async with aclosing(self._results(texts, batch_size, parallel, options)) as results:
            async for result in results:
                for vector in raise_first(result, offset).embeddings:
                    yield vector  # type: ignore[misc]  # rows of an array, or strings
                offset += len(result.errors)

    async def results(
        self,
        texts: Iterable[TextInput] | AsyncIterable[TextInput],
        *,
        batch_size: int = BATCH_SIZE,
        parallel: int | None = None,
        output_type: OutputType | str = OutputType.DENSE,
        **options: Unpack[RequestOptions],
    ) -> AsyncIterator[EmbedResult]:
        """Like Engine.results; takes asynchronous iterables too."""
        async with aclosing(self._results(texts, batch_size, parallel, options, as_output_type(output_type))) as results:
            async for result in results:
                yield result

    async def embed_query(self, text: str) -> list[float]:
        """Like Engine.embed_query."""
        return (await self.embed([text], input_type="query"))[0].tolist()

    async def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Like Engine.embed_documents."""
        return (await self.embed(texts, input_type="document")).tolist() if texts else []

    async def rerank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_n: int | None = None,
        raw: bool = False,
        batch_size: int = BATCH_SIZE,
        **options: Unpack[RequestOptions],
    ) -> list[RerankResult]:
        """Like Engine.rerank."""
        await self._ready()
        return await self._answer(
            rerank_call(self.settings, self.spec, query, documents, batch_size, options, top_n=top_n, raw=raw)
        )

    async def classify(
        self,
        texts: Iterable[TextInput],
        *,
        top_n: int | None = None,
        raw: bool = False,
        batch_size: int = BATCH_SIZE,
        **options: Unpack[RequestOptions],
    ) -> list[list[Label]]:
        """Like Engine.classify."""
        await self._ready()
        return await self._answer(classify_call(self.settings, self.spec, texts, batch_size, options, top_n=top_n, raw=raw))

    async def embed_sparse(
        self, texts: Iterable[TextInput], *, batch_size: int = BATCH_SIZE, **options: Unpack[RequestOptions]
    ) -> list[SparseVector]:
        """Like Engine.embed_sparse."""
        return await self._answer(sparse_call(self.settings, texts, batch_size, options))

    async def embed_tokens(
        self, texts: Iterable[TextInput], *, batch_size: int = BATCH_SIZE, **options: Unpack[RequestOptions]
    ) -> list[Vector]:
        """Like Engine.embed_tokens."""
        return await self._answer(tokens_call(self.settings, texts, batch_size, options))

    async def similarity(self, left: Array, right: Array, how: Similarity | None = None) -> Array:
        """Like Engine.similarity."""
        await self._ready()
        return await asyncio.to_thread(similarity, left, right, how or self.spec.similarity)

    # -- internal ------------------------------------------------------------------------------------------------

    async def _ready(self) -> None:
        """Start a new engine, in a thread."""
        if self.engine.state == "new":
            await self.astart()

    async def _answer(self, call: Call[Answer]) -> Answer:
        await self._ready()
        results: list[EmbedResult] = []
        offset = 0
        async with aclosing(stream_results_async(call.requests, self.engine.submit, call.patience)) as stream:
            async for result in stream:
                results.append(raise_first(result, offset))
                offset += len(result.errors)
        return call.combine(results)

    async def _results(
        self,
        texts: Iterable[TextInput] | AsyncIterable[TextInput],
        batch_size: int,
        parallel: int | None,
        options: RequestOptions,
        output_type: OutputType = OutputType.DENSE,
    ) -> AsyncGenerator[EmbedResult]:
        check_batch_size(batch_size)
        source = _checked(texts) if isinstance(texts, AsyncIterable) else text_stream(texts)
        if parallel is not None:
            if isinstance(source, AsyncIterable):
                source = iter([text async for text in source])  # worker processes are fed from a thread
            lists = batches(source, batch_size)
            made = parallel_results(type(self.engine), self.settings, lists, parallel, options, output_type)
            async with aclosing(in_thread(made)) as found:
                async for result in found:
                    yield result
            return
        await self._ready()
        seconds = self.settings.bulk_timeout
        async with (
            aclosing(batches_async(source, batch_size)) as lists,
            aclosing(stream_results_async(_requests(lists, options, output_type, seconds), self.engine.submit, seconds)) as results,
        ):
            async for result in results:
                yield result


async def _checked(texts: AsyncIterable[Any]) -> AsyncIterator[TextInput]:
    index = 0
    async for text in texts:
        yield as_text(text, index)
        index += 1


async def _requests(
    lists: AsyncIterable[Any], options: RequestOptions, output_type: OutputType, seconds: float
) -> AsyncIterator[EmbedRequest]:
    async for texts in lists:
        yield replace(make_request(texts, options, seconds), output_type=output_type)
