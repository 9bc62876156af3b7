"""The pooling and score formats of vLLM and OpenVINO Model Server."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from npu_proxy.engine.outputs import relevance
from npu_proxy.engine.scoring import sigmoid
from npu_proxy.engine.validation import check_reranker
from npu_proxy.errors import InputError
from npu_proxy.server.apis.common import Usage, float_vectors, json_vectors, usage
from npu_proxy.server.apis.contract import InferenceRoute, ServedModel, is_dense
from npu_proxy.server.apis.inputs import text_inputs
from npu_proxy.spec import ModelSpec
from npu_proxy.types import DType, EmbedRequest, EmbedResult, OutputType, Pair


class PoolingBody(msgspec.Struct, kw_only=True):
    """Body of POST /pooling. truncate_prompt_tokens: -1 means the model's own limit."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] | None = None
    normalize: bool | None = None
    truncate_prompt_tokens: int | None = None


class PooledVector(msgspec.Struct, kw_only=True):
    """One vector."""

    index: int
    object: Literal["pooling"] = "pooling"
    data: list[float] | str


class PoolingReply(msgspec.Struct, kw_only=True):
    """Reply of POST /pooling."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[PooledVector]
    usage: Usage


class ScoreBody(msgspec.Struct, kw_only=True):
    """Body of POST /score: one text against many, or pairs; each field has two names."""

    model: str | None = None
    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None
    truncate_prompt_tokens: int | None = None


class Score(msgspec.Struct, kw_only=True):
    """The score of a pair: from a cross-encoder, or the cosine of the two vectors."""

    index: int
    object: Literal["score"] = "score"
    score: float


class Scores(msgspec.Struct, kw_only=True):
    """Reply of POST /score."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: Usage


def pooling_route(path: str) -> InferenceRoute[PoolingBody, PoolingReply]:
    """Return a route for vectors in this format."""
    return InferenceRoute(
        path=path,
        summary="Embed texts",
        body=PoolingBody,
        reply=PoolingReply,
        to_requests=_to_pooling,
        to_reply=_from_pooling,
    )


def score_route(path: str) -> InferenceRoute[ScoreBody, Scores]:
    """Return a route for scores of pairs of texts in this format."""
    return InferenceRoute(
        path=path,
        summary="Score the similarity of pairs of texts",
        suits=_can_score,
        body=ScoreBody,
        reply=Scores,
        to_requests=_to_score,
        to_reply=_from_score,
        texts_per_item=2,
    )


def common_fields(results: Sequence[EmbedResult], served: ServedModel) -> dict[str, Any]:
    """Return the fields that every reply of vLLM has."""
    return {
        "id": f"npu-proxy-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": served.requested_name,
        "usage": usage(results),
    }


def token_limit(tokens: int | None) -> int | None:
    """Return a limit on tokens; None for 0 and -1, which mean no limit."""
    return tokens if tokens is not None and tokens > 0 else None


def _to_pooling(body: PoolingBody, served: ServedModel) -> list[EmbedRequest]:
    request = EmbedRequest(
        texts=text_inputs(body.input, served, "input"),
        dimensions=body.dimensions,
        normalize=body.normalize is not False,
        max_tokens=token_limit(body.truncate_prompt_tokens),
        dtype=DType.BASE64 if body.encoding_format == "base64" else DType.FLOAT32,
    )
    return [request]


def _from_pooling(results: Sequence[EmbedResult], _: PoolingBody, served: ServedModel) -> PoolingReply:
    (result,) = results
    data = [PooledVector(index=index, data=vector) for index, vector in enumerate(json_vectors(result))]
    return PoolingReply(data=data, **common_fields(results, served))


def _can_score(spec: ModelSpec) -> bool:
    return spec.output_type is OutputType.SCORES or is_dense(spec)


def _to_score(body: ScoreBody, served: ServedModel) -> list[EmbedRequest]:
    """Return the left texts followed by the right ones, or pairs for a cross-encoder. Raises InputError if they do not pair up."""
    check_reranker(served.spec)
    left, right = _sides(body)
    limit = token_limit(body.truncate_prompt_tokens)
    if served.spec.output_type is OutputType.SCORES:
        pairs = [Pair(left[index if len(left) > 1 else 0], text) for index, text in enumerate(right)]
        return [EmbedRequest(texts=pairs, output_type=OutputType.SCORES, max_tokens=limit)]
    return [EmbedRequest(texts=[*left, *right], max_tokens=limit)]


def _from_score(results: Sequence[EmbedResult], body: ScoreBody, served: ServedModel) -> Scores:
    (result,) = results
    if served.spec.output_type is OutputType.SCORES:
        scores = sigmoid(relevance(float_vectors(result)))
    else:
        left = len(_sides(body)[0])
        vectors = float_vectors(result)
        scores = (vectors[:left] * vectors[left:]).sum(axis=1)  # a single left text is compared with every right one
    data = [Score(index=index, score=float(score)) for index, score in enumerate(scores)]
    return Scores(data=data, **common_fields(results, served))


def _sides(body: ScoreBody) -> tuple[list[str], list[str]]:
    sides: list[list[str]] = []
    for names, given in (
        ("`queries` (or `text_1`)", body.queries or body.text_1),
        ("`documents` (or `text_2`)", body.documents or body.text_2),
    ):
        if not given:
            raise InputError(f"{names} is missing or empty", param=names.split("`")[1])
        sides.append([given] if isinstance(given, str) else given)
    left, right = sides
    if len(left) not in (1, len(right)):
        raise InputError(
            f"{len(left)} texts cannot be paired with {len(right)}; send one text, or the same number of both", param="queries"
        )
    return left, right
