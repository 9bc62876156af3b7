"""The Cohere dialect: /v1/embed, /v2/embed, and rerank as Cohere, Jina and vLLM ask for it. Source: its API reference."""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

import msgspec

from npu_proxy.engine.finish import cast
from npu_proxy.engine.verbs import ranks_with
from npu_proxy.errors import EmptyInputError, InputError, NpuProxyError
from npu_proxy.server.dialect import Dialect, Endpoint, Served, floats
from npu_proxy.server.openai import Usage
from npu_proxy.server.ranks import ranks, to_rank, tokens_used
from npu_proxy.types import DType, EmbedRequest, EmbedResult, Truncate

Kind = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]
InputType = Literal["search_document", "search_query", "classification", "clustering", "image"]
Cut = Literal["NONE", "START", "END"]

_TRUNCATE = {"NONE": Truncate.ERROR, "START": Truncate.START, "END": Truncate.END}
_MEANING = {"search_document": "document", "search_query": "query", "classification": "classification", "clustering": "clustering"}


class Content(msgspec.Struct, kw_only=True):
    """A part of an input; texts only."""

    type: str
    text: str | None = None


class Input(msgspec.Struct, kw_only=True):
    """An input of several parts, joined by spaces."""

    content: list[Content]


class BodyV1(msgspec.Struct, kw_only=True):
    """Body of POST /v1/embed."""

    texts: list[str] | None = None
    model: str | None = None
    input_type: InputType | None = None
    embedding_types: list[Kind] | None = None
    truncate: Cut | None = None


class BodyV2(BodyV1, kw_only=True):
    """Body of POST /v2/embed."""

    inputs: list[Input] | None = None
    output_dimension: int | None = None
    max_tokens: int | None = None


class RerankBody(msgspec.Struct, kw_only=True):
    """Body of POST /v1/rerank and /v2/rerank: the fields of Cohere, Jina and vLLM together."""

    query: str
    documents: list[str | dict[str, str]]
    model: str | None = None
    top_n: int | None = None
    return_documents: bool | None = None
    rank_fields: list[str] | None = None
    max_chunks_per_doc: int | None = None
    max_tokens_per_doc: int | None = None
    truncate_prompt_tokens: int | None = None


class RankedText(msgspec.Struct, kw_only=True):
    """A document as the answer shows it."""

    text: str


class RankItem(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A document's place among those of the request, and its score."""

    index: int
    relevance_score: float
    document: RankedText | None = None


class SearchUnits(msgspec.Struct, kw_only=True):
    """A search of up to a hundred documents each."""

    search_units: int


class RankMeta(msgspec.Struct, kw_only=True):
    """What stands below every ranking."""

    api_version: Version
    billed_units: SearchUnits


class Ranking(msgspec.Struct, kw_only=True):
    """Answer of /v1/rerank, /v2/rerank and /v3/rerank: what Cohere, Jina, vLLM and the Model Server give, together."""

    id: str
    object: Literal["rerank"] = "rerank"
    model: str
    created: int
    results: list[RankItem]
    usage: Usage
    meta: RankMeta


class Version(msgspec.Struct, kw_only=True):
    """Version of the API that answered."""

    version: str


class Units(msgspec.Struct, kw_only=True):
    """Tokens embedded."""

    input_tokens: int


class Meta(msgspec.Struct, kw_only=True):
    """What stands below every answer."""

    api_version: Version
    billed_units: Units


class ByType(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Vectors by the types that were asked for."""

    floats: list[list[float]] | None = msgspec.field(default=None, name="float")
    int8: list[list[int]] | None = None
    uint8: list[list[int]] | None = None
    binary: list[list[int]] | None = None
    ubinary: list[list[int]] | None = None
    base64: list[str] | None = None


class AnswerV1(msgspec.Struct, kw_only=True):
    """Answer of /v1/embed: a list without `embedding_types`, by type with them."""

    response_type: Literal["embeddings_floats", "embeddings_by_type"]
    id: str
    embeddings: list[list[float]] | ByType
    texts: list[str]
    meta: Meta


class AnswerV2(msgspec.Struct, kw_only=True):
    """Answer of /v2/embed."""

    id: str
    embeddings: ByType
    texts: list[str]
    meta: Meta


class Error(msgspec.Struct, kw_only=True):
    """Every error of this dialect."""

    message: str


def to_request(body: BodyV1, served: Served) -> EmbedRequest:
    """Always float vectors; the other types are made of them. Raises InputError."""
    if body.input_type == "image":
        raise InputError("input_type `image` needs a model for images; this server embeds text", param="input_type")
    newer = body if isinstance(body, BodyV2) else BodyV2()
    wanted = newer.output_dimension
    if (wanted or served.spec.width) % 8 and {"binary", "ubinary"} & set(body.embedding_types or ()):
        raise InputError("binary types need a width divisible by 8", param="output_dimension")
    if newer.max_tokens is not None and newer.max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, not {newer.max_tokens}", param="max_tokens")
    return EmbedRequest(
        texts=_texts(body),
        input_type=_MEANING.get(body.input_type or ""),
        dimensions=wanted,
        truncate=_TRUNCATE[body.truncate or "END"],
        max_tokens=newer.max_tokens,
    )


def to_v1(result: EmbedResult, body: BodyV1, _: Served) -> AnswerV1:
    """cohere-python branches on `response_type`."""
    common = _common(result, body, "1")
    if body.embedding_types is None:
        return AnswerV1(response_type="embeddings_floats", embeddings=floats(result).tolist(), **common)
    return AnswerV1(response_type="embeddings_by_type", embeddings=_by_type(result, body.embedding_types), **common)


def to_v2(result: EmbedResult, body: BodyV2, _: Served) -> AnswerV2:
    """Only the types asked for; float where none is."""
    return AnswerV2(embeddings=_by_type(result, body.embedding_types or ["float"]), **_common(result, body, "2"))


def to_rank_request(body: RerankBody, served: Served) -> list[EmbedRequest]:
    """The query with each document."""
    limit = body.max_tokens_per_doc or body.truncate_prompt_tokens
    documents = [_document(one, body.rank_fields) for one in body.documents]
    return to_rank(served, body.query, documents, body.top_n or None, max_tokens=limit if limit and limit > 0 else None)


def to_ranking(results: list[EmbedResult], body: RerankBody, served: Served) -> Ranking:
    """By falling score, with the documents where the body asks for them."""
    documents = [_document(one, body.rank_fields) for one in body.documents]
    used = tokens_used(results)
    return Ranking(
        id=str(uuid.uuid4()),
        model=served.asked,
        created=int(time.time()),
        results=[
            RankItem(
                index=one.index,
                relevance_score=one.score,
                document=RankedText(text=documents[one.index]) if body.return_documents else None,
            )
            for one in ranks(served, results, body.top_n or None)
        ],
        usage=Usage(prompt_tokens=used, total_tokens=used),
        meta=RankMeta(api_version=Version(version="2"), billed_units=SearchUnits(search_units=-(-len(documents) // 100))),
    )


def _document(given: str | dict[str, str], fields: list[str] | None) -> str:
    """A document's text: a string, its field `text`, or the fields that `rank_fields` names. Raises InputError."""
    if isinstance(given, str):
        return given
    names = fields or ["text"]
    found = [given[name] for name in names if name in given]
    if not found:
        raise InputError(f"a document has none of the fields {', '.join(names)}", param="documents")
    return "\n".join(found)


def to_error(error: NpuProxyError, _: int) -> Error:
    """A message."""
    return Error(message=str(error))


def _texts(body: BodyV1) -> list[Any]:
    if isinstance(body, BodyV2) and body.inputs:
        parts = [part for one in body.inputs for part in one.content]
        if any(part.type != "text" or part.text is None for part in parts):
            raise InputError("`inputs` may hold parts of type `text` only", param="inputs")
        return [" ".join(part.text or "" for part in one.content) for one in body.inputs]
    if not body.texts:
        raise EmptyInputError("`texts` is empty; send at least one text", param="texts")
    return list(body.texts)


def _by_type(result: EmbedResult, kinds: list[Kind]) -> ByType:
    vectors = {kind: cast(floats(result), DType.FLOAT32 if kind == "float" else DType(kind)) for kind in dict.fromkeys(kinds)}
    made: dict[str, Any] = {kind: one if isinstance(one, list) else one.tolist() for kind, one in vectors.items()}
    return ByType(floats=made.pop("float", None), **made)


def _common(result: EmbedResult, body: BodyV1, version: str) -> dict[str, Any]:
    meta = Meta(api_version=Version(version=version), billed_units=Units(input_tokens=sum(result.tokens)))
    return {"id": str(uuid.uuid4()), "texts": [str(text) for text in _texts(body)], "meta": meta}


DIALECT = Dialect(
    name="Cohere",
    routes=[
        Endpoint(
            path="/v1/embed",
            summary="Embed texts",
            body=BodyV1,
            response=AnswerV1,
            to_request=to_request,
            to_response=to_v1,
        ),
        Endpoint(path="/v2/embed", summary="Embed texts", body=BodyV2, response=AnswerV2, to_request=to_request, to_response=to_v2),
        *(
            Endpoint(
                path=path,
                summary="Rank documents (needs a reranker)",
                fits=ranks_with,
                body=RerankBody,
                response=Ranking,
                to_request=to_rank_request,
                to_response=to_ranking,
            )
            for path in ("/v1/rerank", "/v2/rerank")
        ),
    ],
    error=Error,
    to_error=to_error,
    status={"overloaded": 429},
)
