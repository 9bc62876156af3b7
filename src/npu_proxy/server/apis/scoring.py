"""Reranking and classification for all APIs, and the rerank format that Cohere, Jina, vLLM and others share."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import msgspec

from npu_proxy.engine.scoring import probabilities, ranked, rerank_requests, rerank_results, sorted_labels
from npu_proxy.engine.validation import can_rerank, check_classifier, check_ranking
from npu_proxy.errors import InputError
from npu_proxy.server.apis.common import Usage, float_vectors, usage
from npu_proxy.server.apis.contract import (
    InferenceRoute,
    Refused,
    RequestBody,
    ServedModel,
    is_dense,
)
from npu_proxy.server.apis.embeddings import VLLM_HARMLESS, VLLM_REFUSED
from npu_proxy.server.apis.inputs import Text, TextPart, cut_of, only_one, text_of, token_limit
from npu_proxy.types import Chunking, EmbedRequest, EmbedResult, Label, OutputType, RerankResult, TextInput, Truncate

# -- used by all formats -------------------------------------------------------------------------------------------------


def to_rerank(
    served: ServedModel,
    query: str,
    documents: Sequence[str],
    top_n: int | None,
    *,
    truncate: Truncate = Truncate.END,
    max_tokens: int | None = None,
    max_document_tokens: int | None = None,
    most_chunks: int | None = None,
    empty_query: bool = False,
) -> list[EmbedRequest]:
    """Return the requests that rerank the documents. most_chunks: rank a long document by its best chunk. Raises InputError."""
    chunked = most_chunks is not None and most_chunks > 1
    return rerank_requests(
        served.spec,
        query,
        documents,
        top_n=top_n,
        truncate=Truncate.CHUNK if chunked else truncate,
        chunking=Chunking(most=most_chunks) if chunked else Chunking(),
        max_tokens=max_tokens,
        max_document_tokens=max_document_tokens,
        empty_query=empty_query,
    )


def reranked(
    served: ServedModel, results: Sequence[EmbedResult], top_n: int | None = None, *, raw: bool = False
) -> list[RerankResult]:
    """Return the documents by descending score."""
    return rerank_results(served.spec, results, top_n=top_n, raw=raw)


def to_classify(
    served: ServedModel, texts: Sequence[TextInput], truncate: Truncate = Truncate.END, max_tokens: int | None = None
) -> list[EmbedRequest]:
    """Return the request that classifies the texts. Raises UnsupportedError for a model without labels."""
    check_classifier(served.spec)
    return [EmbedRequest(texts=texts, output_type=OutputType.SCORES, truncate=truncate, max_tokens=max_tokens)]


def classified(served: ServedModel, results: Sequence[EmbedResult], *, raw: bool = False) -> list[list[Label]]:
    """Return the labels of each text by descending score."""
    (result,) = results
    return sorted_labels(served.spec, probabilities(served.spec, result, raw=raw))


def cosine_requests(query: str, documents: Sequence[str], **options: Any) -> list[EmbedRequest]:
    """Return the requests that rank documents with a dense model, by the cosine of the query's vector and theirs."""
    documents_only = ("max_document_tokens",)
    shared = {name: value for name, value in options.items() if name not in documents_only}
    return [
        EmbedRequest(texts=[query], input_type="query", **shared),
        EmbedRequest(texts=documents, input_type="document", on_empty="embed", **options),
    ]


def cosines(results: Sequence[EmbedResult], top_n: int | None = None) -> list[RerankResult]:
    """Return the documents by descending cosine. A constant or zero vector has the cosine 0."""
    query, documents = (float_vectors(result.raise_first()) for result in results)
    return ranked(documents @ query[0], top_n)


# -- the shared rerank format --------------------------------------------------------------------------------------------


class RerankBody(RequestBody, kw_only=True):
    """Body of the rerank routes of Cohere, Jina, vLLM, Voyage, OpenVINO Model Server and others: their fields combined.

    A document is a text, or an object with `text`, the fields of `rank_fields`, or content parts.
    """

    query: Text
    documents: list[str | dict[str, Any]] | str
    model: str | None = None
    top_n: int | None = None
    top_k: int | None = None
    return_documents: bool | None = None
    rank_fields: list[str] | None = None
    max_chunks_per_doc: int | None = None
    max_tokens_per_doc: int | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    truncate: bool | str | None = None
    truncation: bool | None = None
    use_activation: bool | None = None
    raw_scores: bool | None = None

    refused: ClassVar[Mapping[str, Refused]] = {
        **{name: VLLM_REFUSED[name] for name in ("activation", "add_special_tokens", "mm_processor_kwargs")},
        "instruction": Refused("is not supported for reranking; put it into the query"),
        "instruct": Refused("is not supported for reranking; put it into the query"),
        "chat_template": Refused("is not supported; the model's own is used"),
        "max_doc_length": Refused("is not supported; send `max_tokens_per_doc`"),
        "max_query_length": Refused("is not supported; the query is cut together with each document"),
        "relevant_spans": Refused("is not supported", neutral=({},)),
        "return_embeddings": Refused("is not supported; embed the documents", neutral=(False,)),
    }
    harmless: ClassVar[Mapping[str, str]] = {
        **VLLM_HARMLESS,
        "return_len": "asks for lengths, which `usage` has",
        "kwargs": "Xinference's further options, which its client sends empty",
        "extra_body": "a wrapper that clients unfold",
        "backend": "LocalAI's choice of a backend",
    }


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


class TokenCounts(msgspec.Struct, kw_only=True):
    """Number of tokens read and written."""

    input_tokens: int
    output_tokens: int = 0


class ApiVersion(msgspec.Struct, kw_only=True):
    """Version of the API that was used."""

    version: str


class RerankMeta(msgspec.Struct, kw_only=True):
    """Fields that Cohere and Xinference add to every ranking."""

    api_version: ApiVersion
    billed_units: SearchUnits
    tokens: TokenCounts


class Reranking(msgspec.Struct, kw_only=True):
    """Reply of the rerank routes: the fields of Cohere, Jina, vLLM, OpenVINO Model Server and Xinference."""

    id: str
    object: Literal["rerank"] = "rerank"
    model: str
    created: int
    results: list[RerankItem]
    usage: Usage
    meta: RerankMeta


def rerank_route(path: str, *, documents: bool = True, below_base: bool = False) -> InferenceRoute[RerankBody, Reranking]:
    """Return a route for this format. documents: whether the reply has the documents unless the body says otherwise."""

    def to_reply(results: Sequence[EmbedResult], body: RerankBody, served: ServedModel) -> Reranking:
        returned = documents if body.return_documents is None else body.return_documents
        return _to_reply(results, body, served, returned=returned)

    return InferenceRoute(
        path=path,
        summary="Rank documents (with a reranker, or by the cosines of an embedding model)",
        suits=can_rerank,
        bytes_per_number=4,
        body=RerankBody,
        reply=Reranking,
        to_requests=requests_of,
        to_reply=to_reply,
        below_base=below_base,
    )


def top_of(body: RerankBody) -> int | None:
    """Return how many documents a body asks for: `top_n` or `top_k`; None for all of them, which 0 means, too."""
    name, top = only_one(top_n=body.top_n, top_k=body.top_k)
    if isinstance(top, int) and top < 0:
        raise InputError(f"`{name}` is {top}; it must be at least 1, or 0 for all documents", param=name)
    return top if isinstance(top, int) and top else None


def raw_of(body: RerankBody) -> bool:
    """Whether a body asks for logits, by `raw_scores` or by `use_activation`."""
    wanted = None if body.use_activation is None else not body.use_activation
    return bool(only_one(raw_scores=body.raw_scores, use_activation=wanted)[1])


def documents_of(body: RerankBody) -> list[str]:
    """Return the texts of the documents. Raises InputError for one without a text."""
    given = [body.documents] if isinstance(body.documents, str) else body.documents
    return [_document(document, body.rank_fields) for document in given]


def requests_of(body: RerankBody, served: ServedModel) -> list[EmbedRequest]:
    """Return the requests that a body asks for. Raises InputError."""
    documents, query, top = documents_of(body), text_of(body.query, "query"), top_of(body)
    raw_of(body)  # refuses contradictions before anything is computed
    truncate = cut_of(body.truncate, body.truncation_side, truncation=body.truncation)
    limit = token_limit(body.truncate_prompt_tokens)
    most = token_limit(body.max_tokens_per_doc or None, "max_tokens_per_doc")
    chunks = token_limit(body.max_chunks_per_doc or None, "max_chunks_per_doc")
    if chunks is not None and most is not None:
        message = "`max_chunks_per_doc` splits documents, and `max_tokens_per_doc` cuts them; send one of them"
        raise InputError(message, param="max_chunks_per_doc")
    if _by_cosine(served):
        if chunks is not None and chunks > 1:
            message = "`max_chunks_per_doc` needs a reranker; this model ranks by cosine"
            raise InputError(message, param="max_chunks_per_doc")
        check_ranking(query, documents, top)
        return cosine_requests(query, documents, truncate=truncate, max_tokens=limit, max_document_tokens=most)
    return to_rerank(
        served,
        query,
        documents,
        top,
        truncate=truncate,
        max_tokens=limit,
        max_document_tokens=most,
        most_chunks=chunks,
    )


def ranks_of(
    results: Sequence[EmbedResult], body: RerankBody, served: ServedModel, *, returned: bool
) -> list[tuple[RerankResult, str | None]]:
    """Return the ranks that a body asks for. returned: each with the document's text."""
    top = top_of(body)
    ranks = cosines(results, top) if _by_cosine(served) else reranked(served, results, top, raw=raw_of(body))
    documents = documents_of(body) if returned else []
    return [(rank, documents[rank.index] if returned else None) for rank in ranks]


def _by_cosine(served: ServedModel) -> bool:
    return is_dense(served.spec) and not can_rerank(served.spec)


def _to_reply(results: Sequence[EmbedResult], body: RerankBody, served: ServedModel, *, returned: bool) -> Reranking:
    count = 1 if isinstance(body.documents, str) else len(body.documents)
    counted = usage(results)
    return Reranking(
        id=str(uuid.uuid4()),
        model=served.requested_name,
        created=int(time.time()),
        results=[
            RerankItem(
                index=rank.index,
                relevance_score=rank.score,
                document=None if text is None else RerankedDocument(text=text),
            )
            for rank, text in ranks_of(results, body, served, returned=returned)
        ],
        usage=counted,
        meta=RerankMeta(
            api_version=ApiVersion(version="2"),
            billed_units=SearchUnits(search_units=-(-count // 100)),
            tokens=TokenCounts(input_tokens=counted.prompt_tokens),
        ),
    )


def _document(given: str | dict[str, Any], fields: list[str] | None) -> str:
    """Return a document's text: a string, its field `text`, or the fields named in `rank_fields`. Raises InputError."""
    if isinstance(given, str):
        return given
    if not fields and "content" in given and "text" not in given:
        try:
            return text_of(msgspec.convert(given, TextPart), "documents")
        except msgspec.ValidationError as error:
            raise InputError(f"a document has a `content` that is no text: {error}", param="documents") from None
    names = fields or ["text"]
    values = [given[name] for name in names if given.get(name) is not None]
    parts = [value if isinstance(value, str) else msgspec.json.encode(value).decode() for value in values]
    if not parts:
        raise InputError(f"a document has none of the fields {', '.join(names)}", param="documents")
    return "\n".join(parts)
