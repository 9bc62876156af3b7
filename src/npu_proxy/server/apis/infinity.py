"""The parts of the Infinity API that differ from OpenAI's: /rerank, /classify and /models. Source: Infinity's server."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import msgspec

from npu_proxy.engine.validation import can_classify, can_rerank
from npu_proxy.server.apis.common import StatusError, Usage, named_models, to_status_error, usage
from npu_proxy.server.apis.contract import (
    BodyFields,
    Dialect,
    InferenceRoute,
    ModelInfo,
    ModelListing,
    ModelQuery,
    RequestBody,
    ServedModel,
    kind_of,
)
from npu_proxy.server.apis.inputs import Text, texts_of
from npu_proxy.server.apis.scoring import RerankBody, classified, ranks_of, requests_of, to_classify
from npu_proxy.settings import Settings
from npu_proxy.types import EmbedRequest, EmbedResult


class ClassifyBody(RequestBody, kw_only=True):
    """Body of POST /classify. Infinity itself takes `raw_scores` and does not use it; here it asks for logits."""

    input: list[Text] | str
    model: str | None = None
    raw_scores: bool | None = None

    harmless: ClassVar[Mapping[str, str]] = {"user": "who asks; not used"}


class Rank(msgspec.Struct, kw_only=True):
    """A document's index and score; the document is null unless it was asked for."""

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


class Load(msgspec.Struct, kw_only=True):
    """How busy a model is; not measured per model here."""

    queue_fraction: float = 0.0
    queue_absolute: int = 0
    results_pending: int = 0
    batch_size: int


class Model(msgspec.Struct, kw_only=True):
    """One of the server's models. `owned_by` is what Infinity's client insists on."""

    id: str
    object: Literal["model"] = "model"
    owned_by: Literal["infinity"] = "infinity"
    created: int
    backend: Literal["openvino"] = "openvino"
    capabilities: list[str]
    stats: Load
    max_model_len: int


class Models(msgspec.Struct, kw_only=True):
    """Reply of GET /models."""

    object: Literal["list"] = "list"
    data: list[Model]


_CAPABILITIES = {"embedding": "embed", "reranker": "rerank", "classifier": "classify"}


def models(listing: ModelListing, _: str) -> Models:
    """List every model by its own name, then by the further names in the server's settings."""
    batch = listing.settings.max_client_batch
    return Models(data=[_model(info, name, batch) for info, name in named_models(listing)])


def _model(info: ModelInfo, name: str, batch: int) -> Model:
    capabilities = [_CAPABILITIES[kind] for kind in [kind_of(info.spec)] if kind in _CAPABILITIES]
    if capabilities == ["embed"] and can_rerank(info.spec):
        capabilities.append("rerank")
    return Model(
        id=name,
        created=info.since,
        capabilities=capabilities,
        stats=Load(batch_size=batch),
        max_model_len=info.spec.max_length,
    )


def rerank_reply(results: Sequence[EmbedResult], body: RerankBody, served: ServedModel) -> Ranks:
    """Return the ranks by descending score; on request with the documents, as plain strings."""
    ranks = [
        Rank(relevance_score=rank.score, index=rank.index, document=text)
        for rank, text in ranks_of(results, body, served, returned=bool(body.return_documents))
    ]
    return Ranks(results=ranks, **_common(results, served))


def classify_requests(body: ClassifyBody, served: ServedModel) -> list[EmbedRequest]:
    """Return the request to classify the texts. Raises EmptyInputError."""
    return to_classify(served, [*texts_of(body.input, "input")])


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


def _is_rerank_body(fields: BodyFields, settings: Settings) -> bool:
    """Whether a body has `raw_scores`, which Infinity's client always sends. The setting `rerank_dialect` overrides this."""
    if fields.has("texts"):
        return False
    if settings.rerank_dialect != "auto":
        return settings.rerank_dialect == "infinity"
    return fields.has("raw_scores")


def _is_classify_body(fields: BodyFields, settings: Settings) -> bool:
    """Whether `input` is a list of texts, unlike vLLM's text or token ids. The setting `classify_dialect` overrides this."""
    if settings.classify_dialect != "auto":
        return settings.classify_dialect == "infinity"
    given = bytes(fields.input).lstrip() or b"["
    return given.startswith(b"[") and not given.lstrip(b"[ \t\r\n")[:1].isdigit()


DIALECT = Dialect(
    name="Infinity",
    base="infinity",
    routes=[
        InferenceRoute(
            path="/rerank",
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
            path="/classify",
            summary="Classify texts (needs a classifier)",
            suits=can_classify,
            body=ClassifyBody,
            reply=Classes,
            to_requests=classify_requests,
            to_reply=classify_reply,
            applies=_is_classify_body,
        ),
        ModelQuery(path="/models", summary="List the models", reply=Models, answer=models),
    ],
    error=StatusError,
    to_error=to_status_error,
    status={"invalid": 422, "empty": 422},
)
