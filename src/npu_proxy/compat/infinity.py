"""Infinity's AsyncEmbeddingEngine over an AsyncEngine: `embed`, `rerank`, `classify`, each with the number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from npu_proxy.compat.engines import open_engine, refuse
from npu_proxy.engine.async_engine import AsyncEngine
from npu_proxy.engine.engine import Engine
from npu_proxy.engine.outputs import relevance
from npu_proxy.engine.scoring import probabilities, ranked, sigmoid, sorted_labels
from npu_proxy.errors import StoppedError
from npu_proxy.settings import Settings
from npu_proxy.types import EmbedRequest, EmbedResult, OutputType, Pair, TextInput

Array = npt.NDArray[Any]
_NEUTRAL = {
    "batch_size",
    "engine",
    "model_warmup",
    "vector_disk_cache_path",
    "lengths_via_tokenize",
    "compile",
    "bettertransformer",
}
_WHY = {
    "revision": "pull it with `npu-proxy pull NAME --revision`",
    "dtype": "use the setting `precision`",
    "pooling_method": "use the setting `pooling`",
    "embedding_dtype": "convert the vectors, or use Engine.embed(dtype=...)",
    "onnx_file_name": "use the setting `onnx_file`",
}
_DEFAULTS = (None, "auto", "float32", True, False, "")


@dataclass(frozen=True, kw_only=True)
class EngineArgs:
    """What an engine is made of. Other arguments of Infinity's are refused if they would change vectors."""

    model_name_or_path: str
    device: str = "auto"
    served_model_name: str = ""
    trust_remote_code: bool = True
    settings: Settings | None = None

    @classmethod
    def of(cls, **arguments: Any) -> Self:
        """The arguments of Infinity's EngineArgs."""
        own = {name: value for name, value in arguments.items() if name in cls.__dataclass_fields__}
        others = {name: value for name, value in arguments.items() if name not in own and name not in _NEUTRAL}
        refuse({name: getattr(value, "value", value) for name, value in others.items()}, _WHY, _DEFAULTS)
        return cls(**own)


class RerankReturnType(NamedTuple):
    """A document's score, its index and its text."""

    relevance_score: float
    index: int  # pyright: ignore[reportIncompatibleMethodOverride] - as there
    document: str


class AsyncEmbeddingEngine:
    """Use it as an asynchronous context manager, or call ``astart`` and ``astop``."""

    def __init__(self, model_name_or_path: str | None = None, *, _arguments: EngineArgs | None = None, **arguments: Any) -> None:
        if _arguments is None:
            _arguments = EngineArgs.of(model_name_or_path=model_name_or_path, **arguments)
        self.engine_args: EngineArgs = _arguments
        self._engine: Engine | None = None
        self._asynchronous: AsyncEngine | None = None

    @classmethod
    def from_args(cls, engine_args: Any) -> Self:
        """An engine of EngineArgs; Infinity's own are taken too."""
        if not isinstance(engine_args, EngineArgs):
            engine_args = EngineArgs.of(**{name: getattr(engine_args, name) for name in engine_args.__dataclass_fields__})
        return cls(_arguments=engine_args)

    async def astart(self) -> None:
        """Load the model."""
        if self._engine is None:
            arguments = self.engine_args
            self._engine = open_engine(arguments.model_name_or_path, device=arguments.device, settings=arguments.settings)
            self._asynchronous = AsyncEngine(engine=self._engine)
            await self._asynchronous.astart()

    async def astop(self) -> None:
        """Unload the model."""
        if self._asynchronous is not None:
            await self._asynchronous.astop()
        self._engine = self._asynchronous = None

    async def __aenter__(self) -> Self:
        await self.astart()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.astop()

    @property
    def is_running(self) -> bool:
        """Whether the model is loaded."""
        return self._engine is not None

    @property
    def capabilities(self) -> set[str]:
        """`embed`, `rerank` or `classify`."""
        engine = self._running()[0]
        if engine.spec.output_type is not OutputType.SCORES:
            return {"embed"}
        return {"rerank"} if len(engine.spec.labels) <= 1 else {"classify"}

    async def embed(self, sentences: Sequence[str], matryoshka_dim: int | None = None) -> tuple[list[Array], int]:
        """Unit vectors of texts, and how many tokens they have."""
        result = await self._request(list(sentences), OutputType.DENSE, dimensions=matryoshka_dim)
        return list(np.asarray(result.embeddings)), sum(result.tokens)

    async def rerank(
        self, *, query: str, docs: Sequence[str], raw_scores: bool = False, top_n: int | None = None
    ) -> tuple[list[RerankReturnType], int]:
        """Documents by score, best first, and how many tokens there are."""
        result = await self._request([Pair(query, document) for document in docs], OutputType.SCORES)
        logits = relevance(np.asarray(result.embeddings, np.float32))
        order = ranked(logits if raw_scores else sigmoid(logits), top_n)
        return [RerankReturnType(one.score, one.index, docs[one.index]) for one in order], sum(result.tokens)

    async def classify(self, *, sentences: Sequence[str], raw_scores: bool = False) -> tuple[list[list[dict[str, Any]]], int]:
        """The labels of texts, best first, and how many tokens they have."""
        result = await self._request(list(sentences), OutputType.SCORES)
        spec = self._running()[0].spec
        labels = sorted_labels(spec, probabilities(spec, result, raw=raw_scores))
        return [[{"label": label.label, "score": label.score} for label in row] for row in labels], sum(result.tokens)

    async def _request(self, texts: Sequence[TextInput], output_type: OutputType, **options: Any) -> EmbedResult:
        _, engine = self._running()
        result = await engine.submit(EmbedRequest(texts=texts, output_type=output_type, **options))
        return result.raise_first()

    def _running(self) -> tuple[Engine, AsyncEngine]:
        if self._engine is None or self._asynchronous is None:
            raise StoppedError("the engine is not running; call astart(), or use it as `async with`")
        return self._engine, self._asynchronous
