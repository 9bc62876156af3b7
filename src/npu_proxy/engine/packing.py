"""Choose the waiting texts of the next batch, place them in bins, and build the batch's arrays. Pure functions.

The text that has waited longest is always in the batch, so that no text starves. The others are chosen to fill the batch: bin
by bin, the longest text that still fits (first-fit-decreasing, seen from the bin). Of the available shapes, the one with the
least work per useful token is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from npu_proxy.batch import UNATTENDED, Batch, BatchLayout, BatchShape, Canary, Encoding, Slot, fill_pooling, token_positions
from npu_proxy.devices.canary import LARGEST_LOSS, place_canaries
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


def plan_batch(
    lengths: Sequence[int], shapes: Sequence[BatchShape], vectors: Sequence[int] = (), canary_tokens: int = 0
) -> BatchPlan:
    """Plan the next batch, trying every shape that can hold the first text.

    lengths: tokens of the waiting texts, oldest first. vectors: segments that each text takes; empty if each takes 1.
    canary_tokens: room to leave for a canary in at least one bin, unless that costs more than LARGEST_LOSS.
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
    return _with_room(best, lengths, vectors, canary_tokens) if canary_tokens else best


def _with_room(plan: BatchPlan, lengths: Sequence[int], vectors: Sequence[int], canary_tokens: int) -> BatchPlan:
    """The plan, or one of the same shape with room for a canary in its last bin, if that is almost as full."""
    shape = plan.shape
    if place_canaries(plan.bins, lengths, vectors, shape, [canary_tokens], 0):
        return plan
    if shape.bins == 1 and lengths[0] > shape.positions - canary_tokens:
        return plan
    roomy = fill_bins(lengths, shape, vectors, canary_tokens)
    tokens, most = (sum(lengths[index] for index in each.indices) for each in (roomy, plan))
    return roomy if tokens >= (1 - LARGEST_LOSS) * most else plan


def fill_bins(lengths: Sequence[int], shape: BatchShape, vectors: Sequence[int] = (), spare: int = 0) -> BatchPlan:
    """Fill the bins of one shape with text 0 and then the texts that fit best.

    spare: how many positions stay free in the last bin, and if any, one segment too. The lengths of the waiting texts are bits of
    one integer, so finding the longest that fits takes one mask and one bit_length.
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
        if spare and number == shape.bins - 1:
            room, free = room - spare, free - 1
        skipped = 0  # lengths whose next text needs more segments than are free in this bin
        while free > 0 and room > 0 and (fits := present & ~skipped & ((2 << room) - 1)):
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
    canaries: Sequence[Encoding] = (),
    turn: int | None = None,
) -> Batch:
    """Build the arrays of a planned batch. The plan's indices refer to ``encodings``. Padding has segment -1.

    turn: the number of the batch; None leaves canaries and echoes out (devices/canary.py). Bins with room get one of ``canaries``,
    bins with a free segment an echo; which, and where, changes with ``turn``.
    """
    shape = plan.shape
    arrays = layout.inputs(shape.bins, shape.positions, shape.segments)
    inputs = {name: np.zeros(dimensions, dtype) for name, (dimensions, dtype) in arrays.items()}
    ids, positions, segments = inputs["input_ids"], inputs["position_ids"], inputs["segment_ids"]
    pool, types = inputs.get("pool"), inputs.get("type_ids")
    segments.fill(-1)
    chosen: list[Encoding] = []
    slots: list[Slot] = []
    placed: list[Canary] = []
    echoes: list[tuple[int, int, int]] = []
    for bin, (texts, canary) in enumerate(_with_canaries(encodings, plan, layout, canaries, turn)):
        start = segment = 0
        firsts: list[int] = []
        for index, encoding in enumerate(texts):
            count = encoding.tokens
            span = slice(start, start + count)
            ids[bin, span] = encoding.ids
            positions[bin, span] = token_positions(encoding.ids, layout.unplaced)
            segments[bin, span] = segment
            if encoding.attended >= 0:
                segments[bin, start + encoding.attended : start + count] += UNATTENDED
            if types is not None and encoding.type_ids is not None:
                types[bin, span] = encoding.type_ids
            if pool is not None:
                for number, (first, stop) in enumerate(encoding.spans or ((0, count),)):
                    skip = 0 if first else encoding.prompt_tokens
                    fill_pooling(layout.pooling, pool[bin], segment + number, start + first, stop - first, skip)
            slot = Slot(bin, segment, start)
            if canary is not None and index == canary[1]:
                placed.append(Canary(canary[0], encoding, slot))
            else:
                chosen.append(encoding)
                slots.append(slot)
            start += aligned(count, layout.align)
            firsts.append(segment)
            segment += encoding.vectors
        if turn is not None and pool is not None and firsts and segment < shape.segments:
            echoed = firsts[turn % len(firsts)]
            pool[bin, segment] = pool[bin, echoed]
            echoes.append((bin, echoed, segment))
    return Batch(chosen, slots, shape, inputs, output_type, deadline, placed, echoes)


def _with_canaries(
    encodings: Sequence[Encoding], plan: BatchPlan, layout: BatchLayout, canaries: Sequence[Encoding], turn: int | None
) -> Iterator[tuple[Sequence[Encoding], tuple[int, int] | None]]:
    """The texts of each bin, in order of position, and if one of them is a canary, its number and index."""
    places: dict[int, tuple[int, int]] = {}
    if canaries and turn is not None:
        used = set(plan.indices)
        lengths = [aligned(encoding.tokens, layout.align) if index in used else 0 for index, encoding in enumerate(encodings)]
        spans = any(encodings[index].spans for index in used)
        vectors = [encoding.vectors for encoding in encodings] if spans else ()
        sizes = [aligned(canary.tokens, layout.align) for canary in canaries]
        places = place_canaries(plan.bins, lengths, vectors, plan.shape, sizes, turn)
    for bin in range(plan.shape.bins):
        texts = [encodings[index] for index in plan.bins[bin]] if bin < len(plan.bins) else []
        canary = places.get(bin)
        if canary is not None:
            texts.insert(canary[1], canaries[canary[0]])
        yield texts, canary
