"""Quantize existing vectors to int8, uint8 or bits, with ranges calibrated on many vectors; and rescore search results.

The arithmetic is the same as in sentence-transformers' ``quantize_embeddings``, so indexes made by either library can be
searched with the other. It differs from a request's dtypes (engine/finish.py), which treat each text alone and need no ranges.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from npu_proxy.errors import InputError

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
Array = npt.NDArray[Any]
_STEPS = 255


def calibrate(vectors: Array) -> npt.NDArray[np.float32]:
    """Ranges [2, width] float32 of vectors [n, width]: the minimum and maximum of each dimension, extended to include 0.

    Raises InputError if ``vectors`` is not a matrix of finite numbers.
    """
    vectors = _matrix(vectors)
    if not len(vectors):
        raise InputError("there are no vectors to calibrate on", param="vectors")
    return np.vstack([np.minimum(vectors.min(axis=0), 0), np.maximum(vectors.max(axis=0), 0)]).astype(np.float32)


def quantize_embeddings(
    vectors: Array, precision: Precision, *, ranges: Array | None = None, calibration: Array | None = None
) -> Array:
    """Quantize vectors [n, width] to int8 or uint8 [n, width], or to bits, binary or ubinary [n, ceil(width / 8)].

    ranges: from ``calibrate``. calibration: at least a few hundred vectors to compute ranges from. int8 and uint8 need one of
    these; with ranges of ``vectors``, each result would depend on the other vectors. Bits: most significant first, 1 if the
    number is above 0. Raises InputError.
    """
    vectors = _matrix(vectors)
    match precision:
        case "float32":
            return vectors.astype(np.float32)
        case "ubinary":
            return np.packbits(vectors > 0, axis=-1)
        case "binary":
            return (np.packbits(vectors > 0, axis=-1) ^ 0x80).view(np.int8)
        case "int8" | "uint8":
            starts, steps = _grid(ranges, calibration, vectors.shape[1])
            steps_above = np.clip(np.floor((vectors - starts) / steps), 0, _STEPS)
            return steps_above.astype(np.uint8) if precision == "uint8" else (steps_above - 128).astype(np.int8)
        case _:
            raise InputError(f"precision must be float32, int8, uint8, binary or ubinary, not `{precision}`", param="precision")


def dequantize(vectors: Array, *, ranges: Array | None = None, width: int | None = None) -> npt.NDArray[np.float32]:
    """Convert int8 or uint8 vectors (with ``ranges``) or bits (the first ``width``, as 0 and 1) to float32, for rescoring."""
    if width is not None:
        bits: npt.NDArray[np.uint8] = vectors.view(np.uint8)
        if vectors.dtype == np.int8:
            bits = np.bitwise_xor(bits, np.uint8(0x80))
        return np.unpackbits(bits, axis=-1)[..., :width].astype(np.float32)
    starts, steps = _grid(ranges, None, vectors.shape[-1])
    shifted = vectors.astype(np.float64) + (128 if vectors.dtype == np.int8 else 0)
    return (shifted * steps + starts).astype(np.float32)


def rescore(queries: Array, candidates: Array, indices: npt.NDArray[np.integer[Any]], *, top_n: int) -> tuple[Array, Array]:
    """Sort the results of a search over quantized vectors by their dot product with the float32 queries.

    queries: [q, width] float. candidates: [q, k, width] float, from ``dequantize``. indices: [q, k], of the candidates.
    Returns indices [q, top_n] and scores [q, top_n], best first. Raises InputError if the shapes do not match.
    """
    queries = _matrix(queries).astype(np.float32)
    if candidates.shape != (*indices.shape, queries.shape[1]) or len(indices) != len(queries):
        message = f"queries {queries.shape}, candidates {candidates.shape} and indices {indices.shape} do not match"
        raise InputError(message, param="candidates")
    scores = np.einsum("qw,qkw->qk", queries, candidates.astype(np.float32))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top_n]
    return np.take_along_axis(indices, order, 1), np.take_along_axis(scores, order, 1)


def _grid(ranges: Array | None, calibration: Array | None, width: int) -> tuple[Array, Array]:
    """The start and the step size of each dimension's quantization grid."""
    if ranges is None:
        if calibration is None:
            raise InputError("int8 and uint8 need `ranges` (see calibrate) or `calibration` vectors", param="ranges")
        ranges = calibrate(calibration)
    ranges = np.asarray(ranges, np.float32)
    if ranges.shape != (2, width):
        raise InputError(f"ranges must have shape [2, {width}] for these vectors, not {list(ranges.shape)}", param="ranges")
    steps = (ranges[1] - ranges[0]) / _STEPS
    return ranges[0], np.where(steps == 0, np.float32(1), steps)


def _matrix(vectors: Array) -> Array:
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating):
        raise InputError(f"expected floating-point vectors [n, width], got {vectors.dtype} {list(vectors.shape)}", param="vectors")
    if not np.isfinite(vectors).all():
        raise InputError("the vectors contain numbers that are not finite", param="vectors")
    return vectors
