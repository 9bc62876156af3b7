"""The API of OpenVINO Model Server, in addition to OpenAI's: /v3/rerank, /v3/tokenize, /v1/config and others. Source: its API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import msgspec

from npu_proxy.errors import EmptyInputError
from npu_proxy.server.apis.common import StatusError, to_status_error
from npu_proxy.server.apis.contract import Dialect, ModelListing, ModelQuery, Refused, RequestBody, ServedModel, TokenizerRoute
from npu_proxy.server.apis.pooling import pooling_route, score_route
from npu_proxy.server.apis.scoring import rerank_route


class TokenizeBody(RequestBody, kw_only=True):
    """Body of POST /v3/tokenize: one text or several. A `max_length` of 0 or less means no limit."""

    text: str | list[str]
    model: str | None = None
    add_special_tokens: bool | None = None
    max_length: int | None = None

    refused: ClassVar[Mapping[str, Refused]] = {
        "pad_to_max_length": Refused("is not supported; npu-proxy never pads", neutral=(False,)),
        "padding_side": Refused("has no effect without padding", neutral=("right",)),
    }


class TokenLists(msgspec.Struct, kw_only=True):
    """Reply of POST /v3/tokenize: ids, or one list of ids per text if the body had a list."""

    tokens: list[int | list[int]]


def tokenize(body: TokenizeBody, served: ServedModel) -> TokenLists:
    """Return the ids of one text, or of each of several texts."""
    texts = [body.text] if isinstance(body.text, str) else body.text
    if not texts:
        raise EmptyInputError("`text` is empty; send at least one text", param="text")
    token_lists = served.tokenizer.tokens(texts, "", special=body.add_special_tokens is not False)
    limit = body.max_length if body.max_length is not None and body.max_length > 0 else None
    ids = [[token.id for token in tokens][:limit] for tokens in token_lists]
    return TokenLists(tokens=[*ids[0]] if isinstance(body.text, str) else [*ids])


class VersionStatus(msgspec.Struct, kw_only=True):
    """The result of loading a version of a model."""

    error_code: Literal["OK"] = "OK"
    error_message: Literal["OK"] = "OK"


class Version(msgspec.Struct, kw_only=True):
    """A version of a model; npu-proxy has one of each."""

    version: Literal["1"] = "1"
    state: Literal["AVAILABLE", "END"]
    status: VersionStatus


class Versions(msgspec.Struct, kw_only=True):
    """The versions of a model."""

    model_version_status: list[Version]


class Ready(msgspec.Struct, kw_only=True):
    """Reply for a model that can be requested."""

    name: str
    ready: bool


def config(listing: ModelListing, _: str) -> dict[str, Versions]:
    """List the models; those that are loaded are available."""
    return {info.spec.name: _versions(loaded=info.loaded) for info in listing.all()}


def ready(listing: ModelListing, name: str) -> Ready:
    """Return that a model can be requested. Raises UnknownModelError."""
    return Ready(name=listing.find(name).spec.name, ready=True)


def _versions(*, loaded: bool) -> Versions:
    return Versions(model_version_status=[Version(state="AVAILABLE" if loaded else "END", status=VersionStatus())])


def _tokenize_route(path: str) -> TokenizerRoute[TokenizeBody, TokenLists]:
    return TokenizerRoute(path=path, summary="Tokenize texts to ids", body=TokenizeBody, reply=TokenLists, answer=tokenize)


DIALECT = Dialect(
    name="OpenVINO Model Server",
    base="ovms",
    routes=[
        pooling_route("/v3/pooling"),
        score_route("/v3/score"),
        _tokenize_route("/tokenize"),
        _tokenize_route("/v3/tokenize"),
        rerank_route("/v3/rerank"),
        ModelQuery(path="/v1/config", summary="List the models", reply=dict[str, Versions], answer=config),
        ModelQuery(path="/v2/models/{id:path}/ready", summary="Whether a model can be requested", reply=Ready, answer=ready),
    ],
    error=StatusError,
    to_error=to_status_error,
)
