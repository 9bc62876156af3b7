"""The API of OpenVINO Model Server, in addition to OpenAI's: /v3/pooling, /v3/score, /v3/rerank, /v3/tokenize. Source: its API."""

from __future__ import annotations

import msgspec

from npu_proxy.errors import EmptyInputError
from npu_proxy.server.apis.common import StatusError, to_status_error
from npu_proxy.server.apis.contract import Dialect, ServedModel, TokenizerRoute
from npu_proxy.server.apis.pooling import pooling_route, score_route, token_limit
from npu_proxy.server.apis.scoring import rerank_route


class TokenizeBody(msgspec.Struct, kw_only=True):
    """Body of POST /v3/tokenize: one text or several."""

    text: str | list[str]
    model: str | None = None
    add_special_tokens: bool | None = None
    max_length: int | None = None


class TokenLists(msgspec.Struct, kw_only=True):
    """Reply of POST /v3/tokenize: ids, or one list of ids per text if the body had a list."""

    tokens: list[int | list[int]]


def tokenize(body: TokenizeBody, served: ServedModel) -> TokenLists:
    """Return the ids of one text, or of each of several texts."""
    texts = [body.text] if isinstance(body.text, str) else body.text
    if not texts:
        raise EmptyInputError("`text` is empty; send at least one text", param="text")
    token_lists = served.tokenizer.tokens(texts, "", special=body.add_special_tokens is not False)
    ids = [[token.id for token in tokens][: token_limit(body.max_length)] for tokens in token_lists]
    return TokenLists(tokens=[*ids[0]] if isinstance(body.text, str) else [*ids])


def _tokenize_route(path: str) -> TokenizerRoute[TokenizeBody, TokenLists]:
    return TokenizerRoute(path=path, summary="Tokenize texts to ids", body=TokenizeBody, reply=TokenLists, answer=tokenize)


DIALECT = Dialect(
    name="OpenVINO Model Server",
    routes=[
        pooling_route("/v3/pooling"),
        score_route("/v3/score"),
        _tokenize_route("/tokenize"),
        _tokenize_route("/v3/tokenize"),
        rerank_route("/v3/rerank"),
    ],
    error=StatusError,
    to_error=to_status_error,
)
