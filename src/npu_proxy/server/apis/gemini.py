"""The Gemini API for embeddings: models/NAME:embedContent, :batchEmbedContents, :countTokens. Source: google-genai's types.

Names of fields are accepted in camelCase and in snake_case, as the API does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import msgspec

from npu_proxy.errors import EmptyInputError, InputError, NpuProxyError
from npu_proxy.server.apis.common import float_rows, named_models, tokens_used
from npu_proxy.server.apis.contract import (
    Dialect,
    InferenceRoute,
    ModelInfo,
    ModelListing,
    ModelQuery,
    Refused,
    RequestBody,
    Route,
    ServedModel,
    TokenizerRoute,
    kind_of,
)
from npu_proxy.server.apis.inputs import cut_of, input_type, only_one
from npu_proxy.types import EmbedRequest, EmbedResult

_MODELS = ("/v1beta/models", "/v1/models", "/models")
"""What stands before a model's name; LiteLLM leaves the version out."""
_FILES = ("mimeType", "mime_type", "documentOcr", "document_ocr", "audioTrackExtraction", "audio_track_extraction")
_REFUSED: Mapping[str, Refused] = {
    "title": Refused("is not supported; put it before the text"),
    **{name: Refused("is for files; this server takes only text", neutral=(False,)) for name in _FILES},
}


class Part(msgspec.Struct, kw_only=True):
    """A part of a content; only texts are supported."""

    text: str | None = None


class Content(msgspec.Struct, kw_only=True):
    """A text, in parts that are joined by line feeds."""

    parts: list[Part] | Part | None = None


class EmbedContent(RequestBody, kw_only=True):
    """Body of POST models/NAME:embedContent."""

    content: Content | str | None = None
    task_type: str | None = None
    taskType: str | None = None  # noqa: N815 - the API's own name
    output_dimensionality: int | None = None
    outputDimensionality: int | None = None  # noqa: N815
    auto_truncate: bool | None = None
    autoTruncate: bool | None = None  # noqa: N815

    refused: ClassVar[Mapping[str, Refused]] = _REFUSED
    harmless: ClassVar[Mapping[str, str]] = {"model": "the path names it"}


class OneContent(EmbedContent, kw_only=True):
    """One of the requests of a batch."""

    title: str | None = None
    mimeType: str | None = None  # noqa: N815
    mime_type: str | None = None
    documentOcr: bool | None = None  # noqa: N815
    document_ocr: bool | None = None
    audioTrackExtraction: bool | None = None  # noqa: N815
    audio_track_extraction: bool | None = None


class BatchBody(RequestBody, kw_only=True):
    """Body of POST models/NAME:batchEmbedContents."""

    requests: list[OneContent]


class CountBody(RequestBody, kw_only=True):
    """Body of POST models/NAME:countTokens."""

    contents: list[Content] | Content

    refused: ClassVar[Mapping[str, Refused]] = {
        "generateContentRequest": Refused("is for models that write text; send `contents`"),
        "systemInstruction": Refused("is for models that write text"),
        "tools": Refused("are for models that write text", neutral=([],)),
    }
    harmless: ClassVar[Mapping[str, str]] = {"model": "the path names it", "generationConfig": "is for models that write text"}


class Values(msgspec.Struct, kw_only=True):
    """One vector; null if the text failed and `on_error` is `null`."""

    values: list[float] | None


class UsageMetadata(msgspec.Struct, kw_only=True):
    """Number of tokens embedded, special tokens included."""

    promptTokenCount: int  # noqa: N815


class Embedded(msgspec.Struct, kw_only=True):
    """Reply of :embedContent."""

    embedding: Values
    usageMetadata: UsageMetadata  # noqa: N815


class BatchEmbedded(msgspec.Struct, kw_only=True):
    """Reply of :batchEmbedContents."""

    embeddings: list[Values]
    usageMetadata: UsageMetadata  # noqa: N815


class Count(msgspec.Struct, kw_only=True):
    """Reply of :countTokens."""

    totalTokens: int  # noqa: N815


class Model(msgspec.Struct, kw_only=True):
    """One of the server's models."""

    name: str
    displayName: str  # noqa: N815
    inputTokenLimit: int  # noqa: N815
    outputTokenLimit: int = 1  # noqa: N815
    supportedGenerationMethods: list[str]  # noqa: N815


class Models(msgspec.Struct, kw_only=True):
    """Reply of GET /v1beta/models."""

    models: list[Model]


class ErrorDetail(msgspec.Struct, kw_only=True):
    """What went wrong; the code is the HTTP status."""

    code: int
    message: str
    status: str


class Error(msgspec.Struct, kw_only=True):
    """Error format of this API."""

    error: ErrorDetail


_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


def to_requests(body: EmbedContent, _: ServedModel) -> list[EmbedRequest]:
    """Return the request to embed one text."""
    return [_request(body)]


def to_reply(results: Sequence[EmbedResult], _: EmbedContent, __: ServedModel) -> Embedded:
    """Return one vector."""
    (row,) = float_rows(results[0])
    return Embedded(embedding=Values(values=row), usageMetadata=UsageMetadata(promptTokenCount=tokens_used(results)))


def batch_requests(body: BatchBody, _: ServedModel) -> list[EmbedRequest]:
    """Return one request, or one per text if their options differ. Raises InputError."""
    if not body.requests:
        raise EmptyInputError("`requests` is empty; send at least one", param="requests")
    for name, refused in _REFUSED.items():
        if any(getattr(request, name) for request in body.requests):
            raise InputError(f"`{name}` {refused.why}", param=name)
    made = list(map(_request, body.requests))
    if all(replace(request, texts=made[0].texts) == made[0] for request in made):
        return [replace(made[0], texts=[request.texts[0] for request in made])]
    return made


def batch_reply(results: Sequence[EmbedResult], _: BatchBody, __: ServedModel) -> BatchEmbedded:
    """Return one vector per request."""
    rows = [Values(values=row) for result in results for row in float_rows(result)]
    return BatchEmbedded(embeddings=rows, usageMetadata=UsageMetadata(promptTokenCount=tokens_used(results)))


def count(body: CountBody, served: ServedModel) -> Count:
    """Return the number of tokens of the contents."""
    contents = body.contents if isinstance(body.contents, list) else [body.contents]
    lists = served.tokenizer.tokens([_text(content) for content in contents], "", special=True)
    return Count(totalTokens=sum(map(len, lists)))


def models(listing: ModelListing, _: str) -> Models:
    """List every model by its own name, then by the further names in the server's settings."""
    return Models(models=[_model(info, name) for info, name in named_models(listing)])


def model(listing: ModelListing, name: str) -> Model:
    """Return the model with that name. Raises UnknownModelError."""
    return _model(listing.find(name), name)


def to_error(error: NpuProxyError, status: int) -> Error:
    """Return Google's nested error."""
    return Error(error=ErrorDetail(code=status, message=str(error), status=_STATUS.get(status, "INTERNAL")))


def _model(info: ModelInfo, name: str) -> Model:
    methods = ["embedContent", "batchEmbedContents", "countTokens"] if kind_of(info.spec) == "embedding" else ["countTokens"]
    limit = info.spec.max_length
    return Model(name=f"models/{name}", displayName=name, inputTokenLimit=limit, supportedGenerationMethods=methods)


def _request(body: EmbedContent) -> EmbedRequest:
    """Return the request to embed one text."""
    _, task = only_one(taskType=body.taskType, task_type=body.task_type)
    _, width = only_one(outputDimensionality=body.outputDimensionality, output_dimensionality=body.output_dimensionality)
    _, truncate = only_one(autoTruncate=body.autoTruncate, auto_truncate=body.auto_truncate)
    return EmbedRequest(
        texts=[_text(body.content)],
        input_type=input_type(task if isinstance(task, str) else None, "taskType"),
        dimensions=width if isinstance(width, int) and width else None,
        truncate=cut_of(None if truncate is None else bool(truncate)),
    )


def _text(content: Content | str | None) -> str:
    if isinstance(content, str):
        return content
    parts = content.parts if content is not None else None
    listed = [parts] if isinstance(parts, Part) else parts or []
    texts = [part.text for part in listed if part.text is not None]
    if not texts or len(texts) < len(listed):
        raise InputError("`content` needs parts with `text`; this server takes only text", param="content")
    return "\n".join(texts)


def _methods(base: str) -> list[Route]:
    """Return the routes of a model whose name follows this path."""
    return [
        InferenceRoute(
            path=f"{base}/{{id:path}}:embedContent",
            summary="Embed a text",
            body=EmbedContent,
            vectors=True,
            reply=Embedded,
            to_requests=to_requests,
            to_reply=to_reply,
            model_in_path=True,
        ),
        InferenceRoute(
            path=f"{base}/{{id:path}}:batchEmbedContents",
            summary="Embed texts",
            body=BatchBody,
            vectors=True,
            reply=BatchEmbedded,
            to_requests=batch_requests,
            to_reply=batch_reply,
            model_in_path=True,
        ),
        TokenizerRoute(
            path=f"{base}/{{id:path}}:countTokens",
            summary="Count tokens",
            body=CountBody,
            reply=Count,
            answer=count,
            model_in_path=True,
        ),
    ]


DIALECT = Dialect(
    name="Gemini",
    base="gemini",
    routes=[
        *(route for base in _MODELS for route in _methods(base)),
        ModelQuery(path="/v1beta/models", summary="List the models", reply=Models, answer=models),
        ModelQuery(path="/v1beta/models/{id:path}", summary="Show a model", reply=Model, answer=model),
    ],
    error=Error,
    to_error=to_error,
    status={"overloaded": 429},
)
