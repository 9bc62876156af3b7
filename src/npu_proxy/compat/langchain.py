"""LangChain: Embeddings, and a document compressor that reranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from npu_proxy.compat.engines import FrameworkClass, framework, open_engine
from npu_proxy.engine.async_engine import AsyncEngine
from npu_proxy.engine.engine import Engine
from npu_proxy.settings import Settings

if TYPE_CHECKING:
    _Embeddings = _Compressor = FrameworkClass
else:
    _Embeddings = framework("langchain_core.embeddings").Embeddings
    _Compressor = framework("langchain_core.documents").BaseDocumentCompressor
_pydantic: Any = framework("pydantic")


class NpuProxyEmbeddings(_Embeddings):
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


class NpuProxyRerank(_Compressor):
    """Keeps the documents that answer a query best, with `relevance_score` in their metadata."""

    model: str
    top_n: int | None = 3
    device: str | None = None
    settings: Settings | None = None
    model_config: Any = _pydantic.ConfigDict(arbitrary_types_allowed=True, extra="forbid")
    _engine: Any = _pydantic.PrivateAttr(default=None)

    def compress_documents(self, documents: Sequence[Any], query: str, callbacks: Any = None) -> Sequence[Any]:
        if not documents:
            return []
        if self._engine is None:
            self._engine = open_engine(self.model, device=self.device, settings=self.settings)
        best = self._engine.rerank(query, [document.page_content for document in documents], top_n=self.top_n)
        return [
            documents[one.index].model_copy(update={"metadata": {**documents[one.index].metadata, "relevance_score": one.score}})
            for one in best
        ]
