"""FastEmbed's TextEmbedding, SparseTextEmbedding, LateInteractionTextEmbedding and TextCrossEncoder over an engine.

Vectors are what FastEmbed gives for the same model: unit vectors, as generators of arrays. `cache_dir`, `providers`, `cuda` and
`device_ids` are ONNX Runtime's and are refused unless they have their defaults; set the engine's own with ``settings``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from npu_proxy.compat.engines import open_engine, refuse
from npu_proxy.engine.engine import Engine
from npu_proxy.engine.outputs import relevance
from npu_proxy.models.catalog import CATALOG
from npu_proxy.settings import Settings
from npu_proxy.types import OutputType, Pair, TextInput

Array = npt.NDArray[Any]
_WHY = {
    "providers": "an engine computes on the setting `device`",
    "device_ids": "an engine computes on the setting `device`",
    "specific_model_path": "pass the folder as model_name",
}
_IGNORED = ("cache_dir", "lazy_load", "cuda", "local_files_only")


class SparseEmbedding(NamedTuple):
    """Weights of vocabulary entries, as in FastEmbed."""

    values: Array
    indices: Array

    def as_object(self) -> dict[str, Array]:
        """Values and indices by name."""
        return {"values": self.values, "indices": self.indices}

    def as_dict(self) -> dict[int, float]:
        """Weights by index."""
        return dict(zip(self.indices.tolist(), self.values.tolist(), strict=True))


class _Model:
    """An engine, and what all four classes have."""

    def __init__(self, model_name: str, threads: int | None = None, *, settings: Settings | None = None, **others: Any) -> None:
        refuse({name: value for name, value in others.items() if name not in _IGNORED}, _WHY)
        self.model_name: str = model_name
        local = bool(others.get("local_files_only"))
        changes: dict[str, Any] = {"threads": threads} if threads is not None else {}
        self._engine: Engine = open_engine(model_name, settings=settings, local_files_only=local, on_empty="embed", **changes)

    @property
    def embedding_size(self) -> int:
        """Width of a vector."""
        return self._engine.spec.width

    def token_count(self, texts: str | Iterable[str], batch_size: int = 1024, **_: Any) -> int:
        """Tokens of all texts, special ones included."""
        return sum(sum(result.tokens) for result in self._results(_listed(texts), batch_size, None))

    @staticmethod
    def list_supported_models() -> list[dict[str, Any]]:
        """The models of the catalog; any other in a supported family works too."""
        return [{"model": entry.name} for entry in CATALOG]

    def _results(self, texts: Iterable[TextInput], batch_size: int, parallel: int | None, **options: Any) -> Iterator[Any]:
        return self._engine.results(
            texts, batch_size=batch_size, parallel=parallel, output_type=self._engine.spec.output_type, **options
        )


class TextEmbedding(_Model):
    """Dense unit vectors."""

    def __init__(
        self, model_name: str = "BAAI/bge-small-en-v1.5", cache_dir: str | None = None, threads: int | None = None, **others: Any
    ) -> None:
        super().__init__(model_name, threads, **others)

    def embed(
        self, documents: str | Iterable[str], batch_size: int = 256, parallel: int | None = None, **others: Any
    ) -> Iterator[Array]:
        """One vector per document, as they come. parallel: worker processes; 0 means one per core."""
        refuse(others, {})
        return self._engine.stream(_listed(documents), batch_size=batch_size, parallel=parallel, prompt="")

    def query_embed(self, query: str | Iterable[str], **others: Any) -> Iterator[Array]:
        """One vector per query; without a prompt, as there. For one, use Engine.embed(input_type="query")."""
        return self.embed(query, **others)

    def passage_embed(self, texts: Iterable[str], **others: Any) -> Iterator[Array]:
        """One vector per text; without a prompt, as there."""
        return self.embed(texts, **others)


class SparseTextEmbedding(_Model):
    """Sparse vectors."""

    def __init__(self, model_name: str, cache_dir: str | None = None, threads: int | None = None, **others: Any) -> None:
        super().__init__(model_name, threads, **others)

    def embed(
        self, documents: str | Iterable[str], batch_size: int = 256, parallel: int | None = None, **others: Any
    ) -> Iterator[SparseEmbedding]:
        """One sparse vector per document, as they come."""
        refuse(others, {})
        for result in self._results(_listed(documents), batch_size, parallel):
            for vector in result.raise_first().embeddings:
                yield SparseEmbedding(vector.values, vector.indices)

    def query_embed(self, query: str | Iterable[str], **others: Any) -> Iterator[SparseEmbedding]:
        """One sparse vector per query."""
        return self.embed(query, **others)

    def passage_embed(self, texts: Iterable[str], **others: Any) -> Iterator[SparseEmbedding]:
        """One sparse vector per text."""
        return self.embed(texts, **others)


class LateInteractionTextEmbedding(_Model):
    """One vector per token (ColBERT)."""

    def __init__(self, model_name: str, cache_dir: str | None = None, threads: int | None = None, **others: Any) -> None:
        super().__init__(model_name, threads, **others)

    def embed(
        self, documents: str | Iterable[str], batch_size: int = 256, parallel: int | None = None, **others: Any
    ) -> Iterator[Array]:
        """An array [tokens, width] per document."""
        refuse(others, {})
        return self._vectors(_listed(documents), batch_size, parallel, "document")

    def query_embed(self, query: str | Iterable[str], **others: Any) -> Iterator[Array]:
        """An array [tokens, width] per query."""
        refuse(others, {})
        return self._vectors(_listed(query), 256, None, "query")

    def passage_embed(self, texts: Iterable[str], **others: Any) -> Iterator[Array]:
        """An array [tokens, width] per text."""
        return self.embed(texts, **others)

    def _vectors(self, texts: Iterable[str], batch_size: int, parallel: int | None, side: str) -> Iterator[Array]:
        for result in self._results(texts, batch_size, parallel, input_type=side):
            yield from result.raise_first().embeddings


class TextCrossEncoder(_Model):
    """Scores of a query and documents: logits, as in FastEmbed."""

    def __init__(self, model_name: str, cache_dir: str | None = None, threads: int | None = None, **others: Any) -> None:
        super().__init__(model_name, threads, **others)

    def rerank(self, query: str, documents: Iterable[str], batch_size: int = 64, **others: Any) -> Iterator[float]:
        """The score of each document, in their order."""
        return self.rerank_pairs(((query, document) for document in documents), batch_size, **others)

    def rerank_pairs(
        self, pairs: Iterable[tuple[str, str]], batch_size: int = 64, parallel: int | None = None, **others: Any
    ) -> Iterator[float]:
        """The score of each pair, in their order."""
        refuse(others, {})
        given = (Pair(*pair) for pair in pairs)
        for result in self._engine.results(given, batch_size=batch_size, parallel=parallel, output_type=OutputType.SCORES):
            yield from relevance(np.asarray(result.raise_first().embeddings, np.float32)).tolist()


def _listed(texts: str | Iterable[str]) -> Iterable[str]:
    return [texts] if isinstance(texts, str) else texts
