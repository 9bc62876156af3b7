"""The Infinity dialect, as far as it differs from OpenAI's: /rerank and /classify. Source: Infinity's server."""

from __future__ import annotations

import msgspec

from npu_proxy.errors import NpuProxyError
from npu_proxy.server.dialect import Action, Dialect, Fields, no_head


class RerankBody(msgspec.Struct, kw_only=True):
    """Body of POST /rerank."""

    query: str
    documents: list[str]
    model: str | None = None
    top_n: int | None = None
    return_documents: bool | None = None
    raw_scores: bool | None = None


class ClassifyBody(msgspec.Struct, kw_only=True):
    """Body of POST /classify."""

    input: list[str]
    model: str | None = None
    raw_scores: bool | None = None


class ErrorDetail(msgspec.Struct, kw_only=True):
    """What went wrong; the code is the HTTP status."""

    message: str
    type: str
    param: str | None = None
    code: int


class Error(msgspec.Struct, kw_only=True):
    """Every error of this dialect."""

    error: ErrorDetail


def to_error(error: NpuProxyError, status: int) -> Error:
    """OpenAI's error with the status as its code."""
    kind = "invalid_request_error" if 400 <= status < 499 else "server_error"
    return Error(error=ErrorDetail(message=str(error), type=kind, param=error.param, code=status))


def is_list(fields: Fields) -> bool:
    """Whether `input` is a list of texts; vLLM's /classify takes a text or token ids."""
    given = bytes(fields.input).lstrip() or b"["
    return given.startswith(b"[") and not given.lstrip(b"[ \t\r\n")[:1].isdigit()


DIALECT = Dialect(
    name="Infinity",
    routes=[
        Action(path="/rerank", summary="Rank documents (needs a reranker)", body=RerankBody, response=None, answer=no_head),
        Action(
            path="/classify",
            summary="Classify (needs a classifier)",
            body=ClassifyBody,
            response=None,
            answer=no_head,
            when=is_list,
        ),
    ],
    error=Error,
    to_error=to_error,
    status={"invalid": 422, "empty": 422},
)
