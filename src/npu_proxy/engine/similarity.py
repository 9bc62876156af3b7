"""Unit vectors, and how alike vectors are. Pure functions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from npu_proxy.errors import InputError
from npu_proxy.types import Similarity

Array = npt.NDArray[np.float32]

_TINY = np.finfo(np.float32).tiny


def normalize(vectors: Array) -> Array:
    """Each row [width] over its Euclidean length, in float32; a zero row stays zero.

    The length is summed in float64, where squares of the smallest float32 do not vanish.
    """
    exact = vectors.astype(np.float64)
    lengths = np.sqrt(np.einsum("...i,...i->...", exact, exact)).astype(np.float32)
    return vectors / np.maximum(lengths, _TINY)[..., None]


def similarity(one: Array, other: Array, how: Similarity = "cosine") -> Array:
    """How alike vectors [n, width] and [m, width] are, [n, m]; distances are negative, so that larger is always closer.

    The definitions are those of sentence-transformers.
    """
    one, other = np.atleast_2d(np.asarray(one, np.float32)), np.atleast_2d(np.asarray(other, np.float32))
    match how:
        case "cosine":
            return normalize(one) @ normalize(other).T
        case "dot":
            return one @ other.T
        case "euclidean":
            return -np.sqrt(np.stack([((row - other).astype(np.float64) ** 2).sum(axis=1) for row in one])).astype(np.float32)
        case "manhattan":
            return -np.stack([np.abs(row - other).sum(axis=1) for row in one])
        case _:
            raise InputError(f"similarity must be cosine, dot, euclidean or manhattan, not `{how}`", param="similarity")


def max_sim(query: Array, document: Array) -> float:
    """Sum over the query's tokens [q, width] of the largest product with a token of the document [d, width]."""
    return float((query @ document.T).max(axis=1).sum()) if len(document) else float("-1e9")
