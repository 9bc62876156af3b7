"""The Voyage API, in addition to the fields that /v1/embeddings has for it: /v1/rerank and two more. Source: voyageai's clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import msgspec

from npu_proxy.engine.finish import cast
from npu_proxy.engine.validation import can_rerank, check_output
from npu_proxy.errors import EmptyInputError, NpuProxyError
from npu_proxy.server.apis.common import Usage, float_vectors, usage, with_failures
from npu_proxy.server.apis.contract import BodyFields, Dialect, InferenceRoute, Refused, RequestBody, ServedModel
from npu_proxy.server.apis.embeddings import encoded, late_request, late_vectors
from npu_proxy.server.apis.inputs import TextPart, cut_of, input_type, texts_of
from npu_proxy.server.apis.scoring import RerankBody, ranks_of, requests_of
from npu_proxy.settings import Settings
from npu_proxy.types import DType, EmbedRequest, EmbedResult

OutputDType = Literal["float", "int8", "uint8", "binary", "ubinary"]


class Rank(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A document's index and score."""

    index: int
    relevance_score: float
    document: str | None = None


class Ranks(msgspec.Struct, kw_only=True):
    """Reply of POST /v1/rerank: the ranks are in `data`, and in `results` for the clients of other APIs."""

    object: Literal["list"] = "list"
    data: list[Rank]
    results: list[Rank]
    model: str
    usage: Usage


class ContextBody(RequestBody, kw_only=True):
    """Body of POST /v1/contextualizedembeddings: the chunks of each document, which are read together."""

    inputs: list[list[str]]
    model: str | None = None
    input_type: str | None = None
    output_dimension: int | None = None
    output_dtype: OutputDType | None = None
    encoding_format: Literal["float", "base64"] | None = None

    refused: ClassVar[Mapping[str, Refused]] = {
        "enable_auto_chunking": Refused("is not supported; send the chunks", neutral=(False,)),
        "chunk_size": Refused("is not supported; send the chunks"),
        "chunk_overlap": Refused("is not supported; send the chunks", neutral=(0,)),
    }


class PartsBody(RequestBody, kw_only=True):
    """Body of POST /v1/multimodalembeddings; only parts of type `text` are supported, and are joined by line feeds."""

    inputs: list[TextPart]
    model: str | None = None
    input_type: str | None = None
    truncation: bool | None = None
    output_dimension: int | None = None
    output_dtype: OutputDType | None = None
    encoding_format: Literal["float", "base64"] | None = None
    output_encoding: Literal["base64"] | None = None


class Embedding(msgspec.Struct, kw_only=True):
    """One vector: a list of numbers, or base64 of its bytes."""

    object: Literal["embedding"] = "embedding"
    embedding: list[float | int] | str | None
    index: int


class Document(msgspec.Struct, kw_only=True):
    """The vectors of a document's chunks."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    index: int


class PartsUsage(Usage, kw_only=True):
    """Number of tokens, with the names of the multimodal route."""

    text_tokens: int
    image_pixels: int = 0
    video_pixels: int = 0


class Documents(msgspec.Struct, kw_only=True):
    """Reply of POST /v1/contextualizedembeddings."""

    object: Literal["list"] = "list"
    data: list[Document]
    model: str
    usage: Usage


class Embeddings(msgspec.Struct, kw_only=True):
    """Reply of POST /v1/multimodalembeddings."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: PartsUsage


class Error(msgspec.Struct, kw_only=True):
    """Error format of this API."""

    detail: str


def rerank_reply(results: Sequence[EmbedResult], body: RerankBody, served: ServedModel) -> Ranks:
    """Return the ranks by descending score; on request with the documents."""
    ranks = [
        Rank(index=rank.index, relevance_score=rank.score, document=text)
        for rank, text in ranks_of(results, body, served, returned=bool(body.return_documents))
    ]
    return Ranks(data=ranks, results=ranks, model=served.requested_name, usage=usage(results))


def context_requests(body: ContextBody, served: ServedModel) -> list[EmbedRequest]:
    """Return one request per document. Raises InputError."""
    if not body.inputs or not all(body.inputs):
        raise EmptyInputError("`inputs` needs at least one document with at least one chunk", param="inputs")
    request = EmbedRequest(texts=[""], input_type=input_type(body.input_type), dimensions=body.output_dimension or None)
    check_output(replace(request, dtype=_dtype(body.output_dtype)), served.spec)
    return [late_request(request, texts, served) if len(texts) > 1 else replace(request, texts=texts) for texts in body.inputs]


def context_reply(results: Sequence[EmbedResult], body: ContextBody, served: ServedModel) -> Documents:
    """Return the vectors of every document's chunks."""
    documents: list[Document] = []
    for number, (result, texts) in enumerate(zip(results, body.inputs, strict=True)):
        floats = late_vectors(result) if len(texts) > 1 else float_vectors(result)
        rows = encoded(list(cast(floats, _dtype(body.output_dtype))), in_base64=body.encoding_format == "base64")
        data = [Embedding(embedding=row, index=index) for index, row in enumerate(rows)]
        documents.append(Document(data=data, index=number))
    return Documents(data=documents, model=served.requested_name, usage=usage(results))


def parts_requests(body: PartsBody, served: ServedModel) -> list[EmbedRequest]:
    """Return the request to embed texts. Raises InputError for images."""
    request = EmbedRequest(
        texts=texts_of(body.inputs, "inputs"),
        input_type=input_type(body.input_type),
        dimensions=body.output_dimension or None,
        truncate=cut_of(truncation=body.truncation),
    )
    check_output(replace(request, dtype=_dtype(body.output_dtype)), served.spec)
    return [request]


def parts_reply(results: Sequence[EmbedResult], body: PartsBody, served: ServedModel) -> Embeddings:
    """Return one vector per input."""
    in_base64 = "base64" in (body.encoding_format, body.output_encoding)
    rows = encoded(list(cast(float_vectors(results[0]), _dtype(body.output_dtype))), in_base64=in_base64)
    rows = with_failures(rows, results[0])
    counted = usage(results)
    tokens = PartsUsage(prompt_tokens=counted.prompt_tokens, total_tokens=counted.total_tokens, text_tokens=counted.total_tokens)
    data = [Embedding(embedding=row, index=index) for index, row in enumerate(rows)]
    return Embeddings(data=data, model=served.requested_name, usage=tokens)


def to_error(error: NpuProxyError, _: int) -> Error:
    """Return the error's message."""
    return Error(detail=str(error))


def _dtype(name: OutputDType | None) -> DType:
    return DType.FLOAT32 if name in (None, "float") else DType(name)


def _is_rerank_body(fields: BodyFields, _: Settings) -> bool:
    return fields.has("top_k") or fields.has("truncation")


DIALECT = Dialect(
    name="Voyage",
    base="voyage",
    routes=[
        InferenceRoute(
            path="/v1/rerank",
            summary="Rank documents (with a reranker, or by the cosines of an embedding model)",
            suits=can_rerank,
            bytes_per_number=4,
            body=RerankBody,
            reply=Ranks,
            to_requests=requests_of,
            to_reply=rerank_reply,
            applies=_is_rerank_body,
        ),
        InferenceRoute(
            path="/v1/contextualizedembeddings",
            summary="Embed chunks that are read together (late chunking)",
            body=ContextBody,
            reply=Documents,
            to_requests=context_requests,
            to_reply=context_reply,
        ),
        InferenceRoute(
            path="/v1/multimodalembeddings",
            summary="Embed texts given as content parts",
            body=PartsBody,
            vectors=True,
            reply=Embeddings,
            to_requests=parts_requests,
            to_reply=parts_reply,
        ),
    ],
    error=Error,
    to_error=to_error,
)
