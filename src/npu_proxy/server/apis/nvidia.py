"""NVIDIA's ranking API, in addition to the fields that /v1/embeddings has for its models: /v1/ranking. Source: NIM's reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import msgspec

from npu_proxy.engine.validation import can_rerank
from npu_proxy.errors import NpuProxyError
from npu_proxy.server.apis.common import Usage, usage
from npu_proxy.server.apis.contract import Dialect, InferenceRoute, Refused, RequestBody, ServedModel
from npu_proxy.server.apis.inputs import Text, cut_of, text_of
from npu_proxy.server.apis.scoring import reranked, to_rerank
from npu_proxy.types import EmbedRequest, EmbedResult


class RankingBody(RequestBody, kw_only=True):
    """Body of POST /v1/ranking."""

    query: Text
    passages: list[Text]
    model: str | None = None
    truncate: str | None = None

    refused: ClassVar[Mapping[str, Refused]] = {
        "top_n": Refused("is not part of this API, which ranks all passages"),
        "top_k": Refused("is not part of this API, which ranks all passages"),
    }


class Ranking(msgspec.Struct, kw_only=True):
    """A passage's index, and its score: the model's logit."""

    index: int
    logit: float


class Rankings(msgspec.Struct, kw_only=True):
    """Reply of POST /v1/ranking."""

    rankings: list[Ranking]
    usage: Usage


class Error(msgspec.Struct, kw_only=True):
    """Error format of this API."""

    object: str = "error"
    message: str
    detail: str
    type: str


def to_requests(body: RankingBody, served: ServedModel) -> list[EmbedRequest]:
    """Return the requests to score the query with each passage."""
    passages = [text_of(passage, "passages") for passage in body.passages]
    return to_rerank(served, text_of(body.query, "query"), passages, None, truncate=cut_of(body.truncate))


def to_reply(results: Sequence[EmbedResult], _: RankingBody, served: ServedModel) -> Rankings:
    """Return all passages by descending logit."""
    rankings = [Ranking(index=rank.index, logit=rank.score) for rank in reranked(served, results, raw=True)]
    return Rankings(rankings=rankings, usage=usage(results))


def to_error(error: NpuProxyError, _: int) -> Error:
    """Return the error's message and kind."""
    return Error(message=str(error), detail=str(error), type=error.kind)


DIALECT = Dialect(
    name="NVIDIA",
    base="nvidia",
    routes=[
        InferenceRoute(
            path=path,
            summary="Rank passages by their logits (needs a reranker)",
            suits=can_rerank,
            bytes_per_number=4,
            body=RankingBody,
            reply=Rankings,
            to_requests=to_requests,
            to_reply=to_reply,
        )
        for path in ("/v1/ranking", "/v1/retrieval/{id:path}/reranking")  # the second one's body names the model
    ],
    error=Error,
    to_error=to_error,
    status={"overloaded": 429},
)
