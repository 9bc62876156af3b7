"""The API of Weaviate's inference containers: /vectors, and /rerank below /weaviate. Source: its modules' clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec

from npu_proxy.engine.validation import can_rerank
from npu_proxy.errors import InputError, NpuProxyError
from npu_proxy.server.apis.common import float_rows
from npu_proxy.server.apis.contract import Dialect, InferenceRoute, ModelListing, ModelQuery, RequestBody, ServedModel
from npu_proxy.server.apis.inputs import input_type
from npu_proxy.server.apis.scoring import reranked, to_rerank
from npu_proxy.types import EmbedRequest, EmbedResult


class VectorConfig(msgspec.Struct, kw_only=True):
    """Options of a vector. task_type: query or passage. pooling_strategy: its default, `masked_mean`, means the model's own."""

    task_type: str | None = None
    pooling_strategy: str | None = None


class VectorBody(RequestBody, kw_only=True):
    """Body of POST /vectors."""

    text: str
    config: VectorConfig | None = None

    harmless: ClassVar[Mapping[str, str]] = {"dims": "not used"}


class Vector(msgspec.Struct, kw_only=True):
    """Reply of POST /vectors."""

    text: str
    vector: list[float] | None
    dim: int


class RerankBody(RequestBody, kw_only=True):
    """Body of POST /weaviate/rerank."""

    query: str
    documents: list[str]


class DocumentScore(msgspec.Struct, kw_only=True):
    """A document and its score."""

    document: str
    score: float


class DocumentScores(msgspec.Struct, kw_only=True):
    """Reply of POST /weaviate/rerank, in the order of the documents."""

    query: str
    scores: list[DocumentScore]


class Meta(msgspec.Struct, kw_only=True):
    """Reply of GET /meta."""

    model: str
    dimensions: int


class Error(msgspec.Struct, kw_only=True):
    """Error format of this API."""

    error: str


def to_requests(body: VectorBody, served: ServedModel) -> list[EmbedRequest]:
    """Return the request to embed a text. Raises InputError for another pooling than the model's."""
    config = body.config or VectorConfig()
    if config.pooling_strategy not in (None, "masked_mean", str(served.spec.pooling)):
        message = f"`pooling_strategy` is {config.pooling_strategy[:40]}; this model pools by {served.spec.pooling}"
        raise InputError(message, param="config.pooling_strategy")
    return [EmbedRequest(texts=[body.text], input_type=input_type(config.task_type, "config.task_type"))]


def to_reply(results: Sequence[EmbedResult], body: VectorBody, served: ServedModel) -> Vector:
    """Return one vector."""
    rows: list[Any] = float_rows(results[0])
    return Vector(text=body.text, vector=rows[0], dim=served.spec.width)


def rerank_requests(body: RerankBody, served: ServedModel) -> list[EmbedRequest]:
    """Return the requests to score the query with each document."""
    return to_rerank(served, body.query, body.documents, None)


def rerank_reply(results: Sequence[EmbedResult], body: RerankBody, served: ServedModel) -> DocumentScores:
    """Return the score of each document."""
    ranks = sorted(reranked(served, results), key=lambda rank: rank.index)
    scores = [DocumentScore(document=body.documents[rank.index], score=rank.score) for rank in ranks]
    return DocumentScores(query=body.query, scores=scores)


def meta(listing: ModelListing, _: str) -> Meta:
    """Return the first model."""
    spec = listing.default.spec
    return Meta(model=spec.name, dimensions=spec.width)


def to_error(error: NpuProxyError, _: int) -> Error:
    """Return the error's message."""
    return Error(error=str(error))


DIALECT = Dialect(
    name="Weaviate",
    base="weaviate",
    routes=[
        InferenceRoute(
            path="/vectors",
            summary="Embed a text",
            body=VectorBody,
            vectors=True,
            reply=Vector,
            to_requests=to_requests,
            to_reply=to_reply,
        ),
        InferenceRoute(
            path="/rerank",
            summary="Score documents (needs a reranker)",
            suits=can_rerank,
            bytes_per_number=4,
            body=RerankBody,
            reply=DocumentScores,
            to_requests=rerank_requests,
            to_reply=rerank_reply,
            below_base=True,
        ),
        ModelQuery(path="/meta", summary="Show the model", reply=Meta, answer=meta),
    ],
    error=Error,
    to_error=to_error,
)
