"""The Mistral API, in addition to the fields that /v1/embeddings has for it: /v1/classifications. Source: mistralai's types."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import ClassVar

import msgspec

from npu_proxy.engine.validation import can_classify
from npu_proxy.errors import NpuProxyError
from npu_proxy.server.apis.common import Usage, usage
from npu_proxy.server.apis.contract import Dialect, InferenceRoute, RequestBody, ServedModel
from npu_proxy.server.apis.inputs import Text, texts_of
from npu_proxy.server.apis.scoring import classified, to_classify
from npu_proxy.types import EmbedRequest, EmbedResult


class ClassifyBody(RequestBody, kw_only=True):
    """Body of POST /v1/classifications."""

    input: Text | list[Text]
    model: str | None = None

    harmless: ClassVar[Mapping[str, str]] = {"metadata": "notes about the request"}


class Scores(msgspec.Struct, kw_only=True):
    """The score of every label."""

    scores: dict[str, float]


class Classifications(msgspec.Struct, kw_only=True):
    """Reply of POST /v1/classifications: for each text, the scores by target; the only target is `label`."""

    id: str
    model: str
    results: list[dict[str, Scores]]
    usage: Usage


class Error(msgspec.Struct, kw_only=True):
    """Error format of this API."""

    object: str = "error"
    message: str
    type: str
    param: str | None = None
    code: str


def to_requests(body: ClassifyBody, served: ServedModel) -> list[EmbedRequest]:
    """Return the request to classify the texts."""
    return to_classify(served, [*texts_of(body.input, "input")])


def to_reply(results: Sequence[EmbedResult], _: ClassifyBody, served: ServedModel) -> Classifications:
    """Return the scores of all labels of each text."""
    texts = classified(served, results)
    scores = [{"label": Scores(scores={label.label: label.score for label in labels})} for labels in texts]
    return Classifications(id=f"class-{uuid.uuid4().hex}", model=served.requested_name, results=scores, usage=usage(results))


def to_error(error: NpuProxyError, status: int) -> Error:
    """Return the error's message, kind and field."""
    return Error(message=str(error), type=error.kind, param=error.param, code=str(status))


DIALECT = Dialect(
    name="Mistral",
    base="mistral",
    routes=[
        InferenceRoute(
            path="/v1/classifications",
            summary="Classify texts (needs a classifier)",
            suits=can_classify,
            body=ClassifyBody,
            reply=Classifications,
            to_requests=to_requests,
            to_reply=to_reply,
        ),
    ],
    error=Error,
    to_error=to_error,
)
