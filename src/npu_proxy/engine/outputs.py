"""The part of a device's output that is kept (and cached) for a text, and the part of it that a request asks for.

To add an output type, add a row to ``_KEPT_SHAPES``, and a case to ``kept_output``, to graph.build.build, to finish.py and to
chunking.combine_chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from npu_proxy.batch import Encoding
from npu_proxy.spec import ModelSpec, QueryWeights
from npu_proxy.types import OutputType, Vector


def kept_output(spec: ModelSpec, encoding: Encoding, raw: npt.NDArray[np.float32], special_ids: frozenset[int]) -> Vector:
    """The part of a device's output that is kept for a text (TextResult.vector).

    raw: [1, width], [spans, width] for a text pooled in spans, or [tokens, width] with one vector per token. special_ids: ids of
    special tokens, which get no lexical weight.
    """
    match spec.output_type:
        case OutputType.DENSE | OutputType.SCORES:
            return raw.copy() if encoding.spans else raw[0].copy()
        case OutputType.SPARSE:
            if spec.query_weights is not None and not encoding.document:
                return _query_entries(spec.query_weights, encoding)
            (indices,) = np.nonzero(raw[0])
            return np.stack([indices.astype(np.float32), raw[0][indices]], axis=1)
        case OutputType.TOKENS:
            config = spec.late_interaction
            skip = frozenset[int]() if config is None else config.skip_ids if encoding.document else config.query_skip_ids
            return raw[~np.isin(encoding.ids, list(skip))] if skip else raw.copy()
        case OutputType.MULTI:
            weights = np.where(np.isin(encoding.ids, list(special_ids)), 0, raw[:, 0])
            return np.concatenate([encoding.ids[:, None], weights[:, None], raw[:, 1:]], axis=1, dtype=np.float32)


def _query_entries(weights: QueryWeights, encoding: Encoding) -> Vector:
    """The sparse vector of a query that is not computed: the weight of each of its tokens, once."""
    table = weights.layer.weight
    ids = np.unique(encoding.ids[encoding.ids < len(table)])
    ids = ids[table[ids] != 0]
    return np.stack([ids.astype(np.float32), table[ids]], axis=1)


def is_kept_output(spec: ModelSpec, vector: Vector) -> bool:
    """Whether a vector from a cache can be what ``kept_output`` made of a text: its dimensions, width and finite numbers."""
    dimensions, width = _KEPT_SHAPES[spec.output_type](spec)
    return vector.ndim == dimensions and vector.shape[-1] == width and bool(np.isfinite(vector).all())


_KEPT_SHAPES: Mapping[OutputType, Callable[[ModelSpec], tuple[int, int]]] = {
    OutputType.DENSE: lambda spec: (1, spec.width),
    OutputType.SCORES: lambda spec: (1, spec.width),
    OutputType.SPARSE: lambda _: (2, 2),
    OutputType.TOKENS: lambda spec: (2, spec.width),
    OutputType.MULTI: lambda spec: (2, spec.width + 2),
}
"""Number of dimensions and width of what is kept of a text."""


def requested_output(requested: OutputType, computed: OutputType, vector: Vector) -> Vector:
    """The part of a kept vector that a request asks for: [width], [entries, 2] or [tokens, width]."""
    if computed is not OutputType.MULTI:
        return vector
    if requested is OutputType.DENSE:
        return vector[0, 2:]
    if requested is OutputType.TOKENS:
        return vector[1:, 2:]
    return largest_entries(vector[vector[:, 1] > 0, :2])


def relevance(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Relevance [n] of pairs from logits [n, labels]: the only logit, or the second minus the first."""
    return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]


def largest_entries(entries: Vector) -> Vector:
    """Deduplicate sparse entries [n, 2]: each id once, in ascending order, with its largest weight."""
    order = np.lexsort([-entries[:, 1], entries[:, 0]])
    entries = entries[order]
    first = np.r_[True, entries[1:, 0] != entries[:-1, 0]] if len(entries) else np.zeros(0, bool)
    return entries[first]
