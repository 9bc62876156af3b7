"""LanceDB: an embedding function for its registry, `get_registry().get("npu-proxy")`."""

# pyright: reportUntypedBaseClass=false, reportUntypedClassDecorator=false
from __future__ import annotations

from typing import Any

from lancedb.embeddings import TextEmbeddingFunction, register  # type: ignore[import-not-found]  # an optional package
from pydantic import PrivateAttr  # type: ignore[import-not-found]

from npu_proxy.compat.engines import open_engine


@register("npu-proxy")
class NpuProxyEmbeddingFunction(TextEmbeddingFunction):
    """Vectors of a model in this process. Queries get the model's prompt for them."""

    name: str = "all-minilm"
    device: str | None = None
    dimensions: int | None = None
    _engine: Any = PrivateAttr(default=None)

    def generate_embeddings(self, texts: Any, *args: Any, **kwargs: Any) -> list[Any]:
        return list(self._loaded().embed(list(texts), input_type="document", dimensions=self.dimensions))

    def compute_query_embeddings(self, query: str, *args: Any, **kwargs: Any) -> list[Any]:
        return list(self._loaded().embed([query], input_type="query", dimensions=self.dimensions))

    def ndims(self) -> int:
        return self.dimensions or self._loaded().spec.width

    def _loaded(self) -> Any:
        if self._engine is None:
            self._engine = open_engine(self.name, device=self.device)
        return self._engine
