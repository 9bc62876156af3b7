"""Normalization and similarity of vectors. Pure functions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from npu_proxy.errors import InputError
from npu_proxy.types import Similarity

Array = npt.NDArray[np.float32]

_TINY = np.finfo(np.float32).tiny


def normalize(vectors: Array) -> Array:
    """Divide each row [width] by its Euclidean length, in float32; a zero row stays zero.

    The length is computed in float64, so that squares of the smallest float32 numbers do not become zero.
    """
    exact = vectors.astype(np.float64)
    lengths = np.sqrt(np.einsum("...i,...i->...", exact, exact)).astype(np.float32)
    return vectors / np.maximum(lengths, _TINY)[..., None]


def similarity(left: Array, right: Array, how: Similarity = "cosine") -> Array:
    """Similarity [n, m] of vectors [n, width] and [m, width]; distances are negative, so that larger always means closer.

    The definitions are the same as in sentence-transformers.
    """
    left, right = np.atleast_2d(np.asarray(left, np.float32)), np.atleast_2d(np.asarray(right, np.float32))
    match how:
        case "cosine":
            return normalize(left) @ normalize(right).T
        case "dot":
            return left @ right.T
        case "euclidean":
            return -np.sqrt(np.stack([((row - right).astype(np.float64) ** 2).sum(axis=1) for row in left])).astype(np.float32)
        case "manhattan":
            return -np.stack([np.abs(row - right).sum(axis=1) for row in left])
        case _:
            raise InputError(f"similarity must be cosine, dot, euclidean or manhattan, not `{how}`", param="similarity")


def max_sim(query: Array, document: Array) -> float:
    """Sum over the query's tokens [q, width] of the largest dot product with a token of the document [d, width]."""
    return float((query @ document.T).max(axis=1).sum()) if len(document) else float("-1e9")
