"""What is kept of a device's answer to a text (and cached), what a request wants of that, and chunks put together.

A kind of answer is a case in each of the three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from npu_proxy.engine.similarity import normalize
from npu_proxy.types import Chunk, Embedded, Encoding, Kind, ModelSpec, Span, Vector


def answer_of(spec: ModelSpec, encoding: Encoding, raw: npt.NDArray[np.float32], special: frozenset[int]) -> Vector:
    """What is kept of a device's answer to a text (Embedded.vector). raw: [1, width], or [tokens, width] for token answers.

    special: ids of the tokenizer's special tokens, which have no lexical weight.
    """
    match spec.kind:
        case Kind.DENSE | Kind.SCORES:
            return raw.copy() if encoding.parts else raw[0].copy()
        case Kind.SPARSE:
            (indices,) = np.nonzero(raw[0])
            return np.stack([indices.astype(np.float32), raw[0][indices]], axis=1)
        case Kind.TOKENS:
            sides = spec.sides
            skip = frozenset[int]() if sides is None else sides.skip if encoding.document else sides.query_skip
            return raw[~np.isin(encoding.ids, list(skip))] if skip else raw.copy()
        case Kind.MULTI:
            weights = np.where(np.isin(encoding.ids, list(special)), 0, raw[:, 0])
            return np.concatenate([encoding.ids[:, None], weights[:, None], raw[:, 1:]], axis=1, dtype=np.float32)


def wanted(want: Kind, kind: Kind, vector: Vector) -> Vector:
    """Of what is kept of a text, what a request wants: [width], [entries, 2] or [tokens, width]."""
    if kind is not Kind.MULTI:
        return vector
    if want is Kind.DENSE:
        return vector[0, 2:]
    if want is Kind.TOKENS:
        return vector[1:, 2:]
    return _largest(vector[vector[:, 1] > 0, :2])


def apart(answer: Embedded, encoding: Encoding) -> Sequence[Embedded]:
    """The answers of a text's parts, which were pooled apart, or its one answer."""
    if not encoding.parts:
        return [answer]
    return [
        replace(answer, vector=vector, tokens=stop - start)
        for vector, (start, stop) in zip(answer.vector, encoding.parts, strict=True)
    ]


def combine(spec: ModelSpec, parts: Sequence[Embedded], spans: Sequence[Span], *, pair: bool) -> Embedded:
    """The answer to a text that was read in chunks.

    Vectors: the mean of the chunks' unit vectors, weighted by their tokens. Sparse: the largest weight. Tokens: all of them.
    Scores: of a pair that is ranked those of the best chunk, else the mean of logits, weighted likewise.
    """
    tokens = np.array([part.tokens for part in parts], np.float32)
    share = (tokens / tokens.sum())[:, None]
    vectors = [part.vector for part in parts]
    match spec.kind:
        case Kind.DENSE:
            vector = (normalize(np.stack(vectors)) * share).sum(axis=0, dtype=np.float32)
        case Kind.SPARSE:
            vector = _largest(np.concatenate(vectors))
        case Kind.TOKENS:
            vector = np.concatenate(vectors)
        case Kind.SCORES if pair and len(spec.labels) <= 2:
            logits = np.stack(vectors)
            vector = vectors[int(np.argmax(relevance(logits)))]
        case Kind.SCORES:
            vector = (np.stack(vectors) * share).sum(axis=0, dtype=np.float32)
        case Kind.MULTI:
            first = np.stack([one[0] for one in vectors])
            dense = np.concatenate([first[0, :2], (normalize(first[:, 2:]) * share).sum(axis=0, dtype=np.float32)])
            vector = np.concatenate([dense[None], *[one[1:] for one in vectors]])
    chunks = [Chunk(start, stop, part.tokens, part.vector) for part, (start, stop) in zip(parts, spans, strict=True)]
    devices = ",".join(dict.fromkeys(part.device for part in parts))
    return Embedded(vector, int(tokens.sum()), truncated=any(part.truncated for part in parts), device=devices, chunks=chunks)


def relevance(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """One number a pair [n] of logits [n, labels]: the only one, or of two how far the second is above the first."""
    return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]


def _largest(entries: Vector) -> Vector:
    """Of entries [n, 2] each id once, ascending, with its largest weight."""
    order = np.lexsort([-entries[:, 1], entries[:, 0]])
    entries = entries[order]
    first = np.r_[True, entries[1:, 0] != entries[:-1, 0]] if len(entries) else np.zeros(0, bool)
    return entries[first]
