"""Reranking and classification: the requests they need, and how scores are made from the results. Pure functions.

Both engines and every API use these functions, so all of them return the same scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from npu_proxy.engine.outputs import relevance
from npu_proxy.engine.similarity import max_sim
from npu_proxy.engine.validation import check_ranking, check_reranker
from npu_proxy.errors import UnsupportedError
from npu_proxy.spec import ModelSpec
from npu_proxy.types import (
    DEFAULT_CHUNKING,
    Chunking,
    EmbedRequest,
    EmbedResult,
    Label,
    Lane,
    OutputType,
    Pair,
    RerankResult,
    SparseVector,
    TextInput,
    Truncate,
    Vector,
)

Array = npt.NDArray[np.float32]


# -- rerank --------------------------------------------------------------------------------------------------------------


def rerank_requests(
    spec: ModelSpec,
    query: str,
    documents: Sequence[str],
    *,
    top_n: int | None = None,
    truncate: Truncate = Truncate.END,
    chunking: Chunking = DEFAULT_CHUNKING,
    max_tokens: int | None = None,
    max_document_tokens: int | None = None,
    empty_query: bool = False,
    deadline: float | None = None,
    lane: Lane | None = None,
) -> list[EmbedRequest]:
    """Make the requests for ``rerank_results``: pairs for a cross-encoder, queries and documents for late interaction.

    An empty document is scored like any other; so is an empty query if ``empty_query``, unless the document is empty, too.

    Raises InputError if the input is empty, UnsupportedError if the model cannot rank.
    """
    check_ranking(query, documents, top_n, empty_query=empty_query)
    check_reranker(spec)
    if spec.output_type is OutputType.SCORES:
        texts: Sequence[TextInput] = [Pair(query, document) for document in documents]
        requests = [
            EmbedRequest(
                texts=texts,
                output_type=OutputType.SCORES,
                truncate=truncate,
                chunking=chunking,
                max_document_tokens=max_document_tokens,
            )
        ]
    elif OutputType.TOKENS in spec.output_types:
        # A query is one sequence of vectors, so it is truncated, not chunked.
        query_truncate = Truncate.END if truncate is Truncate.CHUNK else truncate
        requests = [
            EmbedRequest(texts=[query], output_type=OutputType.TOKENS, input_type="query", truncate=query_truncate),
            EmbedRequest(
                texts=documents,
                output_type=OutputType.TOKENS,
                input_type="document",
                truncate=truncate,
                chunking=chunking,
                max_document_tokens=max_document_tokens,
                on_empty="embed",
            ),
        ]
    else:
        message = f"{spec.name} has no head for ranking; set `model` to a cross-encoder or a late-interaction model"
        raise UnsupportedError(message, param="model")
    return [replace(request, max_tokens=max_tokens, deadline=deadline, lane=lane) for request in requests]


def rerank_results(
    spec: ModelSpec, results: Sequence[EmbedResult], *, top_n: int | None = None, raw: bool = False
) -> list[RerankResult]:
    """Rank documents by score, best first; documents with equal scores keep their order.

    A cross-encoder's score is the sigmoid of its logit (with two labels, the second one's probability), or the logit if ``raw``.
    A late-interaction score is the sum of each query token's best cosine (MaxSim, Khattab and Zaharia 2020).
    """
    for result in results:
        result.raise_first()
    if spec.output_type is OutputType.SCORES:
        logits = relevance(np.concatenate([np.asarray(result.embeddings, np.float32) for result in results]))
        scores = logits if raw else sigmoid(logits)
    else:
        query, *documents = (np.asarray(vectors, np.float32) for result in results for vectors in result.embeddings)
        scores = np.array([max_sim(query, document) for document in documents], np.float32)
    return ranked(scores, top_n)


def ranked(scores: Array, top_n: int | None = None) -> list[RerankResult]:
    """Documents by their scores [n], best first; documents with equal scores keep their order."""
    order = np.argsort(-scores, kind="stable")[:top_n]
    return [RerankResult(int(index), float(scores[index])) for index in order]


def sigmoid(logits: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    return (0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))).astype(np.float32)


# -- classify ------------------------------------------------------------------------------------------------------------


def probabilities(spec: ModelSpec, result: EmbedResult, *, raw: bool = False) -> Array:
    """Scores [n, labels]: softmax, or sigmoid if several labels may apply at once; logits if ``raw``."""
    logits = np.asarray(result.raise_first().embeddings, np.float32)
    if raw or spec.activation == "identity":
        return logits
    if spec.activation == "sigmoid":
        return sigmoid(logits)
    exponentials = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64))
    return (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)


def sorted_labels(spec: ModelSpec, scores: Array, top_n: int | None = None) -> list[list[Label]]:
    """The labels of each text, best first."""
    orders = np.argsort(-scores, axis=1, kind="stable")[:, :top_n]
    return [
        [Label(spec.labels[int(index)], float(row[index])) for index in order] for row, order in zip(scores, orders, strict=True)
    ]


# -- vectors of other output types ---------------------------------------------------------------------------------------


def sparse_vectors(result: EmbedResult) -> list[SparseVector]:
    """The sparse vectors of a result. Raises the error of the first text that failed."""
    return [vector for vector in result.raise_first().embeddings if isinstance(vector, SparseVector)]


def token_vectors(result: EmbedResult) -> list[Vector]:
    """The token vectors of a result. Raises the error of the first text that failed."""
    return [np.asarray(vectors) for vectors in result.raise_first().embeddings]
