"""What a dialect consists of: body types, to_request, to_response, to_error. app.py does everything else once for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from npu_proxy.engine.tokenize import TextEncoder
from npu_proxy.errors import EmptyInputError, InputError, ModelNotFoundError, NpuProxyError
from npu_proxy.models.catalog import canonical
from npu_proxy.settings import Settings
from npu_proxy.types import EmbedResult, ModelSpec, TextInput

STATUS: Mapping[str, int] = {
    "invalid": 400,
    "empty": 400,
    "too_long": 400,
    "nothing_left": 400,
    "no_body": 400,
    "unsupported": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "model_not_found": 404,
    "too_large": 413,
    "overloaded": 503,
    "stopped": 503,
    "unavailable": 503,
    "device": 503,
    "deadline": 504,
}
"""HTTP status by ``kind`` of an error; any other is 500."""


class NoBodyError(InputError):
    """The request has no body."""

    kind = "no_body"


class UnsupportedError(InputError):
    """The loaded model is of another kind than the route is for."""

    kind = "unsupported"


class ForbiddenError(InputError):
    """The route is switched off."""

    kind = "forbidden"


class UnknownModelError(ModelNotFoundError):
    """A request names a ``model`` that is not served."""

    def __init__(self, model: str, served: str) -> None:
        super().__init__(f"The model `{model}` does not exist here; served is `{served}`.", param="model")
        self.model = model


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a dialect may know of the server: the model, its tokenizer, since when it is served (Unix seconds), settings."""

    spec: ModelSpec
    encoder: TextEncoder
    settings: Settings
    since: int

    def check(self, name: str | None) -> str:
        """The name as the client said it, or the model's own where it said none. Raises ModelNotFoundError for another."""
        if not name:
            return self.spec.name
        wanted = canonical(name).lower().removesuffix(":latest")
        known = (self.spec.name, *self.settings.served_model_name)
        if wanted not in {canonical(one).lower().removesuffix(":latest") for one in known}:
            raise UnknownModelError(name, self.spec.name)
        return name

    @property
    def size(self) -> int:
        """Bytes of its weights."""
        return sum(file.stat().st_size for file in self.spec.weight_files)

    @property
    def parameters(self) -> int:
        """Numbers in its weights, counted as float32."""
        return self.size // 4


ToRequest = Callable[[Any, Served], Any]
"""Body to EmbedRequest; whatever else it returns is the answer."""
ToResponse = Callable[[EmbedResult, Any, Served], Any]


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """``POST path`` takes a ``body``, becomes an EmbedRequest, and answers with a ``response`` (any type JSON can hold)."""

    path: str
    summary: str
    body: type[msgspec.Struct]
    response: Any
    to_request: ToRequest
    to_response: ToResponse


@dataclass(frozen=True, kw_only=True)
class Action:
    """``POST path`` (or another method) takes a ``body`` and is answered from what is served, without the model."""

    path: str
    summary: str
    body: type[msgspec.Struct]
    response: Any
    answer: Callable[[Any, Served], Any]
    method: Literal["POST", "DELETE"] = "POST"


@dataclass(frozen=True, kw_only=True)
class Query:
    """``GET path`` answers from what is served; ``{id:path}`` in the path is passed on, a name or ''."""

    path: str
    summary: str
    response: Any
    answer: Callable[[Served, str], Any]


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """One API as its clients know it."""

    name: str
    endpoints: Sequence[Endpoint]
    error: type[msgspec.Struct]
    to_error: Callable[[NpuProxyError, int], msgspec.Struct]
    actions: Sequence[Action] = ()
    queries: Sequence[Query] = ()
    status: Mapping[str, int] = field(default_factory=dict[str, int])
    """Where this dialect's status differs from STATUS."""
    headers: Callable[[EmbedResult], Mapping[str, str]] = lambda _: {}
    """Headers that its clients read, beside npu-proxy's own."""


def floats(result: EmbedResult) -> npt.NDArray[np.float32]:
    """The vectors [n, width] of a request for float32."""
    return np.asarray(result.embeddings, np.float32)


def text_inputs(given: str | list[str | int | list[int]], served: Served, param: str) -> list[TextInput]:
    """One text, texts, token ids, or lists of token ids; not a mixture. Raises InputError naming ``param``."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise EmptyInputError(f"`{param}` is empty; send at least one text.", param=param)
    kinds = {type(item) for item in given}
    if len(kinds) > 1:
        raise InputError(f"`{param}` mixes texts and token ids; send one kind.", param=param)
    (kind,) = kinds
    if kind is not str and served.settings.token_ids == "reject":
        raise InputError("this server takes no token ids (setting `token_ids`); send text.", param=param)
    if kind is int:
        return [[item for item in given if isinstance(item, int)]]
    return [item for item in given if not isinstance(item, int)]
