"""Code that several APIs share: usage, errors with the HTTP status as their code, names of models, vectors, header values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from npu_proxy.errors import NpuProxyError
from npu_proxy.server.apis.contract import ModelInfo, ModelListing
from npu_proxy.types import EmbedResult


class Usage(msgspec.Struct, kw_only=True):
    """Number of tokens embedded, special tokens included."""

    prompt_tokens: int
    total_tokens: int


class StatusErrorDetail(msgspec.Struct, kw_only=True):
    """What went wrong; the code is the HTTP status."""

    message: str
    type: str
    param: str | None = None
    code: int


class StatusError(msgspec.Struct, kw_only=True):
    """Error of the APIs of Infinity, vLLM and OpenVINO Model Server: OpenAI's format with the HTTP status as the code."""

    error: StatusErrorDetail


def to_status_error(error: NpuProxyError, status: int) -> StatusError:
    """Convert an error to the format of those APIs."""
    detail = StatusErrorDetail(message=str(error), type=error_type(status), param=error.param, code=status)
    return StatusError(error=detail)


def error_type(status: int) -> str:
    """Return OpenAI's name for the type of an error."""
    return "invalid_request_error" if 400 <= status < 499 else "server_error"


def named_models(listing: ModelListing) -> Iterator[tuple[ModelInfo, str]]:
    """Yield every model with its own name, then with each further name in the server's settings."""
    models = listing.all()
    yield from ((model, model.spec.name) for model in models)
    yield from ((model, name) for model in models for name in model.names)


def tokens_used(results: Sequence[EmbedResult]) -> int:
    """Return the number of tokens of all texts of a reply."""
    return sum(sum(result.tokens) for result in results)


def usage(results: Sequence[EmbedResult]) -> Usage:
    """Return the usage of a reply."""
    tokens = tokens_used(results)
    return Usage(prompt_tokens=tokens, total_tokens=tokens)


def float_vectors(result: EmbedResult) -> npt.NDArray[np.float32]:
    """Return the vectors [n, width] of a request for float32."""
    return np.asarray(result.embeddings, np.float32)


def json_vectors(result: EmbedResult) -> list[Any]:
    """Return the vectors as JSON values: arrays, which are encoded one by one, or base64 strings; null for texts that failed."""
    return with_failures(list(result.embeddings), result)


def float_rows(result: EmbedResult) -> list[Any]:
    """Return the vectors of a request for float32 as JSON values: arrays, which are encoded one by one, or null."""
    return with_failures(list(float_vectors(result)), result)


def with_failures(rows: list[Any], result: EmbedResult) -> list[Any]:
    """Return one row per text, with null for texts that failed (only if `on_error` is `null`; see http/app.py)."""
    if not any(result.errors):
        return rows
    return [None if error is not None else row for row, error in zip(rows, result.errors, strict=True)]


def header_text(text: str) -> str:
    """Return text that is valid as a header's value: one line of printable ASCII, up to 400 characters."""
    return "".join(character if " " <= character <= "~" else "?" for character in text)[:400]
