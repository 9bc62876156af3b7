"""From full-width vectors to what a request asked for: Matryoshka slice, L2 norm in float32, output type.

Everything here works a text alone, so a vector never depends on its neighbours; int8 has a fixed scale for that reason.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from npu_proxy.engine.answers import wanted
from npu_proxy.engine.similarity import normalize
from npu_proxy.errors import InputError, UnsupportedError
from npu_proxy.types import (
    Chunk,
    DType,
    Embedded,
    EmbedRequest,
    EmbedResult,
    Kind,
    ModelSpec,
    SparseVector,
    Ticket,
    Timings,
    Vector,
)

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
"""Output types. int8 = round(127 v), uint8 = int8 + 128, for normalized v. Bits: most significant first, 1 where v >= 0."""


def to_base64(vector: Vector) -> str:
    """Little-endian float32 in the standard alphabet, padded: what the OpenAI SDKs decode."""
    return base64.b64encode(vector.astype("<f4", copy=False).tobytes()).decode("ascii")


def cast(vectors: npt.NDArray[np.float32], dtype: DType) -> Array | list[str]:
    """Vectors [n, width] float32 as ``dtype``; base64 gives n strings."""
    return [to_base64(vector) for vector in vectors] if dtype is DType.BASE64 else _CASTS[dtype](vectors)


def check_output(request: EmbedRequest, spec: ModelSpec) -> None:
    """Refuse what the model does not give, and dimensions and types that cannot be; raises InputError naming the field."""
    want = request.want
    if want not in spec.kind.gives:
        raise UnsupportedError(_instead(spec, want), param="model")
    wanted, width = request.dimensions, spec.width
    if want in (Kind.SPARSE, Kind.SCORES):
        if wanted is not None or request.dtype is not DType.FLOAT32:
            raise InputError(f"{want} answers are float32 and have no dimensions to choose", param="dimensions")
        return
    if want is Kind.TOKENS and request.dtype not in (DType.FLOAT32, DType.FLOAT16):
        raise InputError(f"vectors of tokens are float32 or float16, not {request.dtype}", param="dtype")
    if wanted is not None and not 1 <= wanted <= width:
        raise InputError(f"dimensions must be between 1 and {width} for this model, not {wanted}", param="dimensions")
    bits = wanted or width
    if request.dtype in (DType.BINARY, DType.UBINARY) and bits % 8:
        raise InputError(f"{request.dtype} needs a width divisible by 8, not {bits}", param="dimensions")
    if request.dtype in (DType.INT8, DType.UINT8) and not request.normalize:
        raise InputError(f"{request.dtype} has a fixed scale for unit vectors; it needs normalize=true", param="normalize")


_GIVES = {
    Kind.DENSE: "gives a vector a text",
    Kind.SPARSE: "gives sparse vectors",
    Kind.TOKENS: "gives a vector a token",
    Kind.SCORES: "scores texts (it ranks or classifies)",
    Kind.MULTI: "gives dense, sparse and token vectors",
}
_WANTS = {Kind.DENSE: "dense vectors", Kind.SPARSE: "sparse vectors", Kind.TOKENS: "vectors of tokens", Kind.SCORES: "scores"}
_CURES = {
    Kind.TOKENS: " (with the setting `pooling` at `none` a dense model gives them)",
    Kind.SPARSE: " (bge-m3 gives them with the setting `pooling` at `none`)",
}


def _instead(spec: ModelSpec, want: Kind) -> str:
    cure = _CURES.get(want, "") if spec.kind is Kind.DENSE else ""
    return f"{spec.name} {_GIVES[spec.kind]}; it has no head for {_WANTS.get(want, want)}{cure}"


def finish(ticket: Ticket, spec: ModelSpec) -> EmbedResult:
    """The result of a ticket whose every text has an answer or an error."""
    request = ticket.request
    want = request.want
    kept = [None if answer is None else wanted(want, spec.kind, answer.vector) for answer in ticket.answers]
    embeddings: Array | list[str] | list[SparseVector] | list[Vector]
    match want:
        case Kind.SPARSE:
            empty = np.zeros([0, 2], np.float32)
            found = [empty if one is None else one for one in kept]
            embeddings = [SparseVector(one[:, 0].astype(np.int32), one[:, 1].copy()) for one in found]
        case Kind.TOKENS:
            nothing = np.zeros([0, request.dimensions or spec.width], np.float32)
            found = [nothing if one is None else one[:, : request.dimensions] for one in kept]
            embeddings = [_CASTS[request.dtype](normalize(one) if request.normalize else one) for one in found]
        case _:
            embeddings = _stacked(kept, request, spec.width, normalized=request.normalize and want is Kind.DENSE)
    seen = [answer or encoding for answer, encoding in zip(ticket.answers, ticket.encodings, strict=True)]
    return EmbedResult(
        embeddings=embeddings,
        tokens=[known.tokens if known else 0 for known in seen],
        truncated=[bool(known and known.truncated) for known in seen],
        errors=tuple(ticket.errors),
        devices=[answer.device if answer else "" for answer in ticket.answers],
        cached=ticket.cached,
        fallback="; ".join(sorted(ticket.fallbacks)),
        fingerprint=spec.fingerprint,
        timings=Timings(
            total=time.monotonic() - ticket.submitted_at,
            tokenized=ticket.tokenize_seconds,
            queued=ticket.queued_seconds,
            infer=ticket.infer_seconds,
        ),
        chunks=[_chunks(answer, request, spec) for answer in ticket.answers] if request.chunking.spans else (),
    )


def _chunks(answer: Embedded | None, request: EmbedRequest, spec: ModelSpec) -> Sequence[Chunk]:
    """A text's chunks, dense vectors of them as that of the text: cut to the dimensions, and of length 1 where asked for."""
    found: list[Chunk] = []
    for chunk in answer.chunks if answer else ():
        vector = wanted(request.want, spec.kind, chunk.vector)
        if request.want is Kind.DENSE:
            vector = vector[: request.dimensions]
            vector = normalize(vector[None])[0] if request.normalize else vector
        found.append(replace(chunk, vector=vector))
    return found


def _stacked(kept: Sequence[Vector | None], request: EmbedRequest, width: int, *, normalized: bool) -> Array | list[str]:
    failed = [one is None for one in kept]
    vectors = np.stack([np.zeros(width, np.float32) if one is None else one for one in kept])[:, : request.dimensions]
    if normalized:
        vectors = normalize(vectors)
    if any(failed) and request.dtype in (DType.FLOAT32, DType.FLOAT16):
        vectors[failed] = np.nan
    embeddings = cast(vectors, request.dtype)
    if isinstance(embeddings, list):
        return ["" if bad else text for text, bad in zip(embeddings, failed, strict=True)]
    return embeddings
