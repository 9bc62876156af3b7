"""Chroma: an embedding function that is stored with its collection by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from npu_proxy.compat.engines import FrameworkClass, framework, open_engine
from npu_proxy.engine.engine import Engine

if TYPE_CHECKING:
    _Function = FrameworkClass
else:
    _Function = framework("chromadb.api.types").EmbeddingFunction
_register: Any = framework("chromadb.utils.embedding_functions").register_embedding_function


class NpuProxyEmbeddingFunction(_Function):
    """Vectors of a model in this process. Queries get the model's prompt for them."""

    def __init__(self, model: str = "all-minilm", device: str | None = None, dimensions: int | None = None) -> None:
        self._model, self._device, self._dimensions = model, device, dimensions
        self._engine: Engine = open_engine(model, device=device)

    def __call__(self, input: list[str]) -> list[Any]:
        return list(self._engine.embed(list(input), input_type="document", dimensions=self._dimensions))

    def embed_query(self, input: list[str]) -> list[Any]:
        """Vectors of queries."""
        return list(self._engine.embed(list(input), input_type="query", dimensions=self._dimensions))

    @staticmethod
    def name() -> str:
        return "npu_proxy"

    def get_config(self) -> dict[str, Any]:
        return {"model": self._model, "device": self._device, "dimensions": self._dimensions}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> NpuProxyEmbeddingFunction:
        return NpuProxyEmbeddingFunction(**config)

    def default_space(self) -> str:
        """The distance that suits the model."""
        return {"dot": "ip", "euclidean": "l2"}.get(self._engine.spec.similarity, "cosine")

    def supported_spaces(self) -> list[str]:
        """All that Chroma has."""
        return ["cosine", "l2", "ip"]

    def validate_config_update(self, old_config: dict[str, Any], new_config: dict[str, Any]) -> None:
        """Raise ValueError if vectors of the two could not be compared."""
        if old_config.get("model") != new_config.get("model") or old_config.get("dimensions") != new_config.get("dimensions"):
            raise ValueError("The model and its dimensions cannot be changed after a collection was made.")


_register(NpuProxyEmbeddingFunction)
