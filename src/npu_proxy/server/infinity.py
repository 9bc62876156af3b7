"""The Infinity dialect, as far as it differs from OpenAI's: /rerank and /classify. Source: Infinity's server."""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

import msgspec

from npu_proxy.engine.verbs import classifies, ranks_with
from npu_proxy.errors import EmptyInputError, NpuProxyError
from npu_proxy.server.dialect import Dialect, Endpoint, Fields, Served
from npu_proxy.server.openai import Usage
from npu_proxy.server.ranks import classes, ranks, to_classes, to_rank, tokens_used
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
    """A document's place and score."""

    relevance_score: float
    index: int
    document: str | None = None


class Ranks(msgspec.Struct, kw_only=True):
    """Answer of POST /rerank."""

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
    """Answer of POST /classify: of each text its labels by falling score."""

    object: Literal["classify"] = "classify"
    data: list[list[Class]]
    model: str
    usage: Usage
    id: str
    created: int


class ErrorDetail(msgspec.Struct, kw_only=True):
    """What went wrong; the code is the HTTP status."""

    message: str
    type: str
    param: str | None = None
    code: int


class Error(msgspec.Struct, kw_only=True):
    """Every error of this dialect."""

    error: ErrorDetail


def to_error(error: NpuProxyError, status: int) -> Error:
    """OpenAI's error with the status as its code."""
    kind = "invalid_request_error" if 400 <= status < 499 else "server_error"
    return Error(error=ErrorDetail(message=str(error), type=kind, param=error.param, code=status))


def to_ranks_request(body: RerankBody, served: Served) -> list[EmbedRequest]:
    """The query with each document."""
    return to_rank(served, body.query, body.documents, body.top_n)


def to_ranks(results: list[EmbedResult], body: RerankBody, served: Served) -> Ranks:
    """By falling score; documents as plain strings on request."""
    found = ranks(served, results, body.top_n, raw=bool(body.raw_scores))
    shown = [
        Rank(relevance_score=one.score, index=one.index, document=body.documents[one.index] if body.return_documents else None)
        for one in found
    ]
    return Ranks(results=shown, **_common(results, served))


def to_classes_request(body: ClassifyBody, served: Served) -> EmbedRequest:
    """The texts. Raises EmptyInputError."""
    if not body.input:
        raise EmptyInputError("`input` is empty; send at least one text", param="input")
    return to_classes(served, list(body.input))


def to_classified(result: EmbedResult, body: ClassifyBody, served: Served) -> Classes:
    """Labels of each text."""
    found = classes(served, result, raw=bool(body.raw_scores))
    return Classes(data=[[Class(label=one.label, score=one.score) for one in text] for text in found], **_common([result], served))


def _common(results: list[EmbedResult], served: Served) -> dict[str, Any]:
    used = tokens_used(results)
    usage = Usage(prompt_tokens=used, total_tokens=used)
    return {"model": served.asked, "usage": usage, "id": f"infinity-{uuid.uuid4()}", "created": int(time.time())}


def _wants_classify(fields: Fields, settings: Settings) -> bool:
    """Whether `input` is a list of texts; vLLM's /classify takes a text or token ids. The setting decides otherwise."""
    if settings.classify_dialect != "auto":
        return settings.classify_dialect == "infinity"
    given = bytes(fields.input).lstrip() or b"["
    return given.startswith(b"[") and not given.lstrip(b"[ \t\r\n")[:1].isdigit()


DIALECT = Dialect(
    name="Infinity",
    routes=[
        Endpoint(
            path="/rerank",
            summary="Rank documents (needs a reranker)",
            fits=ranks_with,
            body=RerankBody,
            response=Ranks,
            to_request=to_ranks_request,
            to_response=to_ranks,
        ),
        Endpoint(
            path="/classify",
            summary="Classify (needs a classifier)",
            fits=classifies,
            body=ClassifyBody,
            response=Classes,
            to_request=to_classes_request,
            to_response=to_classified,
            when=_wants_classify,
        ),
    ],
    error=Error,
    to_error=to_error,
    status={"invalid": 422, "empty": 422},
)
