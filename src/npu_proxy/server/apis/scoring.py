"""Reranking and classification for all APIs, and the rerank format that Cohere, Jina, vLLM and OpenVINO Model Server share."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Literal

import msgspec

from npu_proxy.engine.scoring import probabilities, rerank_requests, rerank_results, sorted_labels
from npu_proxy.engine.validation import can_rerank, check_classifier
from npu_proxy.errors import InputError
from npu_proxy.server.apis.common import Usage, usage
from npu_proxy.server.apis.contract import InferenceRoute, ServedModel
from npu_proxy.types import EmbedRequest, EmbedResult, Label, OutputType, RerankResult, TextInput, Truncate

# -- used by all formats -------------------------------------------------------------------------------------------------


def to_rerank(
    served: ServedModel,
    query: str,
    documents: Sequence[str],
    top_n: int | None,
    *,
    truncate: Truncate = Truncate.END,
    max_tokens: int | None = None,
) -> list[EmbedRequest]:
    """Return the requests that rerank the documents. Raises InputError."""
    return rerank_requests(served.spec, query, documents, top_n=top_n, truncate=truncate, max_tokens=max_tokens)


def reranked(
    served: ServedModel, results: Sequence[EmbedResult], top_n: int | None = None, *, raw: bool = False
) -> list[RerankResult]:
    """Return the documents by descending score."""
    return rerank_results(served.spec, results, top_n=top_n, raw=raw)


def to_classify(served: ServedModel, texts: Sequence[TextInput], truncate: Truncate = Truncate.END) -> list[EmbedRequest]:
    """Return the request that classifies the texts. Raises UnsupportedError for a model without labels."""
    check_classifier(served.spec)
    return [EmbedRequest(texts=texts, output_type=OutputType.SCORES, truncate=truncate)]


def classified(served: ServedModel, results: Sequence[EmbedResult], *, raw: bool = False) -> list[list[Label]]:
    """Return the labels of each text by descending score."""
    (result,) = results
    return sorted_labels(served.spec, probabilities(served.spec, result, raw=raw))


# -- the shared rerank format --------------------------------------------------------------------------------------------


class RerankBody(msgspec.Struct, kw_only=True):
    """Body of POST /v1/rerank, /v2/rerank and /v3/rerank: the fields of Cohere, Jina and vLLM combined."""

    query: str
    documents: list[str | dict[str, str]]
    model: str | None = None
    top_n: int | None = None
    return_documents: bool | None = None
    rank_fields: list[str] | None = None
    max_chunks_per_doc: int | None = None
    max_tokens_per_doc: int | None = None
    truncate_prompt_tokens: int | None = None


class RerankedDocument(msgspec.Struct, kw_only=True):
    """A document in the reply."""

    text: str


class RerankItem(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A document's index in the request, and its score."""

    index: int
    relevance_score: float
    document: RerankedDocument | None = None


class SearchUnits(msgspec.Struct, kw_only=True):
    """Number of searches, each of up to a hundred documents."""

    search_units: int


class ApiVersion(msgspec.Struct, kw_only=True):
    """Version of the API that was used."""

    version: str


class RerankMeta(msgspec.Struct, kw_only=True):
    """Fields that Cohere adds to every ranking."""

    api_version: ApiVersion
    billed_units: SearchUnits


class Reranking(msgspec.Struct, kw_only=True):
    """Reply of /v1/rerank, /v2/rerank and /v3/rerank: the fields of Cohere, Jina, vLLM and OpenVINO Model Server."""

    id: str
    object: Literal["rerank"] = "rerank"
    model: str
    created: int
    results: list[RerankItem]
    usage: Usage
    meta: RerankMeta


def rerank_route(path: str) -> InferenceRoute[RerankBody, Reranking]:
    """Return a route for this format."""
    return InferenceRoute(
        path=path,
        summary="Rank documents (needs a reranker)",
        suits=can_rerank,
        bytes_per_number=4,
        body=RerankBody,
        reply=Reranking,
        to_requests=_to_requests,
        to_reply=_to_reply,
    )


def _to_requests(body: RerankBody, served: ServedModel) -> list[EmbedRequest]:
    limit = body.max_tokens_per_doc or body.truncate_prompt_tokens
    documents = [_document(document, body.rank_fields) for document in body.documents]
    return to_rerank(served, body.query, documents, body.top_n or None, max_tokens=limit if limit and limit > 0 else None)


def _to_reply(results: Sequence[EmbedResult], body: RerankBody, served: ServedModel) -> Reranking:
    documents = [_document(document, body.rank_fields) for document in body.documents]
    return Reranking(
        id=str(uuid.uuid4()),
        model=served.requested_name,
        created=int(time.time()),
        results=[
            RerankItem(
                index=result.index,
                relevance_score=result.score,
                document=RerankedDocument(text=documents[result.index]) if body.return_documents else None,
            )
            for result in reranked(served, results, body.top_n or None)
        ],
        usage=usage(results),
        meta=RerankMeta(api_version=ApiVersion(version="2"), billed_units=SearchUnits(search_units=-(-len(documents) // 100))),
    )


def _document(given: str | dict[str, str], fields: list[str] | None) -> str:
    """Return a document's text: a string, its field `text`, or the fields named in `rank_fields`. Raises InputError."""
    if isinstance(given, str):
        return given
    names = fields or ["text"]
    parts = [given[name] for name in names if name in given]
    if not parts:
        raise InputError(f"a document has none of the fields {', '.join(names)}", param="documents")
    return "\n".join(parts)
