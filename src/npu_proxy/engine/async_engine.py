"""AsyncEngine: the methods of Engine as coroutines. It wraps an Engine and awaits its futures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import numpy as np
import numpy.typing as npt

from npu_proxy.engine.engine import BATCH_SIZE, Engine
from npu_proxy.engine.options import RequestOptions, make_request
from npu_proxy.settings import Settings
from npu_proxy.types import EmbedRequest, EmbedResult, Label, RerankResult, SparseVector, TextInput, Vector

Array = npt.NDArray[Any]


class AsyncEngine:
    """Engine's methods as coroutines. Use ``async with``, or astart and astop, which may be called repeatedly and concurrently."""

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

    async def astart(self) -> Self:
        """Load the model without blocking the event loop."""
        await asyncio.to_thread(self.engine.start)
        return self

    async def astop(self, drain: float | None = None) -> None:
        """Stop without blocking the event loop."""
        await asyncio.to_thread(self.engine.stop, drain)

    async def __aenter__(self) -> Self:
        return await self.astart()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.astop(drain=0.0 if error else None)

    async def submit(self, request: EmbedRequest) -> EmbedResult:
        """Like Engine.submit; cancelling the task drops the request."""
        return await asyncio.wrap_future(self.engine.submit(request))

    async def embed(self, texts: Sequence[TextInput], **options: Unpack[RequestOptions]) -> Array:
        """Like Engine.embed."""
        if isinstance(texts, str) or len(texts) > BATCH_SIZE:
            return await asyncio.to_thread(self.engine.embed, texts, **options)
        result = await self.submit(make_request(texts, options, self.engine.settings.timeout))
        return np.asarray(result.raise_first().embeddings)

    async def stream(
        self, texts: Iterable[TextInput], *, batch_size: int = 256, parallel: int | None = None, **options: Unpack[RequestOptions]
    ) -> AsyncIterator[Array]:
        """Like Engine.stream; the iterable is read in a thread."""
        results = self.engine.results(texts, batch_size=batch_size, parallel=parallel, **options)
        try:
            while (result := await asyncio.to_thread(next, results, None)) is not None:
                for vector in result.raise_first().embeddings:
                    yield vector  # type: ignore[misc]
        finally:
            close = getattr(results, "close", None)
            if close:
                await asyncio.to_thread(close)

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        raw: bool = False,
        **options: Unpack[RequestOptions],
    ) -> list[RerankResult]:
        """Like Engine.rerank."""
        return await asyncio.to_thread(self.engine.rerank, query, documents, top_n=top_n, raw=raw, **options)

    async def classify(
        self, texts: Sequence[TextInput], *, top_n: int | None = None, raw: bool = False, **options: Unpack[RequestOptions]
    ) -> list[list[Label]]:
        """Like Engine.classify."""
        return await asyncio.to_thread(self.engine.classify, texts, top_n=top_n, raw=raw, **options)

    async def embed_sparse(self, texts: Sequence[TextInput], **options: Unpack[RequestOptions]) -> list[SparseVector]:
        """Like Engine.embed_sparse."""
        return await asyncio.to_thread(self.engine.embed_sparse, texts, **options)

    async def embed_tokens(self, texts: Sequence[TextInput], **options: Unpack[RequestOptions]) -> list[Vector]:
        """Like Engine.embed_tokens."""
        return await asyncio.to_thread(self.engine.embed_tokens, texts, **options)

    async def embed_query(self, text: str) -> list[float]:
        """Like Engine.embed_query."""
        return (await self.embed([text], input_type="query"))[0].tolist()

    async def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Like Engine.embed_documents."""
        return (await self.embed(texts, input_type="document")).tolist() if texts else []
