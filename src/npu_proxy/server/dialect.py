"""What a dialect consists of: body types, to_request, to_response, to_error. app.py does everything else once for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from npu_proxy.engine.tokenize import TextEncoder
from npu_proxy.errors import EmptyInputError, InputError, ModelNotFoundError, NpuProxyError
from npu_proxy.models.store import StoredModel
from npu_proxy.settings import Settings
from npu_proxy.types import EmbedRequest, EmbedResult, Kind, ModelSpec, TextInput

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
    "not_found": 404,
    "not_allowed": 405,
    "too_large": 413,
    "model": 500,
    "gone": 499,
    "pull": 502,
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


class ForbiddenError(InputError):
    """The route is switched off."""

    kind = "forbidden"


class NothingHereError(InputError):
    """No route has this path."""

    kind = "not_found"


class NotAllowedError(InputError):
    """The path has no such method."""

    kind = "not_allowed"


class UnknownModelError(ModelNotFoundError):
    """A request names a ``model`` that is not served."""

    def __init__(self, model: str) -> None:
        shown = model if len(model) <= 200 else f"{model[:200]}..."
        super().__init__(f"The model `{shown}` does not exist here; GET /v1/models lists those that do.", param="model")
        self.model = shown


@dataclass(frozen=True, kw_only=True)
class Card:
    """A model that can be asked: what it is, since when (Unix seconds), and whether it is loaded and until when.

    names: further ones by which clients may ask. expires: Unix seconds when it will be unloaded; None: never, or not loaded.
    """

    spec: ModelSpec
    since: int
    names: Sequence[str] = ()
    loaded: bool = True
    expires: float | None = None

    @property
    def size(self) -> int:
        """Bytes of its weights."""
        return sum(file.stat().st_size for file in self.spec.weight_files)

    @property
    def parameters(self) -> int:
        """Numbers in its weights, counted as float32."""
        return self.size // 4


class Foreign(Protocol):
    """Turns token ids of another vocabulary into text (models/cl100k.py)."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text. Raises InputError for an id that it does not have."""
        ...


@dataclass(frozen=True, kw_only=True)
class Served:
    """A loaded model and its tokenizer while a request uses it. asked: its name as the client said it, or its own.

    load_seconds: what the request waited for the model to be loaded.
    foreign: gives the decoder of cl100k_base ids; raises InputError with the cure where it was never pulled.
    """

    spec: ModelSpec
    encoder: TextEncoder
    settings: Settings
    asked: str
    load_seconds: float
    foreign: Callable[[], Foreign]


class Shelf(Protocol):
    """The models of the server, without loading any. ``cards`` and ``find`` may read files."""

    @property
    def settings(self) -> Settings: ...

    @property
    def default(self) -> Card:
        """The first model. Raises StoppedError while it loads."""
        ...

    def cards(self) -> Sequence[Card]:
        """Every model that can be asked, loaded ones first."""
        ...

    def find(self, name: str | None) -> Card:
        """The model of that name or alias, the first one without a name. Raises UnknownModelError."""
        ...

    def pull(self, name: str, report: Callable[[str], None]) -> StoredModel:
        """Fetch a model into the store. Raises InputError, PullError."""
        ...

    def delete(self, name: str) -> None:
        """Remove a model from the store, and unload it. Raises UnknownModelError, ForbiddenError, UnavailableError."""
        ...


ToRequest = Callable[[Any, Served], Any]
"""Body to EmbedRequest, or to a list of them where several make an answer; whatever else it returns is the answer."""
ToResponse = Callable[[Any, Any, Served], Any]
"""EmbedResult (or a list of them), body and model to the answer."""


class Fields(msgspec.Struct):
    """The fields by which dialects tell their bodies apart, as their JSON stands; empty where a body has none of that name."""

    inputs: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    text: msgspec.Raw = msgspec.Raw()
    texts: msgspec.Raw = msgspec.Raw()
    documents: msgspec.Raw = msgspec.Raw()

    def has(self, name: str) -> bool:
        """Whether the body has that field."""
        return bool(bytes(getattr(self, name)))


When = Callable[[Fields, Settings], bool]
"""For a path that several dialects have, whether a body is a route's; the first that says yes gets it."""


def model_of(body: Any) -> str | None:
    """The model a body names."""
    return getattr(body, "model", None)


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """``POST path`` takes a ``body``, becomes an EmbedRequest, and answers with a ``response`` (any type JSON can hold).

    keep_alive: seconds that the request wants its model to stay loaded afterwards, None where it does not say.
    """

    path: str
    summary: str
    body: type[msgspec.Struct]
    response: Any
    to_request: ToRequest
    to_response: ToResponse
    when: When = lambda _, __: True
    keep_alive: Callable[[Any], float | None] = lambda _: None
    fits: Callable[[ModelSpec], bool] = lambda spec: Kind.DENSE in spec.kind.gives
    """Whether a model can answer: of those that stay loaded, the first that can does where a body names none."""
    sides: int = 1
    """Texts that an item of the request has: two where pairs are compared."""
    method: Literal["POST"] = "POST"


@dataclass(frozen=True, kw_only=True)
class Action:
    """``POST path`` takes a ``body`` and is answered by a loaded model's tokenizer and files, without inference."""

    path: str
    summary: str
    body: type[msgspec.Struct]
    response: Any
    answer: Callable[[Any, Served], Any]
    when: When = lambda _, __: True
    method: Literal["POST"] = "POST"


@dataclass(frozen=True, kw_only=True)
class Query:
    """``GET path`` is answered from the shelf; ``{id:path}`` in the path is passed on, a name or ''."""

    path: str
    summary: str
    response: Any
    answer: Callable[[Shelf, str], Any]
    method: Literal["GET"] = "GET"


@dataclass(frozen=True, kw_only=True)
class Order:
    """``POST path`` (or another method) takes a ``body`` and is answered from the shelf. An iterator is sent line by line."""

    path: str
    summary: str
    body: type[msgspec.Struct]
    response: Any
    answer: Callable[[Any, Shelf], Any | Iterator[Any]]
    when: When = lambda _, __: True
    method: Literal["POST", "DELETE"] = "POST"


Route = Endpoint | Action | Query | Order


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """One API as its clients know it."""

    name: str
    routes: Sequence[Route]
    error: type[msgspec.Struct]
    to_error: Callable[[NpuProxyError, int], msgspec.Struct]
    status: Mapping[str, int] = field(default_factory=dict[str, int])
    """Where this dialect's status differs from STATUS."""
    headers: Callable[[EmbedResult, EmbedRequest], Mapping[str, str]] = lambda _, __: {}
    """Headers that its clients read, beside npu-proxy's own."""

    def status_of(self, error: NpuProxyError) -> int:
        """The HTTP status of an error."""
        return self.status.get(error.kind, STATUS.get(error.kind, 500))


def header_text(text: str) -> str:
    """Text as a header's value can be: one line of printable ASCII, not too long."""
    return "".join(character if " " <= character <= "~" else "?" for character in text)[:400]


def floats(result: EmbedResult) -> npt.NDArray[np.float32]:
    """The vectors [n, width] of a request for float32."""
    return np.asarray(result.embeddings, np.float32)


def text_inputs(given: str | Sequence[str | int | list[int]], served: Served, param: str) -> list[TextInput]:
    """One text, texts, token ids, or lists of token ids; not a mixture. Raises InputError naming ``param``."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise EmptyInputError(f"`{param}` is empty; send at least one text.", param=param)
    kinds = {type(item) for item in given}
    if len(kinds) > 1:
        raise InputError(f"`{param}` mixes texts and token ids; send one kind.", param=param)
    (kind,) = kinds
    if kind is str:
        return [item for item in given if isinstance(item, str)]
    lists = [[item for item in given if isinstance(item, int)]] if kind is int else [one for one in given if isinstance(one, list)]
    return _token_lists(lists, served)


_OPENAI = "text-embedding-"
"""How the names of OpenAI's models begin; their clients send ids of cl100k_base."""
_LOOKED_AT = 32
"""Lists that are tokenized again to see whose they are."""
_SURE = 8
"""Ids from which on a tokenizer's own can be told from another's; of fewer, one in seven is taken wrongly (docs/adr/0009)."""


def _token_lists(lists: list[list[int]], served: Served) -> list[TextInput]:
    """Token ids as the setting `token_ids` reads them: the model's own, or the text of cl100k_base ids."""
    how = served.settings.token_ids
    if how == "reject":
        raise InputError("this server takes no token ids (setting `token_ids`); send text.", param="input")
    most = served.settings.max_client_batch
    if len(lists) > most:
        raise InputError(f"the request has {len(lists)} texts; at most {most} are allowed (`max_client_batch`)")
    if not all(lists):
        raise EmptyInputError("a list of token ids is empty; send at least one.", param="input")
    if how == "auto":
        how = "cl100k" if served.asked.startswith(_OPENAI) else _whose(lists, served.encoder)
    if how == "model":
        return list(lists)
    foreign = served.foreign()
    return [foreign.decode(ids) for ids in lists]


def _whose(lists: list[list[int]], encoder: TextEncoder) -> Literal["model", "cl100k"]:
    """Whose ids they are. Raises InputError where they may be either's: a guess would give wrong vectors without a word."""
    if not all(map(encoder.owns, lists[:_LOOKED_AT])) or not all(0 <= max(ids) < encoder.vocabulary for ids in lists):
        return "cl100k"
    if max(map(len, lists)) >= _SURE:
        return "model"
    raise InputError(
        "so few token ids may be this model's own or cl100k_base's, as langchain-openai sends them"
        " (check_embedding_ctx_length=False sends text); send text, or set `token_ids` to `model` or `cl100k`",
        param="input",
    )
