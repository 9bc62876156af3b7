"""Plain values for tests of API files: served models, results, bodies as clients send them, and a list of models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from conftest import GOLDEN
from npu_proxy import Settings
from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.errors import NpuProxyError
from npu_proxy.models.layout import read_spec
from npu_proxy.models.store import StoredModel
from npu_proxy.server.apis.contract import BodyFields, Dialect, InferenceRoute, ModelInfo, ServedModel
from npu_proxy.server.errors import UnknownModelError
from npu_proxy.server.http.responses import to_json
from npu_proxy.spec import ModelSpec
from npu_proxy.types import EmbedResult, Pooling, Timings


@cache
def spec_of(name: str, pooling: Pooling | None = None) -> ModelSpec:
    return read_spec(GOLDEN / name, pooling=pooling)


@cache
def tokenizer_of(name: str) -> RequestTokenizer:
    return RequestTokenizer(spec_of(name))


class Decoder:
    """Stands for cl100k_base."""

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(f"word{number}" for number in ids)


def served(name: str = "mean", *, asked: str = "some-name", load_seconds: float = 0.0, **settings: Any) -> ServedModel:
    """A golden model while a request uses it. asked: the name by which the client asks for it."""
    return ServedModel(
        spec=spec_of(name),
        tokenizer=tokenizer_of(name),
        settings=Settings(**settings),
        requested_name=asked,
        load_seconds=load_seconds,
        cl100k=Decoder,
    )


def result(embeddings: Any, *, tokens: Sequence[int] = (), error: NpuProxyError | None = None, device: str = "cpu") -> EmbedResult:
    """A result of these vectors; nested lists become float32."""
    if isinstance(embeddings, list) and not (embeddings and isinstance(embeddings[0], str | tuple | np.ndarray)):
        embeddings = np.array(embeddings, np.float32)
    count = len(embeddings)
    return EmbedResult(
        embeddings=embeddings,
        tokens=tokens or [3] * count,
        truncated=[False] * count,
        errors=[error, *[None] * (count - 1)],
        devices=[device] * count,
        cached=0,
        fallback="",
        fingerprint="f" * 16,
        timings=Timings(total=2.0, tokenized=0.5, queued=0.25, infer=1.25),
    )


def body(kind: type[msgspec.Struct], **fields: object) -> Any:
    """A body as it is decoded from JSON."""
    return msgspec.json.decode(msgspec.json.encode(fields), type=kind)


def json(reply: object) -> Any:
    """A reply as clients read it."""
    return msgspec.json.decode(to_json(reply))


def inference(dialect: Dialect, path: str) -> InferenceRoute[Any, Any]:
    """The route of a dialect with that path."""
    (route,) = [route for route in dialect.routes if route.path == path and isinstance(route, InferenceRoute)]
    return route


def paths(dialect: Dialect) -> set[tuple[str, str]]:
    """Method and path of each route."""
    return {(route.method, route.path) for route in dialect.routes}


def body_fields(**fields: object) -> BodyFields:
    """What routes that share a path are told of a body."""
    return msgspec.json.decode(msgspec.json.encode(fields), type=BodyFields)


def model_info(name: str = "mean", **options: Any) -> ModelInfo:
    return ModelInfo(spec=spec_of(name), **{"since": 1_700_000_000, **options})


class Listing:
    """The models of a server. ``work`` is what pulling a model does."""

    def __init__(
        self,
        *models: ModelInfo,
        work: Callable[[str, Callable[[str], None]], None] = lambda _, __: None,
        **settings: Any,
    ) -> None:
        self.settings = Settings(**settings)
        self.deleted: list[str] = []
        self._models = models
        self._work = work

    @property
    def default(self) -> ModelInfo:
        return self._models[0]

    def all(self) -> Sequence[ModelInfo]:
        return self._models

    def find(self, name: str | None) -> ModelInfo:
        for model in self._models:
            if name in (None, model.spec.name, *model.names):
                return model
        raise UnknownModelError(name or "")

    def pull(self, name: str, report: Callable[[str], None]) -> StoredModel:
        self._work(name, report)
        return StoredModel(name=name, folder=Path(), size=0, source="")

    def delete(self, name: str) -> None:
        self.deleted.append(name)


CLASSIFIER, RERANKER = "roberta_labels", "bert_rerank"
