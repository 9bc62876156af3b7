"""LanceDB: an embedding function for its registry, `get_registry().get("npu-proxy")`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from npu_proxy.compat.engines import FrameworkClass, framework, open_engine

_lancedb: Any = framework("lancedb.embeddings")
if TYPE_CHECKING:
    _Function = FrameworkClass
else:
    _Function = _lancedb.TextEmbeddingFunction
_pydantic: Any = framework("pydantic")


class NpuProxyEmbeddingFunction(_Function):
    """Vectors of a model in this process. Queries get the model's prompt for them."""

    name: str = "all-minilm"
    device: str | None = None
    dimensions: int | None = None
    _engine: Any = _pydantic.PrivateAttr(default=None)

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


_lancedb.register("npu-proxy")(NpuProxyEmbeddingFunction)
