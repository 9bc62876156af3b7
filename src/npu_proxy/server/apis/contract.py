"""The interface of an API file: body types, ``to_requests``, ``to_reply``, ``to_error``. http/app.py does everything else.

An API is a Dialect: a list of routes of four kinds. An InferenceRoute uses the engine, a TokenizerRoute uses a loaded model's
tokenizer, a ModelQuery and a ModelCommand use the list of models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import msgspec

from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.engine.validation import can_classify, can_rerank
from npu_proxy.errors import NpuProxyError
from npu_proxy.models.store import StoredModel
from npu_proxy.server.errors import STATUS
from npu_proxy.settings import Settings
from npu_proxy.spec import ModelSpec
from npu_proxy.types import EmbedRequest, EmbedResult, OutputType

JSON_BYTES = 21
"""Bytes of a number in JSON, about."""

Body = TypeVar("Body", bound="RequestBody")
Reply = TypeVar("Reply")


# -- arguments of routes -------------------------------------------------------------------------------------------------


class TokenDecoder(Protocol):
    """Decodes token ids of another vocabulary to text (models/cl100k.py)."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text. Raises InputError for an unknown id."""
        ...


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A loaded model while a request uses it.

    requested_name: the model's name as the client wrote it, or its own. load_seconds: how long the request waited for the model
    to be loaded. cl100k: returns the decoder of cl100k_base ids; raises InputError with instructions if it is not downloaded.
    role: `query` or `document`, if the requested name ends in it; the input type of requests that choose no prompt.
    """

    spec: ModelSpec
    tokenizer: RequestTokenizer
    settings: Settings
    requested_name: str
    load_seconds: float
    cl100k: Callable[[], TokenDecoder]
    role: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A model that clients may request.

    since: when it was loaded or stored, in Unix seconds. names: further names for it. expires: when it will be unloaded, in
    Unix seconds; None for never, or if it is not loaded. tokens_per_second: measured speed; 0 if it is unknown.
    """

    spec: ModelSpec
    since: int
    names: Sequence[str] = ()
    loaded: bool = True
    expires: float | None = None
    tokens_per_second: float = 0.0

    @property
    def size(self) -> int:
        """Size of its weights in bytes."""
        return sum(file.stat().st_size for file in self.spec.weight_files)

    @property
    def parameters(self) -> int:
        """Number of parameters, counting the weights as float32."""
        return self.size // 4


class ModelListing(Protocol):
    """The server's models, without loading any. The methods may read files."""

    @property
    def settings(self) -> Settings: ...

    @property
    def default(self) -> ModelInfo:
        """The first model. Raises StoppedError while it is loading."""
        ...

    def all(self) -> Sequence[ModelInfo]:
        """Return every model that clients may request, loaded ones first."""
        ...

    def find(self, name: str | None) -> ModelInfo:
        """Return the model with that name or alias, or the first model without a name. Raises UnknownModelError."""
        ...

    def pull(self, name: str, report: Callable[[str], None]) -> StoredModel:
        """Download a model into the store. Raises ForbiddenError, InputError or PullError."""
        ...

    def delete(self, name: str) -> None:
        """Unload a model and remove it from the store. Raises ForbiddenError, UnknownModelError or UnavailableError."""
        ...


class BodyFields(msgspec.Struct):
    """The fields that distinguish the bodies of the APIs, as raw JSON; empty if a body does not have the field."""

    model: msgspec.Raw = msgspec.Raw()
    raw_scores: msgspec.Raw = msgspec.Raw()
    top_k: msgspec.Raw = msgspec.Raw()
    truncation: msgspec.Raw = msgspec.Raw()
    content: msgspec.Raw = msgspec.Raw()
    query: msgspec.Raw = msgspec.Raw()
    inputs: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    text: msgspec.Raw = msgspec.Raw()
    texts: msgspec.Raw = msgspec.Raw()
    documents: msgspec.Raw = msgspec.Raw()

    def has(self, name: str) -> bool:
        """Whether the body has that field."""
        return bool(bytes(getattr(self, name)))


Applies = Callable[[BodyFields, Settings], bool]
"""Whether a body is meant for a route, on a path that several APIs share; the first matching route handles it."""


def _always(fields: BodyFields, settings: Settings) -> bool:
    return True


def is_dense(spec: ModelSpec) -> bool:
    """Whether a model computes one vector per text."""
    return OutputType.DENSE in spec.output_types


def kind_of(spec: ModelSpec) -> str:
    """What a model is for: `embedding`, `reranker`, `classifier`, or `sparse`. A kind is also a name for its first model."""
    if is_dense(spec):
        return "embedding"
    if can_classify(spec) and len(spec.labels) > 2:
        return "classifier"
    return "reranker" if can_rerank(spec) else "classifier" if can_classify(spec) else "sparse"


KINDS = ("embedding", "reranker", "classifier", "sparse")


# -- fields --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refused:
    """A field of the original API that would change the result, and that is not supported.

    why: continues the field's name in the error. neutral: values that ask for nothing and are accepted; null is always one.
    """

    why: str
    neutral: Sequence[object] = ()


class RequestBody(msgspec.Struct, kw_only=True):
    """Base of the body types. Each knows every field of its API: those it has are obeyed, and the others are in its tables.

    refused: fields that would change the result. harmless: fields that would not, with the reason. Any other field is ignored, as
    the APIs themselves do. docs/fields.md is made from these tables.
    """

    refused: ClassVar[Mapping[str, Refused]] = {}
    harmless: ClassVar[Mapping[str, str]] = {}


# -- routes --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class InferenceRoute(Generic[Body, Reply]):
    """``POST path``: a body becomes requests to the engine, and their results become the reply.

    body, reply: their types, from which the OpenAPI document is built. to_requests: may return several requests, or none if
    the body has no input. to_reply: receives the results in the order of the requests. suits: whether a model can serve the
    request; if the body names no model, the first that can is used. model_in_path: whether ``{id:path}`` in the path names the
    model. vectors: whether the reply has one vector per text, so that the setting `on_error` applies. below_base: whether it
    answers only below the base path of its API. texts_per_item: texts per item of the request, two if pairs are compared.
    bytes_per_number: memory per number of a result; JSON_BYTES if the reply has it, 4 in an array. keep_alive: seconds to keep the
    model loaded afterwards, None if the body does not specify it.
    """

    path: str
    summary: str
    body: type[Body]
    reply: Any
    to_requests: Callable[[Body, ServedModel], Sequence[EmbedRequest]]
    to_reply: Callable[[Sequence[EmbedResult], Body, ServedModel], Reply]
    applies: Applies = _always
    keep_alive: Callable[[Body], float | None] = lambda _: None
    suits: Callable[[ModelSpec], bool] = is_dense
    model_in_path: bool = False
    vectors: bool = False
    below_base: bool = False
    texts_per_item: int = 1
    bytes_per_number: int = JSON_BYTES
    method: Literal["POST"] = "POST"


@dataclass(frozen=True, kw_only=True)
class TokenizerRoute(Generic[Body, Reply]):
    """``POST path``: handled with a loaded model's tokenizer and files, without inference."""

    path: str
    summary: str
    body: type[Body]
    reply: Any
    answer: Callable[[Body, ServedModel], Reply]
    applies: Applies = _always
    suits: Callable[[ModelSpec], bool] = lambda _: True
    model_in_path: bool = False
    method: Literal["POST"] = "POST"


@dataclass(frozen=True, kw_only=True)
class ModelQuery(Generic[Reply]):
    """``GET path``: handled with the list of models. ``answer`` receives the ``{id:path}`` in the path, a model's name, or ""."""

    path: str
    summary: str
    reply: Any
    answer: Callable[[ModelListing, str], Reply]
    method: Literal["GET"] = "GET"


@dataclass(frozen=True, kw_only=True)
class ModelCommand(Generic[Body, Reply]):
    """``POST path`` or ``DELETE path``: reads or changes the list of models. An iterator is sent line by line."""

    path: str
    summary: str
    body: type[Body]
    reply: Any
    answer: Callable[[Body, ModelListing], Reply | Iterator[Reply]]
    applies: Applies = _always
    method: Literal["POST", "DELETE"] = "POST"


Route = InferenceRoute[Any, Any] | TokenizerRoute[Any, Any] | ModelQuery[Any] | ModelCommand[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """One API in the form its clients expect.

    base: a path below which its own form answers on paths that several APIs share, such as `/infinity/rerank`.
    error, to_error: the type of its errors, and the function that builds one for an HTTP status. status: HTTP status by error
    kind, for those that differ from STATUS. headers: headers for its clients, in addition to npu-proxy's own.
    """

    name: str
    base: str
    routes: Sequence[Route]
    error: type[msgspec.Struct]
    to_error: Callable[[NpuProxyError, int], msgspec.Struct]
    status: Mapping[str, int] = field(default_factory=dict[str, int])
    headers: Callable[[EmbedResult, EmbedRequest], Mapping[str, str]] = lambda _, __: {}

    def status_of(self, error: NpuProxyError) -> int:
        """Return the HTTP status of an error."""
        return self.status.get(error.kind, STATUS.get(error.kind, 500))


_LONGEST_NAME = 10_000
_UNNAMED = ("", "default/not-specified")
"""Names that clients send if their user names no model: the second one is Infinity's."""


def model_of(body: object) -> str | None:
    """Return the model that a body names, or None."""
    name = getattr(body, "model", None)
    if isinstance(name, msgspec.Raw):
        raw = bytes(name)
        name = msgspec.json.decode(raw) if raw.startswith(b'"') and len(raw) < _LONGEST_NAME else None
    return name if isinstance(name, str) and name not in _UNNAMED else None
