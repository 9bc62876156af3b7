"""Haystack: embedders of texts and documents, and a ranker."""

# pyright: reportUntypedBaseClass=false, reportUntypedClassDecorator=false
from __future__ import annotations

from dataclasses import replace
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict  # type: ignore[import-not-found]  # an optional package

from npu_proxy.compat.engines import open_engine
from npu_proxy.engine.engine import Engine


class _Component:
    """The model, loaded by ``warm_up`` or when it is first needed. ``super()`` does not work in what @component makes."""

    def __init__(self, model: str, device: str | None, **others: Any) -> None:
        self.model = model
        self.device = device
        self._others = others
        self._loaded: Engine | None = None

    def warm_up(self) -> None:
        """Load the model."""
        if self._loaded is None:
            self._loaded = open_engine(self.model, device=self.device)

    def to_dict(self) -> dict[str, Any]:
        """What makes this component again."""
        return default_to_dict(self, model=self.model, device=self.device, **self._others)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Any:
        """The component that ``to_dict`` described."""
        return default_from_dict(cls, data)

    def _engine(self) -> Engine:
        self.warm_up()
        assert self._loaded is not None
        return self._loaded


@component
class NpuProxyTextEmbedder(_Component):
    """The vector of a query."""

    def __init__(self, model: str = "all-minilm", device: str | None = None, dimensions: int | None = None) -> None:
        _Component.__init__(self, model, device, dimensions=dimensions)

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    def run(self, text: str) -> dict[str, Any]:
        """embedding: of the text. meta: the model and its fingerprint."""
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance] - pipelines check no types
            raise TypeError("NpuProxyTextEmbedder expects a string; for documents use NpuProxyDocumentEmbedder")
        engine = self._engine()
        vector = engine.embed([text], input_type="query", **self._others)[0]
        return {"embedding": vector.tolist(), "meta": {"model": self.model, "fingerprint": engine.spec.fingerprint}}


@component
class NpuProxyDocumentEmbedder(_Component):
    """Documents with their vectors. meta_fields_to_embed: put before the content, one per line."""

    def __init__(
        self,
        model: str = "all-minilm",
        device: str | None = None,
        dimensions: int | None = None,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
    ) -> None:
        _Component.__init__(
            self,
            model,
            device,
            dimensions=dimensions,
            meta_fields_to_embed=meta_fields_to_embed,
            embedding_separator=embedding_separator,
        )
        self._dimensions = dimensions
        self._fields = meta_fields_to_embed or []
        self._separator = embedding_separator

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """documents: the same, with vectors."""
        engine = self._engine()
        texts = [self._separator.join([*self._values(document), document.content or ""]) for document in documents]
        vectors = engine.embed(texts, input_type="document", dimensions=self._dimensions).tolist() if texts else []
        made = [replace(document, embedding=vector) for document, vector in zip(documents, vectors, strict=True)]
        return {"documents": made, "meta": {"model": self.model, "fingerprint": engine.spec.fingerprint}}

    def _values(self, document: Document) -> list[str]:
        return [str(document.meta[name]) for name in self._fields if document.meta.get(name) is not None]


@component
class NpuProxyRanker(_Component):
    """Documents by how well they answer a query."""

    def __init__(self, model: str, device: str | None = None, top_k: int = 10) -> None:
        _Component.__init__(self, model, device, top_k=top_k)
        self._top_k = top_k

    @component.output_types(documents=list[Document])
    def run(self, query: str, documents: list[Document], top_k: int | None = None) -> dict[str, list[Document]]:
        """documents: the best ones, with their scores."""
        if not documents:
            return {"documents": []}
        best = self._engine().rerank(query, [document.content or "" for document in documents], top_n=top_k or self._top_k)
        return {"documents": [replace(documents[one.index], score=one.score) for one in best]}
