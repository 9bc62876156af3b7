"""The dialects of vLLM and OpenVINO Model Server beside OpenAI's: /pooling, /score, /tokenize. Source: their API servers."""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

import msgspec

from npu_proxy.engine.answers import relevance
from npu_proxy.engine.verbs import check_classifier, check_no_classifier, classifies, probabilities, ranks_with, sigmoid
from npu_proxy.errors import EmptyInputError, InputError
from npu_proxy.server.cohere import Ranking, RerankBody, to_rank_request, to_ranking
from npu_proxy.server.dialect import Action, Dialect, Endpoint, Fields, Served, floats, text_inputs
from npu_proxy.server.infinity import Error, to_error
from npu_proxy.server.openai import Usage
from npu_proxy.settings import Settings
from npu_proxy.types import DType, EmbedRequest, EmbedResult, Kind, Pair


class Classified(msgspec.Struct, kw_only=True):
    """The likeliest label of a text, and the share of every label."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classification(msgspec.Struct, kw_only=True):
    """Answer of POST /classify as vLLM has it."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classified]
    usage: Usage


class PoolingBody(msgspec.Struct, kw_only=True):
    """Body of POST /pooling. truncate_prompt_tokens: -1 is the model's own limit."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] | None = None
    normalize: bool | None = None
    truncate_prompt_tokens: int | None = None


class Pooled(msgspec.Struct, kw_only=True):
    """One vector."""

    index: int
    object: Literal["pooling"] = "pooling"
    data: list[float] | str


class Pooling(msgspec.Struct, kw_only=True):
    """Answer of POST /pooling."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Pooled]
    usage: Usage


class ScoreBody(msgspec.Struct, kw_only=True):
    """Body of POST /score: one text against many, or pairs; the fields have two names each."""

    model: str | None = None
    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None
    truncate_prompt_tokens: int | None = None


class Score(msgspec.Struct, kw_only=True):
    """How alike a pair is: the cosine of its vectors, since the model embeds."""

    index: int
    object: Literal["score"] = "score"
    score: float


class Scores(msgspec.Struct, kw_only=True):
    """Answer of POST /score."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: Usage


class TokenizeBody(msgspec.Struct, kw_only=True):
    """Body of POST /tokenize as vLLM has it."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class Tokens(msgspec.Struct, kw_only=True):
    """Answer of POST /tokenize as vLLM has it."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """Body of POST /detokenize."""

    tokens: list[int]
    model: str | None = None


class Prompt(msgspec.Struct, kw_only=True):
    """Answer of POST /detokenize."""

    prompt: str


class TextBody(msgspec.Struct, kw_only=True):
    """Body of POST /v3/tokenize of the Model Server: a text or texts."""

    text: str | list[str]
    model: str | None = None
    add_special_tokens: bool | None = None
    max_length: int | None = None


class TextTokens(msgspec.Struct, kw_only=True):
    """Answer of POST /v3/tokenize: ids, a list a text where there were several."""

    tokens: list[int | list[int]]


class ClassifyBody(msgspec.Struct, kw_only=True):
    """Body of POST /classify as vLLM has it."""

    input: str | list[str | int]
    model: str | None = None


def to_pooling(body: PoolingBody, served: Served) -> EmbedRequest:
    """Texts or token ids."""
    return EmbedRequest(
        texts=text_inputs(body.input, served, "input"),
        dimensions=body.dimensions,
        normalize=body.normalize is not False,
        max_tokens=_limit(body.truncate_prompt_tokens),
        dtype=DType.BASE64 if body.encoding_format == "base64" else DType.FLOAT32,
    )


def from_pooling(result: EmbedResult, _: PoolingBody, served: Served) -> Pooling:
    """The vectors in their order."""
    vectors: list[Any] = result.embeddings if isinstance(result.embeddings, list) else result.embeddings.tolist()
    return Pooling(data=[Pooled(index=index, data=vector) for index, vector in enumerate(vectors)], **_common(result, served))


def to_score(body: ScoreBody, served: Served) -> EmbedRequest:
    """The left texts, then the right ones; for a cross-encoder each pair. Raises InputError where they do not pair."""
    check_no_classifier(served.spec)
    left, right = _sides(body)
    limit = _limit(body.truncate_prompt_tokens)
    if served.spec.kind is Kind.SCORES:
        pairs = [Pair(left[index if len(left) > 1 else 0], one) for index, one in enumerate(right)]
        return EmbedRequest(texts=pairs, want=Kind.SCORES, max_tokens=limit)
    return EmbedRequest(texts=[*left, *right], max_tokens=limit)


def from_score(result: EmbedResult, body: ScoreBody, served: Served) -> Scores:
    """A cosine a pair, or what the cross-encoder says."""
    if served.spec.kind is Kind.SCORES:
        found = sigmoid(relevance(floats(result)))
        return Scores(data=[Score(index=index, score=float(one)) for index, one in enumerate(found)], **_common(result, served))
    left = len(_sides(body)[0])
    vectors = floats(result)
    cosines = (vectors[:left] * vectors[left:]).sum(axis=1)  # one on the left goes with each on the right
    return Scores(data=[Score(index=index, score=float(one)) for index, one in enumerate(cosines)], **_common(result, served))


def to_classify(body: ClassifyBody, served: Served) -> EmbedRequest:
    """Texts or token ids. Raises UnsupportedError for a model without labels."""
    check_classifier(served.spec)
    return EmbedRequest(texts=text_inputs(body.input, served, "input"), want=Kind.SCORES)


def from_classify(result: EmbedResult, _: ClassifyBody, served: Served) -> Classification:
    """The shares of all labels, in the model's order."""
    labels = served.spec.labels
    rows = probabilities(served.spec, result)
    data = [
        Classified(index=index, label=labels[int(row.argmax())], probs=row.tolist(), num_classes=len(labels))
        for index, row in enumerate(rows)
    ]
    return Classification(data=data, **_common(result, served))


def tokenize(body: TokenizeBody, served: Served) -> Tokens:
    """The tokens of a text."""
    (tokens,) = served.encoder.tokens([body.prompt], "", special=body.add_special_tokens is not False)
    texts = [token.text for token in tokens] if body.return_token_strs else None
    ids = [token.id for token in tokens]
    return Tokens(count=len(ids), max_model_len=served.spec.max_length, tokens=ids, token_strs=texts)


def tokenize_text(body: TextBody, served: Served) -> TextTokens:
    """The ids of a text, or of each of several."""
    texts = [body.text] if isinstance(body.text, str) else body.text
    if not texts:
        raise EmptyInputError("`text` is empty; send at least one text", param="text")
    found = served.encoder.tokens(texts, "", special=body.add_special_tokens is not False)
    ids = [[token.id for token in tokens][: _limit(body.max_length)] for tokens in found]
    return TextTokens(tokens=[*ids[0]] if isinstance(body.text, str) else [*ids])


def detokenize(body: DetokenizeBody, served: Served) -> Prompt:
    """The text of token ids."""
    return Prompt(prompt=served.encoder.decode(body.tokens, skip_special=False))


def _sides(body: ScoreBody) -> tuple[list[str], list[str]]:
    sides: list[list[str]] = []
    for names, given in (
        ("`queries` (or `text_1`)", body.queries or body.text_1),
        ("`documents` (or `text_2`)", body.documents or body.text_2),
    ):
        if not given:
            raise InputError(f"{names} is missing or empty", param=names.split("`")[1])
        sides.append([given] if isinstance(given, str) else given)
    left, right = sides
    if len(left) not in (1, len(right)):
        raise InputError(f"{len(left)} texts cannot be paired with {len(right)}; give one, or as many", param="queries")
    return left, right


def _has_prompt(fields: Fields, _: Settings) -> bool:
    return fields.has("prompt")


def _limit(tokens: int | None) -> int | None:
    return tokens if tokens is not None and tokens > 0 else None


def _common(result: EmbedResult, served: Served) -> dict[str, Any]:
    tokens = sum(result.tokens)
    usage = Usage(prompt_tokens=tokens, total_tokens=tokens)
    return {"id": f"npu-proxy-{uuid.uuid4().hex}", "created": int(time.time()), "model": served.asked, "usage": usage}


DIALECT = Dialect(
    name="vLLM and OpenVINO Model Server",
    routes=[
        *(
            Endpoint(
                path=path,
                summary="Embed texts",
                body=PoolingBody,
                response=Pooling,
                to_request=to_pooling,
                to_response=from_pooling,
            )
            for path in ("/pooling", "/v3/pooling")
        ),
        *(
            Endpoint(
                path=path,
                summary="How alike pairs of texts are",
                fits=lambda spec: spec.kind is Kind.SCORES or Kind.DENSE in spec.kind.gives,
                body=ScoreBody,
                response=Scores,
                to_request=to_score,
                to_response=from_score,
                sides=2,
            )
            for path in ("/score", "/v1/score", "/v3/score")
        ),
        *(
            Action(path=path, summary="Tokens of a text", body=TokenizeBody, response=Tokens, answer=tokenize, when=_has_prompt)
            for path in ("/tokenize", "/v1/tokenize")
        ),
        *(
            Action(path=path, summary="Token ids of texts", body=TextBody, response=TextTokens, answer=tokenize_text)
            for path in ("/tokenize", "/v3/tokenize")
        ),
        Action(path="/detokenize", summary="Text of token ids", body=DetokenizeBody, response=Prompt, answer=detokenize),
        Endpoint(
            path="/classify",
            summary="Classify (needs a classifier)",
            fits=classifies,
            body=ClassifyBody,
            response=Classification,
            to_request=to_classify,
            to_response=from_classify,
        ),
        Endpoint(
            path="/v3/rerank",
            summary="Rank documents (needs a reranker)",
            fits=ranks_with,
            body=RerankBody,
            response=Ranking,
            to_request=to_rank_request,
            to_response=to_ranking,
        ),
    ],
    error=Error,
    to_error=to_error,
)
