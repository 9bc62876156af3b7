"""Turn computed results into the response of a request: Matryoshka truncation, L2 norm in float32, output dtype.

Each text is processed independently, so its vector never depends on other texts; this is why int8 has a fixed scale.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from npu_proxy.engine.chunking import requested_chunks
from npu_proxy.engine.outputs import requested_output
from npu_proxy.engine.pending import PendingRequest
from npu_proxy.engine.similarity import normalize
from npu_proxy.spec import ModelSpec
from npu_proxy.types import DType, EmbedRequest, EmbedResult, OutputType, SparseVector, Timings, Vector

Array = npt.NDArray[Any]


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
"""Output dtypes. For normalized v, int8 = round(127 v) and uint8 = int8 + 128. Bits: most significant first, 1 if v >= 0."""


def to_base64(vector: Vector) -> str:
    """Encode a vector as little-endian float32 in padded standard base64, which the OpenAI SDKs decode."""
    return base64.b64encode(vector.astype("<f4", copy=False).tobytes()).decode("ascii")


def cast(vectors: npt.NDArray[np.float32], dtype: DType) -> Array | list[str]:
    """Convert vectors [n, width] float32 to ``dtype``; base64 returns n strings."""
    return [to_base64(vector) for vector in vectors] if dtype is DType.BASE64 else _CASTS[dtype](vectors)


def finish(pending: PendingRequest, spec: ModelSpec) -> EmbedResult:
    """Make the result of a request, each of whose texts has a result or an error."""
    request = pending.request
    sources = [result or encoding for result, encoding in zip(pending.results, pending.encodings, strict=True)]
    return EmbedResult(
        embeddings=_embeddings(pending, spec),
        tokens=[source.tokens if source else 0 for source in sources],
        truncated=[bool(source and source.truncated) for source in sources],
        errors=tuple(pending.errors),
        devices=[result.device if result else "" for result in pending.results],
        cached=pending.cached,
        fallback="; ".join(sorted(pending.fallbacks)),
        fingerprint=spec.fingerprint,
        timings=Timings(
            total=time.monotonic() - pending.submitted_at,
            tokenized=pending.tokenize_seconds,
            queued=pending.queued_seconds,
            infer=pending.infer_seconds,
        ),
        chunks=[requested_chunks(result, request, spec) for result in pending.results] if request.chunking.spans else (),
    )


def _embeddings(pending: PendingRequest, spec: ModelSpec) -> Array | list[str] | list[SparseVector] | list[Vector]:
    request = pending.request
    output_type = request.output_type
    kept = [result and requested_output(output_type, spec.output_type, result.vector) for result in pending.results]
    match output_type:
        case OutputType.SPARSE:
            no_entries = np.zeros([0, 2], np.float32)
            entries = [no_entries if vector is None else vector for vector in kept]
            return [SparseVector(pairs[:, 0].astype(np.int32), pairs[:, 1].copy()) for pairs in entries]
        case OutputType.TOKENS:
            no_tokens = np.zeros([0, request.dimensions or spec.width], np.float32)
            tokens = [no_tokens if vector is None else vector[:, : request.dimensions] for vector in kept]
            return [_CASTS[request.dtype](normalize(vectors) if request.normalize else vectors) for vectors in tokens]
        case _:
            normalized = request.normalize and output_type is OutputType.DENSE
            return _stacked(kept, request, spec.width, normalized=normalized)


def _stacked(kept: Sequence[Vector | None], request: EmbedRequest, width: int, *, normalized: bool) -> Array | list[str]:
    failed = [vector is None for vector in kept]
    vectors = np.stack([np.zeros(width, np.float32) if vector is None else vector for vector in kept])[:, : request.dimensions]
    if normalized:
        vectors = normalize(vectors)
    if any(failed) and request.dtype in (DType.FLOAT32, DType.FLOAT16):
        vectors[failed] = np.nan
    embeddings = cast(vectors, request.dtype)
    if isinstance(embeddings, list):
        return ["" if is_failed else text for text, is_failed in zip(embeddings, failed, strict=True)]
    return embeddings
