"""LlamaIndex: an embedding model, and a node postprocessor that reranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from npu_proxy.compat.engines import FrameworkClass, framework, open_engine
from npu_proxy.engine.async_engine import AsyncEngine
from npu_proxy.engine.engine import Engine
from npu_proxy.settings import Settings

if TYPE_CHECKING:
    _Embedding = _Postprocessor = FrameworkClass
else:
    _Embedding = framework("llama_index.core.base.embeddings.base").BaseEmbedding
    _Postprocessor = framework("llama_index.core.postprocessor.types").BaseNodePostprocessor
_schema: Any = framework("llama_index.core.schema")
_pydantic: Any = framework("llama_index.core.bridge.pydantic")


class NpuProxyEmbedding(_Embedding):
    """Vectors of a model in this process, with its prompts for queries and documents."""

    _engine: Any = _pydantic.PrivateAttr()
    _options: Any = _pydantic.PrivateAttr()

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


class NpuProxyRerank(_Postprocessor):
    """Keeps the nodes that answer a query best, with the reranker's scores."""

    model: str = _pydantic.Field(description="A cross-encoder or a late-interaction model.")
    top_n: int = _pydantic.Field(default=2, description="How many nodes to keep.")
    _engine: Any = _pydantic.PrivateAttr(default=None)

    def __init__(
        self, model: str, top_n: int = 2, *, device: str | None = None, settings: Settings | None = None, **others: Any
    ) -> None:
        super().__init__(model=model, top_n=top_n, **others)
        self._engine = open_engine(model, device=device, settings=settings)

    @classmethod
    def class_name(cls) -> str:
        return "NpuProxyRerank"

    def _postprocess_nodes(self, nodes: list[Any], query_bundle: Any = None) -> list[Any]:
        if query_bundle is None:
            raise ValueError("Missing query bundle in extra info.")
        if not nodes:
            return []
        texts = [node.node.get_content(metadata_mode=_schema.MetadataMode.EMBED) for node in nodes]
        best = self._engine.rerank(query_bundle.query_str, texts, top_n=self.top_n)
        return [_schema.NodeWithScore(node=nodes[one.index].node, score=one.score) for one in best]
