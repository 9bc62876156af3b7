"""Choose the waiting texts of the next batch, place them in bins, and build the batch's arrays. Pure functions.

The text that has waited longest is always in the batch, so that no text starves. The others are chosen to fill the batch: bin
by bin, the longest text that still fits (first-fit-decreasing, seen from the bin). Of the available shapes, the one with the
least work per useful token is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from npu_proxy.batch import UNATTENDED, Batch, BatchLayout, BatchShape, Encoding, Slot, fill_pooling
from npu_proxy.types import OutputType


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """A batch before its arrays are built: the shape, and the indices of each bin's texts, in order of position."""

    shape: BatchShape
    bins: Sequence[Sequence[int]]

    @property
    def indices(self) -> list[int]:
        """The indices of all texts, bin by bin."""
        return [index for bin in self.bins for index in bin]


def plan_batch(lengths: Sequence[int], shapes: Sequence[BatchShape], vectors: Sequence[int] = ()) -> BatchPlan:
    """Plan the next batch, trying every shape that can hold the first text.

    lengths: tokens of the waiting texts, oldest first. vectors: segments that each text takes; empty if each takes 1.
    Raises ValueError if no shape can hold the first text (the engine rejects such texts earlier).
    """
    needed = vectors[0] if vectors else 1
    fitting = [shape for shape in shapes if shape.positions >= lengths[0] and shape.segments >= needed]
    if not fitting:
        raise ValueError(f"a text of {lengths[0]} tokens does not fit into any batch shape ({', '.join(map(str, shapes))})")
    best: BatchPlan | None = None
    best_rate = 0.0
    for shape in fitting:
        plan = fill_bins(lengths, shape, vectors)
        rate = sum(lengths[index] for bin in plan.bins for index in bin) / shape.work
        if rate > best_rate:
            best, best_rate = plan, rate
    assert best is not None  # lengths are positive, so every plan has a positive rate
    return best


def fill_bins(lengths: Sequence[int], shape: BatchShape, vectors: Sequence[int] = ()) -> BatchPlan:
    """Fill the bins of one shape with text 0 and then the texts that fit best.

    The lengths of the waiting texts are bits of one integer, so finding the longest that fits takes one mask and one bit_length.
    """
    waiting: dict[int, list[int]] = {}
    for index in range(len(lengths) - 1, 0, -1):
        if lengths[index] <= shape.positions:
            waiting.setdefault(lengths[index], []).append(index)
    present = 0
    for length in waiting:
        present |= 1 << length
    bins: list[list[int]] = []
    for number in range(shape.bins):
        bin = [] if number else [0]
        room = shape.positions - (0 if number else lengths[0])
        free = shape.segments - (0 if number else (vectors[0] if vectors else 1))
        skipped = 0  # lengths whose next text needs more segments than are free in this bin
        while free and (fits := present & ~skipped & ((2 << room) - 1)):
            length = fits.bit_length() - 1
            segments = vectors[waiting[length][-1]] if vectors else 1
            if segments > free:
                skipped |= 1 << length
                continue
            bin.append(waiting[length].pop())
            room -= length
            free -= segments
            if not waiting[length]:
                present ^= 1 << length
        bins.append(bin)
        if not present:
            break
    return BatchPlan(shape, bins)


def full_shape(shapes: Sequence[BatchShape]) -> BatchShape:
    """The shape for a long queue: the largest one with several bins. Larger shapes with a single bin hold one long text each."""
    multi_bin = [shape for shape in shapes if shape.bins > 1] or shapes
    return max(multi_bin, key=lambda shape: shape.tokens)


def aligned(tokens: int, align: int) -> int:
    """Number of positions that a text takes if texts start at multiples of ``align``."""
    return -(-tokens // align) * align


def pack(
    encodings: Sequence[Encoding],
    plan: BatchPlan,
    layout: BatchLayout,
    output_type: OutputType = OutputType.DENSE,
    deadline: float = math.inf,
) -> Batch:
    """Build the arrays of a planned batch. The plan's indices refer to ``encodings``. Padding has segment -1."""
    shape = plan.shape
    arrays = layout.inputs(shape.bins, shape.positions, shape.segments)
    inputs = {name: np.zeros(dimensions, dtype) for name, (dimensions, dtype) in arrays.items()}
    ids, positions, segments = inputs["input_ids"], inputs["position_ids"], inputs["segment_ids"]
    pool, types = inputs.get("pool"), inputs.get("type_ids")
    segments.fill(-1)
    chosen: list[Encoding] = []
    slots: list[Slot] = []
    for bin, indices in enumerate(plan.bins):
        start = segment = 0
        for index in indices:
            encoding = encodings[index]
            count = encoding.tokens
            span = slice(start, start + count)
            ids[bin, span] = encoding.ids
            positions[bin, span] = np.arange(count)
            segments[bin, span] = segment
            if encoding.attended >= 0:
                segments[bin, start + encoding.attended : start + count] += UNATTENDED
            if types is not None and encoding.type_ids is not None:
                types[bin, span] = encoding.type_ids
            if pool is not None:
                for number, (first, stop) in enumerate(encoding.spans or ((0, count),)):
                    skip = 0 if first else encoding.prompt_tokens
                    fill_pooling(layout.pooling, pool[bin], segment + number, start + first, stop - first, skip)
            chosen.append(encoding)
            slots.append(Slot(bin, segment, start))
            start += aligned(count, layout.align)
            segment += encoding.vectors
    return Batch(chosen, slots, shape, inputs, output_type, deadline)
