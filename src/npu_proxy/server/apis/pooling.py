"""The pooling and score formats of vLLM and OpenVINO Model Server."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import msgspec

from npu_proxy.engine.outputs import relevance
from npu_proxy.engine.scoring import sigmoid
from npu_proxy.engine.validation import check_reranker
from npu_proxy.errors import InputError
from npu_proxy.server.apis.common import Usage, float_vectors, json_vectors, usage
from npu_proxy.server.apis.contract import InferenceRoute, Refused, RequestBody, ServedModel, is_dense
from npu_proxy.server.apis.embeddings import VLLM_HARMLESS, VLLM_REFUSED, encoded
from npu_proxy.server.apis.inputs import Inputs, Text, cut_of, only_one, text_inputs, texts_of, token_limit
from npu_proxy.spec import ModelSpec
from npu_proxy.types import DType, EmbedRequest, EmbedResult, OutputType, Pair


class PoolingBody(RequestBody, kw_only=True):
    """Body of POST /pooling. truncate_prompt_tokens: -1 means the model's own limit."""

    input: Inputs
    model: str | None = None
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] | None = None
    embed_dtype: Literal["float32"] | None = None
    endianness: Literal["native", "little", "big"] | None = None
    normalize: bool | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None

    refused: ClassVar[Mapping[str, Refused]] = VLLM_REFUSED
    harmless: ClassVar[Mapping[str, str]] = VLLM_HARMLESS


class PooledVector(msgspec.Struct, kw_only=True):
    """One vector."""

    index: int
    object: Literal["pooling"] = "pooling"
    data: list[float] | str | None


class PoolingReply(msgspec.Struct, kw_only=True):
    """Reply of POST /pooling."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[PooledVector]
    usage: Usage


Side = Text | list[Text]


class ScoreBody(RequestBody, kw_only=True):
    """Body of POST /score: one text against many, or pairs; each side has several names."""

    model: str | None = None
    text_1: Side | None = None
    text_2: Side | None = None
    queries: Side | None = None
    documents: Side | None = None
    data_1: Side | None = None
    data_2: Side | None = None
    items: Side | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    max_tokens_per_doc: int | None = None

    refused: ClassVar[Mapping[str, Refused]] = {
        **{name: why for name, why in VLLM_REFUSED.items() if name not in ("messages", "task")},
        "instruction": Refused("is not supported for scores; put it into the queries"),
    }
    harmless: ClassVar[Mapping[str, str]] = VLLM_HARMLESS


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
        vectors=True,
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


def _to_pooling(body: PoolingBody, served: ServedModel) -> list[EmbedRequest]:
    request = EmbedRequest(
        texts=text_inputs(body.input, served, "input"),
        dimensions=body.dimensions or None,
        normalize=only_one(normalize=body.normalize, use_activation=body.use_activation)[1] is not False,
        truncate=cut_of(None, body.truncation_side),
        max_tokens=token_limit(body.truncate_prompt_tokens),
        dtype=DType.BASE64 if body.encoding_format == "base64" and body.endianness != "big" else DType.FLOAT32,
    )
    return [request]


def _from_pooling(results: Sequence[EmbedResult], body: PoolingBody, served: ServedModel) -> PoolingReply:
    (result,) = results
    vectors = encoded(json_vectors(result), in_base64=body.encoding_format == "base64", big=body.endianness == "big")
    data = [PooledVector(index=index, data=vector) for index, vector in enumerate(vectors)]
    return PoolingReply(data=data, **common_fields(results, served))


def _can_score(spec: ModelSpec) -> bool:
    return spec.output_type is OutputType.SCORES or is_dense(spec)


def _to_score(body: ScoreBody, served: ServedModel) -> list[EmbedRequest]:
    """Return the left texts followed by the right ones, or pairs for a cross-encoder. Raises InputError if they do not pair up."""
    check_reranker(served.spec)
    left, right = _sides(body)
    limit, cut = token_limit(body.truncate_prompt_tokens), cut_of(None, body.truncation_side)
    most = token_limit(body.max_tokens_per_doc or None, "max_tokens_per_doc")
    if served.spec.output_type is OutputType.SCORES:
        pairs = [Pair(left[index if len(left) > 1 else 0], text) for index, text in enumerate(right)]
        return [EmbedRequest(texts=pairs, output_type=OutputType.SCORES, truncate=cut, max_tokens=limit, max_document_tokens=most)]
    if most is not None:
        raise InputError("`max_tokens_per_doc` needs a cross-encoder", param="max_tokens_per_doc")
    return [EmbedRequest(texts=[*left, *right], truncate=cut, max_tokens=limit, on_empty="embed")]


def _from_score(results: Sequence[EmbedResult], body: ScoreBody, served: ServedModel) -> Scores:
    (result,) = results
    if served.spec.output_type is OutputType.SCORES:
        logits = relevance(float_vectors(result))
        scores = logits if body.use_activation is False else sigmoid(logits)
    else:
        left = len(_sides(body)[0])
        vectors = float_vectors(result)
        scores = (vectors[:left] * vectors[left:]).sum(axis=1)  # a single left text is compared with every right one
    data = [Score(index=index, score=float(score)) for index, score in enumerate(scores)]
    return Scores(data=data, **common_fields(results, served))


def _sides(body: ScoreBody) -> tuple[list[str], list[str]]:
    left = _side(queries=body.queries, text_1=body.text_1, data_1=body.data_1)
    right = _side(documents=body.documents, text_2=body.text_2, data_2=body.data_2, items=body.items)
    if len(left) not in (1, len(right)):
        raise InputError(
            f"{len(left)} texts cannot be paired with {len(right)}; send one text, or the same number of both", param="queries"
        )
    return left, right


def _side(**named: Side | None) -> list[str]:
    """Return the texts of one side of the pairs, whatever its name. Raises InputError."""
    given = {name: side for name, side in named.items() if side is not None and side != []}
    if not given:
        first, *others = named
        raise InputError(f"`{first}` (or {', '.join(f'`{name}`' for name in others)}) is missing or empty", param=first)
    if len(given) > 1:
        raise InputError(
            f"{' and '.join(f'`{name}`' for name in given)} are names of one thing; send one of them", param=min(given)
        )
    ((name, side),) = given.items()
    return texts_of(side, name)
