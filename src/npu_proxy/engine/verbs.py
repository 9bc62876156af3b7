"""What rerank, classify and the other verbs ask of an engine, and what they make of its answer. Pure functions.

Both engines and every dialect use these, so that a rank is the same number wherever it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from npu_proxy.engine.answers import relevance
from npu_proxy.engine.similarity import max_sim
from npu_proxy.errors import EmptyInputError, InputError, UnsupportedError
from npu_proxy.types import (
    CHUNKING,
    Chunking,
    EmbedRequest,
    EmbedResult,
    Kind,
    ModelSpec,
    Pair,
    SparseVector,
    TextInput,
    Truncate,
    Vector,
)

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Ranked:
    """A document's place among those that were given, and its score."""

    index: int
    score: float


@dataclass(frozen=True, slots=True)
class Label:
    """A label of a classifier and its score."""

    label: str
    score: float


# -- rerank --------------------------------------------------------------------------------------------------------------


def rank_requests(
    spec: ModelSpec,
    query: str,
    documents: Sequence[str],
    *,
    top_n: int | None = None,
    truncate: Truncate = Truncate.END,
    chunking: Chunking = CHUNKING,
    max_tokens: int | None = None,
    deadline: float | None = None,
) -> list[EmbedRequest]:
    """What to submit so that ``ranking`` can rank: pairs for a cross-encoder, the two sides for late interaction.

    Raises InputError for empty input, UnsupportedError for a model that does not rank.
    """
    _check(top_n)
    if not query:
        raise EmptyInputError("the query is empty", param="query")
    if isinstance(documents, str):
        raise InputError("documents must be a list of texts; put a single one in a list", param="documents")
    if not documents:
        raise EmptyInputError("there is no document to rank", param="documents")
    check_no_classifier(spec)
    if spec.kind is Kind.SCORES:
        texts: Sequence[TextInput] = [Pair(query, document) for document in documents]
        asks = [EmbedRequest(texts=texts, want=Kind.SCORES, truncate=truncate, chunking=chunking)]
    elif Kind.TOKENS in spec.kind.gives:
        # A query is one text, which its encoder cuts.
        whole = Truncate.END if truncate is Truncate.CHUNK else truncate
        asks = [
            EmbedRequest(texts=[query], want=Kind.TOKENS, input_type="query", truncate=whole),
            EmbedRequest(texts=documents, want=Kind.TOKENS, input_type="document", truncate=truncate, chunking=chunking),
        ]
    else:
        message = f"{spec.name} has no head for ranking; that needs a cross-encoder or late interaction (set `model`)"
        raise UnsupportedError(message, param="model")
    return [replace(ask, max_tokens=max_tokens, deadline=deadline) for ask in asks]


def ranks_with(spec: ModelSpec) -> bool:
    """Whether a model ranks: cross-encoders of one label or two, late interaction."""
    return Kind.TOKENS in spec.kind.gives or (spec.kind is Kind.SCORES and len(spec.labels) <= 2)


def classifies(spec: ModelSpec) -> bool:
    """Whether a model is a classifier first of all; one of a single label ranks."""
    return spec.kind is Kind.SCORES and len(spec.labels) > 1


def check_no_classifier(spec: ModelSpec) -> None:
    """Raise UnsupportedError for a model of more than two labels, which do not say how relevant a text is."""
    if len(spec.labels) > 2:
        some = ", ".join(spec.labels[:5])
        raise UnsupportedError(
            f"{spec.name} is a classifier of {len(spec.labels)} labels ({some}), it does not rank", param="model"
        )


def ranking(spec: ModelSpec, results: Sequence[EmbedResult], *, top_n: int | None = None, raw: bool = False) -> list[Ranked]:
    """Documents by falling score; of equal ones the first first.

    A cross-encoder's score is the sigmoid of its logit (of two labels, the share of the second), or with ``raw`` the logit; late
    interaction's is the sum over the query's tokens of the best cosine (MaxSim, Khattab and Zaharia 2020).
    """
    for result in results:
        result.raise_first()
    if spec.kind is Kind.SCORES:
        logits = relevance(np.asarray(results[0].embeddings, np.float32))
        scores = logits if raw else sigmoid(logits)
    else:
        query, *documents = (np.asarray(one, np.float32) for result in results for one in result.embeddings)
        scores = np.array([max_sim(query, document) for document in documents], np.float32)
    order = np.argsort(-scores, kind="stable")[:top_n]
    return [Ranked(int(index), float(scores[index])) for index in order]


def sigmoid(logits: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    return (0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))).astype(np.float32)


def _check(top_n: int | None) -> None:
    if top_n is not None and top_n < 1:
        raise InputError(f"top_n must be at least 1, not {top_n}", param="top_n")


# -- classify ------------------------------------------------------------------------------------------------------------


def check_classifier(spec: ModelSpec, top_n: int | None = None) -> None:
    """Raise UnsupportedError for a model without labels, InputError for no label at all."""
    _check(top_n)
    if spec.kind is not Kind.SCORES:
        raise UnsupportedError(
            f"{spec.name} has no head for classifying; that needs a model for sequence classification", param="model"
        )


def probabilities(spec: ModelSpec, result: EmbedResult, *, raw: bool = False) -> Array:
    """Scores [n, labels]: softmax, or sigmoid where several labels may hold at once; logits with ``raw``."""
    logits = np.asarray(result.raise_first().embeddings, np.float32)
    if raw or spec.activation == "identity":
        return logits
    if spec.activation == "sigmoid":
        return sigmoid(logits)
    grown = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64))
    return (grown / grown.sum(axis=1, keepdims=True)).astype(np.float32)


def labels(spec: ModelSpec, scores: Array, top_n: int | None = None) -> list[list[Label]]:
    """Of each text the labels by falling score."""
    orders = np.argsort(-scores, axis=1, kind="stable")[:, :top_n]
    return [
        [Label(spec.labels[int(index)], float(row[index])) for index in order] for row, order in zip(scores, orders, strict=True)
    ]


def sparse_of(result: EmbedResult) -> list[SparseVector]:
    """The sparse answers of a request."""
    return [one for one in result.raise_first().embeddings if isinstance(one, SparseVector)]


def tokens_of(result: EmbedResult) -> list[Vector]:
    """The token answers of a request."""
    return [np.asarray(one) for one in result.raise_first().embeddings]
