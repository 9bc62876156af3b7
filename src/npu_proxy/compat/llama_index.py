"""LlamaIndex: an embedding model, and a node postprocessor that reranks."""

# pyright: reportUntypedBaseClass=false, reportUntypedClassDecorator=false
from __future__ import annotations

from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding  # type: ignore[import-not-found]  # an optional package
from llama_index.core.bridge.pydantic import Field, PrivateAttr  # type: ignore[import-not-found]
from llama_index.core.postprocessor.types import BaseNodePostprocessor  # type: ignore[import-not-found]
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle  # type: ignore[import-not-found]

from npu_proxy.compat.engines import open_engine
from npu_proxy.engine.async_engine import AsyncEngine
from npu_proxy.engine.engine import Engine
from npu_proxy.settings import Settings


class NpuProxyEmbedding(BaseEmbedding):
    """Vectors of a model in this process, with its prompts for queries and documents."""

    _engine: Any = PrivateAttr()
    _options: Any = PrivateAttr()

    def __init__(
        self,
        model_name: str = "all-minilm",
        *,
        device: str | None = None,
        settings: Settings | None = None,
        embed_batch_size: int = 256,
        options: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        """options: of every request, such as dimensions; as in Engine.embed."""
        super().__init__(model_name=model_name, embed_batch_size=embed_batch_size, **others)
        self._engine = open_engine(model_name, device=device, settings=settings)
        self._options = options or {}

    @classmethod
    def class_name(cls) -> str:
        return "NpuProxyEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._embed([query], "query")[0]

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._embed([text], "document")[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._embed(texts, "document")

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return (await AsyncEngine(engine=self._engine).embed([query], input_type="query", **self._options))[0].tolist()

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return (await AsyncEngine(engine=self._engine).embed([text], input_type="document", **self._options))[0].tolist()

    def _embed(self, texts: list[str], side: str) -> list[list[float]]:
        engine: Engine = self._engine
        return engine.embed(texts, input_type=side, **self._options).tolist() if texts else []


class NpuProxyRerank(BaseNodePostprocessor):
    """Keeps the nodes that answer a query best, with the reranker's scores."""

    model: str = Field(description="A cross-encoder or a late-interaction model.")
    top_n: int = Field(default=2, description="How many nodes to keep.")
    _engine: Any = PrivateAttr(default=None)

    def __init__(
        self, model: str, top_n: int = 2, *, device: str | None = None, settings: Settings | None = None, **others: Any
    ) -> None:
        super().__init__(model=model, top_n=top_n, **others)
        self._engine = open_engine(model, device=device, settings=settings)

    @classmethod
    def class_name(cls) -> str:
        return "NpuProxyRerank"

    def _postprocess_nodes(self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None) -> list[NodeWithScore]:
        if query_bundle is None:
            raise ValueError("Missing query bundle in extra info.")
        if not nodes:
            return []
        texts = [node.node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]
        best = self._engine.rerank(query_bundle.query_str, texts, top_n=self.top_n)
        return [NodeWithScore(node=nodes[one.index].node, score=one.score) for one in best]
