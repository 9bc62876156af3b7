"""The API of llama.cpp's server: /embedding, /reranking, /tokenize with `content`. Source: its README and tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import msgspec

from npu_proxy.engine.validation import can_rerank
from npu_proxy.errors import InputError
from npu_proxy.server.apis.common import StatusError, Usage, float_rows, to_status_error, usage
from npu_proxy.server.apis.contract import BodyFields, Dialect, InferenceRoute, RequestBody, ServedModel, TokenizerRoute
from npu_proxy.server.apis.embeddings import embeddings_route
from npu_proxy.server.apis.inputs import Inputs, text_inputs, unit_length
from npu_proxy.server.apis.scoring import reranked, to_rerank
from npu_proxy.settings import Settings
from npu_proxy.types import EmbedRequest, EmbedResult

_HARMLESS: Mapping[str, str] = {
    "encoding_format": "this form always has numbers; /v1/embeddings with `input` has base64",
    "cache_prompt": "is for models that write text",
    "id_slot": "is for models that write text",
}


class EmbeddingBody(RequestBody, kw_only=True):
    """Body of POST /embedding, and of the embeddings routes with `content`. embd_normalize: 2 for unit length, -1 for none."""

    content: Inputs | None = None
    input: Inputs | None = None
    model: str | None = None
    embd_normalize: int | None = None

    harmless: ClassVar[Mapping[str, str]] = _HARMLESS


class Embedding(msgspec.Struct, kw_only=True):
    """The vectors of a text: one, or one per token if the model does not pool them."""

    index: int
    embedding: list[list[float] | None]


class RerankBody(RequestBody, kw_only=True):
    """Body of POST /reranking. A `top_n` of 0 means all documents."""

    query: str
    documents: list[str]
    model: str | None = None
    top_n: int | None = None


class Rank(msgspec.Struct, kw_only=True):
    """A document's index, and its score: the model's logit."""

    index: int
    relevance_score: float


class Ranks(msgspec.Struct, kw_only=True):
    """Reply of POST /reranking."""

    model: str
    object: Literal["list"] = "list"
    usage: Usage
    results: list[Rank]


class TokenizeBody(RequestBody, kw_only=True):
    """Body of POST /tokenize with `content`. add_special: with the model's special tokens. with_pieces: with their texts."""

    content: str
    model: str | None = None
    add_special: bool | None = None
    with_pieces: bool | None = None

    harmless: ClassVar[Mapping[str, str]] = {"parse_special": "special tokens in a text are always read as such"}


class Piece(msgspec.Struct, kw_only=True):
    """A token and its text."""

    id: int
    piece: str


class Tokens(msgspec.Struct, kw_only=True):
    """Reply of POST /tokenize."""

    tokens: list[int | Piece]


def to_requests(body: EmbeddingBody, served: ServedModel) -> list[EmbedRequest]:
    """Return the request to embed texts or token ids. Raises InputError."""
    if body.content is not None and body.input is not None:
        raise InputError("`input` and `content` are names of one thing; send one of them", param="content")
    given, name = (body.content, "content") if body.input is None else (body.input, "input")
    if given is None:
        raise InputError('"input" or "content" must be provided', param="content")
    normalize = unit_length(body.embd_normalize) is not False
    return [EmbedRequest(texts=text_inputs(given, served, name), normalize=normalize)]


def to_reply(results: Sequence[EmbedResult], _: EmbeddingBody, __: ServedModel) -> list[Embedding]:
    """Return a list of one vector per text."""
    return [Embedding(index=index, embedding=[row]) for index, row in enumerate(float_rows(results[0]))]


def rerank_requests(body: RerankBody, served: ServedModel) -> list[EmbedRequest]:
    """Return the requests to score the query with each document."""
    return to_rerank(served, body.query, body.documents, body.top_n or None)


def rerank_reply(results: Sequence[EmbedResult], body: RerankBody, served: ServedModel) -> Ranks:
    """Return the ranks by descending logit, which llama.cpp does not map to 0 to 1."""
    ranks = reranked(served, results, body.top_n or None, raw=True)
    items = [Rank(index=rank.index, relevance_score=rank.score) for rank in ranks]
    return Ranks(model=served.requested_name, usage=usage(results), results=items)


def tokenize(body: TokenizeBody, served: ServedModel) -> Tokens:
    """Return the tokens of a text, without special tokens unless they are asked for."""
    (tokens,) = served.tokenizer.tokens([body.content], "", special=bool(body.add_special))
    if body.with_pieces:
        return Tokens(tokens=[Piece(id=token.id, piece=token.text) for token in tokens])
    return Tokens(tokens=[token.id for token in tokens])


def _has_content(fields: BodyFields, _: Settings) -> bool:
    return fields.has("content") and not fields.has("input")


def _embedding(path: str, *, shared: bool) -> InferenceRoute[EmbeddingBody, list[Embedding]]:
    return InferenceRoute(
        path=path,
        summary="Embed texts",
        body=EmbeddingBody,
        vectors=True,
        reply=list[Embedding],
        to_requests=to_requests,
        to_reply=to_reply,
        applies=_has_content if shared else lambda _, __: True,
    )


DIALECT = Dialect(
    name="llama.cpp",
    base="llama.cpp",
    routes=[
        _embedding("/embedding", shared=False),
        _embedding("/embeddings", shared=True),
        _embedding("/v1/embeddings", shared=True),
        *map(embeddings_route, ("/embeddings", "/v1/embeddings")),
        *(
            InferenceRoute(
                path=path,
                summary="Rank documents by their logits (needs a reranker)",
                suits=can_rerank,
                bytes_per_number=4,
                body=RerankBody,
                reply=Ranks,
                to_requests=rerank_requests,
                to_reply=rerank_reply,
                below_base=path.endswith("rerank"),
            )
            for path in ("/reranking", "/v1/reranking", "/rerank", "/v1/rerank")
        ),
        TokenizerRoute(
            path="/tokenize",
            summary="Tokenize a text",
            body=TokenizeBody,
            reply=Tokens,
            answer=tokenize,
            applies=lambda fields, _: fields.has("content"),
        ),
    ],
    error=StatusError,
    to_error=to_status_error,
)
