"""What a job computes, as Arrow columns. An output is one function and one row of a table."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from npu_proxy.engine.finish import cast as as_dtype
from npu_proxy.engine.options import RequestOptions
from npu_proxy.engine.outputs import relevance
from npu_proxy.engine.scoring import probabilities, sigmoid, sorted_labels
from npu_proxy.spec import ModelSpec
from npu_proxy.types import DType, EmbedResult, OutputType, SparseVector, TextInput

OutputName = Literal["dense", "sparse", "tokens", "labels", "relevance"]
_ELEMENTS = {
    DType.FLOAT32: pa.float32(),
    DType.FLOAT16: pa.float16(),
    DType.INT8: pa.int8(),
    DType.UINT8: pa.uint8(),
    DType.BINARY: pa.int8(),
    DType.UBINARY: pa.uint8(),
}
SPARSE = pa.struct([pa.field("indices", pa.list_(pa.int32())), pa.field("values", pa.list_(pa.float32()))])
LABELS = pa.list_(pa.struct([pa.field("label", pa.string()), pa.field("score", pa.float32())]))
CHUNKS = "chunks"
"""A list of chunks per text; writers make a row of each."""


@dataclass(frozen=True, kw_only=True)
class ColumnOptions:
    """name: of the column of vectors. per_chunk: a vector per chunk of a long text. top_n, raw: of labels and scores."""

    name: str = "embedding"
    per_chunk: bool = False
    top_n: int | None = None
    raw: bool = False


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns that a job adds to its rows. arrays: one per field, null where a text failed.

    output_type: what the engine is asked for. vector: the name of the column of vectors, also if rows are chunks.
    """

    fields: Sequence[pa.Field]
    arrays: Callable[[Sequence[TextInput], EmbedResult], Sequence[pa.Array]]
    output_type: OutputType
    vector: str = ""

    def table(self, texts: Sequence[TextInput], result: EmbedResult) -> pa.Table:
        """The columns of a result, and how many tokens each text has and whether it was truncated."""
        bad = _failed(result)
        counts = [
            pa.array(np.asarray(result.tokens, np.int32), mask=bad),
            pa.array(np.asarray(result.truncated, np.bool_), mask=bad),
        ]
        return pa.table([*self.arrays(texts, result), *counts], schema=self.schema)

    @property
    def schema(self) -> pa.Schema:
        """All columns that are computed."""
        return pa.schema([*self.fields, pa.field("tokens", pa.int32()), pa.field("truncated", pa.bool_())])


def columns_of(output: OutputName, spec: ModelSpec, request: RequestOptions, options: ColumnOptions) -> Columns:
    """The columns of an output of a model."""
    return OUTPUTS[output](spec, request, options)


def _dense(spec: ModelSpec, request: RequestOptions, options: ColumnOptions) -> Columns:
    dtype = DType(request.get("dtype", DType.FLOAT32))
    width = request.get("dimensions") or spec.width
    if dtype is DType.BASE64:
        vector: pa.DataType = pa.string()
    else:
        vector = pa.list_(_ELEMENTS[dtype], width // 8 if dtype in (DType.BINARY, DType.UBINARY) else width)

    if not options.per_chunk:
        return Columns(
            fields=[pa.field(options.name, vector)],
            arrays=lambda _, result: [_vectors(result.embeddings, _failed(result), vector)],
            output_type=OutputType.DENSE,
            vector=options.name,
        )
    chunk = pa.struct(
        [
            pa.field("start", pa.int32()),
            pa.field("stop", pa.int32()),
            pa.field("chunk_text", pa.string()),
            pa.field("chunk_tokens", pa.int32()),
            pa.field(options.name, vector),
        ]
    )

    def chunks(texts: Sequence[TextInput], result: EmbedResult) -> Sequence[pa.Array]:
        bad = _failed(result)
        spans: list[tuple[int, int, int]] = []
        parts: list[str] = []
        vectors: list[npt.NDArray[Any]] = []
        ends = [0]
        for text, tokens, found, whole, failed in zip(
            texts, result.tokens, result.chunks, cast("Any", result.embeddings), bad, strict=True
        ):
            if not failed:
                own = [(part.start, part.stop, part.tokens) for part in found] or [(0, len(text), tokens)]
                spans += own
                parts += [str(text)[start:stop] for start, stop, _ in own]
                vectors += [part.vector for part in found] or [whole]
            ends.append(len(spans))
        numbers = np.array(spans, np.int32).reshape(-1, 3)
        stacked = np.stack(vectors) if vectors else np.zeros([0, width], np.float32)
        flat = [pa.array(numbers[:, 0]), pa.array(numbers[:, 1]), pa.array(parts, pa.string()), pa.array(numbers[:, 2])]
        flat.append(_vectors(as_dtype(stacked, dtype), np.zeros(len(spans), np.bool_), vector))
        struct = pa.StructArray.from_arrays(flat, fields=list(chunk))
        return [pa.ListArray.from_arrays(pa.array(ends, pa.int32()), struct, mask=pa.array(bad))]

    fields = [pa.field(CHUNKS, pa.list_(chunk))]
    return Columns(fields=fields, arrays=chunks, output_type=OutputType.DENSE, vector=options.name)


def _sparse(spec: ModelSpec, request: RequestOptions, options: ColumnOptions) -> Columns:
    def arrays(_: Sequence[TextInput], result: EmbedResult) -> Sequence[pa.Array]:
        vectors = cast("Sequence[SparseVector]", result.embeddings)
        ends = pa.array(np.cumsum([0, *(len(vector.indices) for vector in vectors)]), pa.int32())
        parts = [
            pa.ListArray.from_arrays(ends, pa.array(np.concatenate([getattr(vector, name) for vector in vectors])))
            for name in ("indices", "values")
        ]
        return [pa.StructArray.from_arrays(parts, fields=list(SPARSE), mask=pa.array(_failed(result)))]

    fields = [pa.field(options.name, SPARSE)]
    return Columns(fields=fields, arrays=arrays, output_type=OutputType.SPARSE, vector=options.name)


def _tokens(spec: ModelSpec, request: RequestOptions, options: ColumnOptions) -> Columns:
    element = _ELEMENTS[DType(request.get("dtype", DType.FLOAT32))]
    vector = pa.list_(element, request.get("dimensions") or spec.width)

    def arrays(_: Sequence[TextInput], result: EmbedResult) -> Sequence[pa.Array]:
        found = cast("Sequence[npt.NDArray[Any]]", result.embeddings)
        ends = pa.array(np.cumsum([0, *map(len, found)]), pa.int32())
        flat = np.concatenate(found)
        inner = _vectors(flat, np.zeros(len(flat), np.bool_), vector)
        return [pa.ListArray.from_arrays(ends, inner, mask=pa.array(_failed(result)))]

    fields = [pa.field(options.name, pa.list_(vector))]
    return Columns(fields=fields, arrays=arrays, output_type=OutputType.TOKENS, vector=options.name)


def _labels(spec: ModelSpec, request: RequestOptions, options: ColumnOptions) -> Columns:
    def arrays(_: Sequence[TextInput], result: EmbedResult) -> Sequence[pa.Array]:
        ranked = sorted_labels(spec, probabilities(spec, replace(result, errors=()), raw=options.raw), options.top_n)
        rows = [[(label.label, label.score) for label in labels] for labels in ranked]
        kept = [None if failed else row for row, failed in zip(rows, _failed(result), strict=True)]
        return [pa.array([row and row[0][0] for row in kept], pa.string()), pa.array(kept, LABELS)]

    return Columns(
        fields=[pa.field("label", pa.string()), pa.field("labels", LABELS)], arrays=arrays, output_type=OutputType.SCORES
    )


def _relevance(spec: ModelSpec, request: RequestOptions, options: ColumnOptions) -> Columns:
    def arrays(_: Sequence[TextInput], result: EmbedResult) -> Sequence[pa.Array]:
        logits = relevance(np.asarray(result.embeddings, np.float32))
        return [pa.array(logits if options.raw else sigmoid(logits), mask=_failed(result))]

    return Columns(fields=[pa.field("score", pa.float32())], arrays=arrays, output_type=OutputType.SCORES)


def joined(results: Sequence[EmbedResult]) -> EmbedResult:
    """The results of several requests as that of one."""
    if len(results) == 1:
        return results[0]
    embeddings: Any = [result.embeddings for result in results]
    together = {name: list(itertools.chain.from_iterable(getattr(result, name) for result in results)) for name in _PER_TEXT}
    whole = list(itertools.chain.from_iterable(embeddings)) if isinstance(embeddings[0], list) else np.concatenate(embeddings)
    return replace(results[0], embeddings=whole, **together)


def split(result: EmbedResult, count: int) -> tuple[EmbedResult, EmbedResult]:
    """The results of the first ``count`` texts, and those of the others."""
    names = ("embeddings", *_PER_TEXT)
    parts = [{name: getattr(result, name)[place] for name in names} for place in (slice(count), slice(count, None))]
    first, second = (replace(result, **part) for part in parts)
    return first, second


_PER_TEXT = ("tokens", "truncated", "errors", "devices", "chunks")


def _failed(result: EmbedResult) -> npt.NDArray[np.bool_]:
    return np.array([error is not None for error in result.errors], np.bool_)


def _vectors(embeddings: Any, failed: npt.NDArray[np.bool_], kind: pa.DataType) -> pa.Array:
    """Vectors [n, width], or n strings, as an Arrow array; null where a text failed."""
    if isinstance(embeddings, list):
        return pa.array(embeddings, pa.string(), mask=failed)
    flat = pa.array(np.ascontiguousarray(embeddings).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=kind, mask=pa.array(failed) if failed.any() else None)


OUTPUTS: dict[OutputName, Callable[[ModelSpec, RequestOptions, ColumnOptions], Columns]] = {
    "dense": _dense,
    "sparse": _sparse,
    "tokens": _tokens,
    "labels": _labels,
    "relevance": _relevance,
}
