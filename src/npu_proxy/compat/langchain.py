"""LangChain: Embeddings, and a document compressor that reranks."""

# pyright: reportUntypedBaseClass=false, reportUntypedClassDecorator=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import Callbacks  # type: ignore[import-not-found]  # an optional package
from langchain_core.documents import BaseDocumentCompressor, Document  # type: ignore[import-not-found]
from langchain_core.embeddings import Embeddings  # type: ignore[import-not-found]
from pydantic import ConfigDict, PrivateAttr  # type: ignore[import-not-found]

from npu_proxy.compat.engines import open_engine
from npu_proxy.engine.async_engine import AsyncEngine
from npu_proxy.engine.engine import Engine
from npu_proxy.settings import Settings


class NpuProxyEmbeddings(Embeddings):
    """Vectors of a model in this process, with its prompts for queries and documents."""

    def __init__(
        self, model: str = "all-minilm", *, device: str | None = None, settings: Settings | None = None, **options: Any
    ) -> None:
        """options: of every request, such as dimensions; as in Engine.embed."""
        self.model = model
        self._options = options
        self._engine: Engine = open_engine(model, device=device, settings=settings)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self._engine.embed(texts, input_type="document", **self._options).tolist() if texts else []

    def embed_query(self, text: str) -> list[float]:
        return self._engine.embed([text], input_type="query", **self._options)[0].tolist()

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        if not texts:
            return []
        return (await AsyncEngine(engine=self._engine).embed(texts, input_type="document", **self._options)).tolist()

    async def aembed_query(self, text: str) -> list[float]:
        return (await AsyncEngine(engine=self._engine).embed([text], input_type="query", **self._options))[0].tolist()


class NpuProxyRerank(BaseDocumentCompressor):
    """Keeps the documents that answer a query best, with `relevance_score` in their metadata."""

    model: str
    top_n: int | None = 3
    device: str | None = None
    settings: Settings | None = None
    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")
    _engine: Any = PrivateAttr(default=None)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        if not documents:
            return []
        if self._engine is None:
            self._engine = open_engine(self.model, device=self.device, settings=self.settings)
        best = self._engine.rerank(query, [document.page_content for document in documents], top_n=self.top_n)
        return [
            documents[one.index].model_copy(update={"metadata": {**documents[one.index].metadata, "relevance_score": one.score}})
            for one in best
        ]
