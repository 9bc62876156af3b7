"""The vLLM API, in addition to OpenAI's: /pooling, /score, /rerank, /classify, /tokenize, /detokenize. Source: its API server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import msgspec

from npu_proxy.engine.scoring import probabilities
from npu_proxy.engine.validation import can_classify
from npu_proxy.server.apis.common import StatusError, Usage, to_status_error
from npu_proxy.server.apis.contract import (
    BodyFields,
    Dialect,
    InferenceRoute,
    Refused,
    RequestBody,
    ServedModel,
    TokenizerRoute,
)
from npu_proxy.server.apis.embeddings import VLLM_HARMLESS, VLLM_REFUSED
from npu_proxy.server.apis.inputs import Inputs, cut_of, text_inputs, token_limit
from npu_proxy.server.apis.pooling import common_fields, pooling_route, score_route
from npu_proxy.server.apis.scoring import rerank_route, to_classify
from npu_proxy.settings import Settings
from npu_proxy.types import EmbedRequest, EmbedResult


class ClassifyBody(RequestBody, kw_only=True):
    """Body of POST /classify in vLLM's format."""

    input: Inputs
    model: str | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None

    refused: ClassVar[Mapping[str, Refused]] = {
        **VLLM_REFUSED,
        "task": Refused("chooses another output; use the route for it", neutral=("classify",)),
    }
    harmless: ClassVar[Mapping[str, str]] = VLLM_HARMLESS


class ClassifiedText(msgspec.Struct, kw_only=True):
    """The most likely label of a text, and the probability of every label."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classification(msgspec.Struct, kw_only=True):
    """Reply of POST /classify in vLLM's format."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ClassifiedText]
    usage: Usage


class TokenizeBody(RequestBody, kw_only=True):
    """Body of POST /tokenize in vLLM's format."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    refused: ClassVar[Mapping[str, Refused]] = {"messages": VLLM_REFUSED["messages"]}


class Tokens(msgspec.Struct, kw_only=True):
    """Reply of POST /tokenize in vLLM's format."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeBody(RequestBody, kw_only=True):
    """Body of POST /detokenize."""

    tokens: list[int]
    model: str | None = None


class Prompt(msgspec.Struct, kw_only=True):
    """Reply of POST /detokenize, with the names of vLLM, llama.cpp and Cohere."""

    prompt: str
    content: str
    text: str


def to_requests(body: ClassifyBody, served: ServedModel) -> list[EmbedRequest]:
    """Return the request to classify texts or token ids. Raises UnsupportedError for a model without labels."""
    cut, limit = cut_of(None, body.truncation_side), token_limit(body.truncate_prompt_tokens)
    return to_classify(served, text_inputs(body.input, served, "input"), cut, limit)


def to_reply(results: Sequence[EmbedResult], body: ClassifyBody, served: ServedModel) -> Classification:
    """Return the probabilities of all labels, in the model's order."""
    labels, (result,) = served.spec.labels, results
    data = [
        ClassifiedText(index=index, label=labels[int(row.argmax())], probs=row.tolist(), num_classes=len(labels))
        for index, row in enumerate(probabilities(served.spec, result, raw=body.use_activation is False))
    ]
    return Classification(data=data, **common_fields(results, served))


def tokenize(body: TokenizeBody, served: ServedModel) -> Tokens:
    """Return the tokens of a text."""
    (tokens,) = served.tokenizer.tokens([body.prompt], "", special=body.add_special_tokens is not False)
    texts = [token.text for token in tokens] if body.return_token_strs else None
    ids = [token.id for token in tokens]
    return Tokens(count=len(ids), max_model_len=served.spec.max_length, tokens=ids, token_strs=texts)


def detokenize(body: DetokenizeBody, served: ServedModel) -> Prompt:
    """Return the text of token ids."""
    text = served.tokenizer.decode(body.tokens, skip_special=False)
    return Prompt(prompt=text, content=text, text=text)


def _classify(path: str) -> InferenceRoute[ClassifyBody, Classification]:
    return InferenceRoute(
        path=path,
        summary="Classify texts (needs a classifier)",
        suits=can_classify,
        body=ClassifyBody,
        reply=Classification,
        to_requests=to_requests,
        to_reply=to_reply,
    )


def _has_prompt(fields: BodyFields, _: Settings) -> bool:
    return fields.has("prompt")


DIALECT = Dialect(
    name="vLLM",
    base="vllm",
    routes=[
        pooling_route("/pooling"),
        score_route("/score"),
        score_route("/v1/score"),
        TokenizerRoute(
            path="/tokenize", summary="Tokenize a text", body=TokenizeBody, reply=Tokens, answer=tokenize, applies=_has_prompt
        ),
        TokenizerRoute(path="/v1/tokenize", summary="Tokenize a text", body=TokenizeBody, reply=Tokens, answer=tokenize),
        *(
            TokenizerRoute(path=path, summary="Decode token ids", body=DetokenizeBody, reply=Prompt, answer=detokenize)
            for path in ("/detokenize", "/v1/detokenize")
        ),
        *(_classify(path) for path in ("/classify", "/v1/classify")),
        *(rerank_route(path) for path in ("/rerank", "/v1/rerank", "/v2/rerank", "/v1/reranks")),
    ],
    error=StatusError,
    to_error=to_status_error,
)
