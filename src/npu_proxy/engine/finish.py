"""From full-width vectors to what a request asked for: Matryoshka slice, L2 norm in float32, output type.

Everything here works a text alone, so a vector never depends on its neighbours; int8 has a fixed scale for that reason.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from npu_proxy.errors import InputError
from npu_proxy.types import DType, EmbedRequest, EmbedResult, Ticket, Timings, Vector

Array = npt.NDArray[Any]


def normalize(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Each row [width] over its Euclidean length, in float32; a zero row stays zero.

    The length is summed in float64, where squares of the smallest float32 do not vanish.
    """
    exact = vectors.astype(np.float64)
    lengths = np.sqrt(np.einsum("...i,...i->...", exact, exact)).astype(np.float32)
    return vectors / np.maximum(lengths, _TINY)[..., None]


_TINY = np.finfo(np.float32).tiny


def _int8(vectors: Array) -> Array:
    return np.round(vectors * 127).astype(np.int8)


def _uint8(vectors: Array) -> Array:
    return (np.round(vectors * 127) + 128).astype(np.uint8)


def _ubinary(vectors: Array) -> Array:
    return np.packbits(vectors >= 0, axis=-1)


def _binary(vectors: Array) -> Array:
    return (_ubinary(vectors).astype(np.int16) - 128).astype(np.int8)


_CASTS: dict[DType, Callable[[Array], Array]] = {
    DType.FLOAT32: lambda vectors: vectors,
    DType.FLOAT16: lambda vectors: vectors.astype(np.float16),
    DType.INT8: _int8,
    DType.UINT8: _uint8,
    DType.BINARY: _binary,
    DType.UBINARY: _ubinary,
}
"""Output types. int8 = round(127 v), uint8 = int8 + 128, for normalized v. Bits: most significant first, 1 where v >= 0."""


def to_base64(vector: Vector) -> str:
    """Little-endian float32 in the standard alphabet, padded: what the OpenAI SDKs decode."""
    return base64.b64encode(vector.astype("<f4", copy=False).tobytes()).decode("ascii")


def cast(vectors: npt.NDArray[np.float32], dtype: DType) -> Array | list[str]:
    """Vectors [n, width] float32 as ``dtype``; base64 gives n strings."""
    return [to_base64(vector) for vector in vectors] if dtype is DType.BASE64 else _CASTS[dtype](vectors)


def check_output(request: EmbedRequest, width: int) -> None:
    """Refuse dimensions and types that cannot be; raises InputError naming the field."""
    wanted = request.dimensions
    if wanted is not None and not 1 <= wanted <= width:
        raise InputError(f"dimensions must be between 1 and {width} for this model, not {wanted}", param="dimensions")
    bits = wanted or width
    if request.dtype in (DType.BINARY, DType.UBINARY) and bits % 8:
        raise InputError(f"{request.dtype} needs a width divisible by 8, not {bits}", param="dimensions")
    if request.dtype in (DType.INT8, DType.UINT8) and not request.normalize:
        raise InputError(f"{request.dtype} has a fixed scale for unit vectors; it needs normalize=true", param="normalize")


def finish(ticket: Ticket, *, width: int, fingerprint: str) -> EmbedResult:
    """The result of a ticket whose every text has a vector or an error."""
    request = ticket.request
    failed = [answer is None for answer in ticket.answers]
    vectors = np.stack([np.zeros(width, np.float32) if answer is None else answer.vector for answer in ticket.answers])
    vectors = vectors[:, : request.dimensions]
    if request.normalize:
        vectors = normalize(vectors)
    if any(failed) and request.dtype in (DType.FLOAT32, DType.FLOAT16):
        vectors[failed] = np.nan
    embeddings = cast(vectors, request.dtype)
    if isinstance(embeddings, list):
        embeddings = ["" if bad else text for text, bad in zip(embeddings, failed, strict=True)]
    seen = [answer or encoding for answer, encoding in zip(ticket.answers, ticket.encodings, strict=True)]
    return EmbedResult(
        embeddings=embeddings,
        tokens=[known.tokens if known else 0 for known in seen],
        truncated=[bool(known and known.truncated) for known in seen],
        errors=tuple(ticket.errors),
        devices=[answer.device if answer else "" for answer in ticket.answers],
        cached=ticket.cached,
        fallback="; ".join(sorted(ticket.fallbacks)),
        fingerprint=fingerprint,
        timings=Timings(
            total=time.monotonic() - ticket.submitted_at,
            tokenized=ticket.tokenize_seconds,
            queued=ticket.queued_seconds,
            infer=ticket.infer_seconds,
        ),
    )
