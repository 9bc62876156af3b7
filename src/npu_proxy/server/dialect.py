"""What a dialect consists of: body types, to_request, to_response, to_error. app.py does everything else once for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from npu_proxy.errors import NpuProxyError
from npu_proxy.types import EmbedRequest, EmbedResult, ModelSpec

STATUS: Mapping[str, int] = {
    "invalid": 400,
    "empty": 400,
    "too_long": 400,
    "model_not_found": 404,
    "too_large": 413,
    "overloaded": 503,
    "stopped": 503,
    "unavailable": 503,
    "device": 503,
    "deadline": 504,
}
"""HTTP status by ``kind`` of an error; any other is 500."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a dialect may know of the server: the model, since when it is served, and how token ids are taken."""

    spec: ModelSpec
    since: int
    token_ids: str


ToRequest = Callable[[Any, Served], EmbedRequest]
ToResponse = Callable[[EmbedResult, Any, Served], msgspec.Struct]


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """``POST path`` takes a ``body``, becomes an EmbedRequest, and answers with a ``response``."""

    path: str
    summary: str
    body: type[msgspec.Struct]
    response: type[msgspec.Struct]
    to_request: ToRequest
    to_response: ToResponse


@dataclass(frozen=True, kw_only=True)
class Query:
    """``GET path`` answers from what is served; ``{id:path}`` in the path is passed on, a name or ''."""

    path: str
    summary: str
    response: type[msgspec.Struct]
    answer: Callable[[Served, str], msgspec.Struct]


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """One API as its clients know it."""

    name: str
    endpoints: Sequence[Endpoint]
    queries: Sequence[Query]
    error: type[msgspec.Struct]
    to_error: Callable[[NpuProxyError, int], msgspec.Struct]
    status: Mapping[str, int] = field(default_factory=dict[str, int])
    """Where this dialect's status differs from STATUS."""
