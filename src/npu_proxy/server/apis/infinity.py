"""The parts of the Infinity API that differ from OpenAI's: /rerank and /classify. Source: Infinity's server."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from npu_proxy.engine.validation import can_classify, can_rerank
from npu_proxy.errors import EmptyInputError
from npu_proxy.server.apis.common import StatusError, Usage, to_status_error, usage
from npu_proxy.server.apis.contract import BodyFields, Dialect, InferenceRoute, ServedModel
from npu_proxy.server.apis.scoring import classified, reranked, to_classify, to_rerank
from npu_proxy.settings import Settings
from npu_proxy.types import EmbedRequest, EmbedResult


class RerankBody(msgspec.Struct, kw_only=True):
    """Body of POST /rerank."""

    query: str
    documents: list[str]
    model: str | None = None
    top_n: int | None = None
    return_documents: bool | None = None
    raw_scores: bool | None = None


class ClassifyBody(msgspec.Struct, kw_only=True):
    """Body of POST /classify."""

    input: list[str]
    model: str | None = None
    raw_scores: bool | None = None


class Rank(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A document's index and score."""

    relevance_score: float
    index: int
    document: str | None = None


class Ranks(msgspec.Struct, kw_only=True):
    """Reply of POST /rerank."""

    object: Literal["rerank"] = "rerank"
    results: list[Rank]
    model: str
    usage: Usage
    id: str
    created: int


class Class(msgspec.Struct, kw_only=True):
    """A label and its score."""

    score: float
    label: str


class Classes(msgspec.Struct, kw_only=True):
    """Reply of POST /classify: the labels of each text by descending score."""

    object: Literal["classify"] = "classify"
    data: list[list[Class]]
    model: str
    usage: Usage
    id: str
    created: int


def rerank_requests(body: RerankBody, served: ServedModel) -> list[EmbedRequest]:
    """Return the requests to score the query with each document."""
    return to_rerank(served, body.query, body.documents, body.top_n)


def rerank_reply(results: Sequence[EmbedResult], body: RerankBody, served: ServedModel) -> Ranks:
    """Return the ranks by descending score; on request with the documents, as plain strings."""
    ranks = [
        Rank(
            relevance_score=result.score,
            index=result.index,
            document=body.documents[result.index] if body.return_documents else None,
        )
        for result in reranked(served, results, body.top_n, raw=bool(body.raw_scores))
    ]
    return Ranks(results=ranks, **_common(results, served))


def classify_requests(body: ClassifyBody, served: ServedModel) -> list[EmbedRequest]:
    """Return the request to classify the texts. Raises EmptyInputError."""
    if not body.input:
        raise EmptyInputError("`input` is empty; send at least one text", param="input")
    return to_classify(served, list(body.input))


def classify_reply(results: Sequence[EmbedResult], body: ClassifyBody, served: ServedModel) -> Classes:
    """Return the labels of each text."""
    texts = classified(served, results, raw=bool(body.raw_scores))
    data = [[Class(label=label.label, score=label.score) for label in labels] for labels in texts]
    return Classes(data=data, **_common(results, served))


def _common(results: Sequence[EmbedResult], served: ServedModel) -> dict[str, Any]:
    return {
        "model": served.requested_name,
        "usage": usage(results),
        "id": f"infinity-{uuid.uuid4()}",
        "created": int(time.time()),
    }


def _is_classify_body(fields: BodyFields, settings: Settings) -> bool:
    """Whether `input` is a list of texts, unlike vLLM's text or token ids. The setting `classify_dialect` overrides this."""
    if settings.classify_dialect != "auto":
        return settings.classify_dialect == "infinity"
    given = bytes(fields.input).lstrip() or b"["
    return given.startswith(b"[") and not given.lstrip(b"[ \t\r\n")[:1].isdigit()


DIALECT = Dialect(
    name="Infinity",
    routes=[
        InferenceRoute(
            path="/rerank",
            summary="Rank documents (needs a reranker)",
            suits=can_rerank,
            bytes_per_number=4,
            body=RerankBody,
            reply=Ranks,
            to_requests=rerank_requests,
            to_reply=rerank_reply,
        ),
        InferenceRoute(
            path="/classify",
            summary="Classify texts (needs a classifier)",
            suits=can_classify,
            body=ClassifyBody,
            reply=Classes,
            to_requests=classify_requests,
            to_reply=classify_reply,
            applies=_is_classify_body,
        ),
    ],
    error=StatusError,
    to_error=to_status_error,
    status={"invalid": 422, "empty": 422},
)
