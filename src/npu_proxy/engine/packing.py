"""Which of the waiting texts go into the next row, where each lies, and the row's arrays. Pure functions, no threads.

A row has ``bins`` bins of ``positions`` positions (graph/packed.py). The text that has waited longest is always in it,
so nothing is passed over for ever; the rest is chosen to fill: bin by bin, the longest text that still fits
(first-fit-decreasing, seen from the bin). Of the shapes at hand the one wins that computes least for each useful token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from npu_proxy.graph.heads import fill_pool
from npu_proxy.graph.packed import UNSEEN, RowFormat
from npu_proxy.types import Job, Kind, Pack, Shaped, Slot


@dataclass(frozen=True, slots=True)
class Plan:
    """A row before its arrays: for each bin the indices of its texts, in order of their place."""

    shape: Shaped
    bins: Sequence[Sequence[int]]


def plan_row(lengths: Sequence[int], shapes: Sequence[Shaped], answers: Sequence[int] = ()) -> Plan:
    """The next row from waiting texts of ``lengths`` tokens, first come first; every shape that can hold the first is tried.

    answers: segments that each takes, where that is not 1 for all.
    Raises ValueError when no shape holds the first text (the engine refuses such texts long before).
    """
    most = answers[0] if answers else 1
    fitting = [shape for shape in shapes if shape.positions >= lengths[0] and shape.segments >= most]
    if not fitting:
        raise ValueError(f"a text of {lengths[0]} tokens fits no row of {', '.join(map(str, shapes))}")
    best: Plan | None = None
    best_rate = 0.0
    for shape in fitting:
        plan = fill_bins(lengths, shape, answers)
        rate = sum(lengths[index] for bin in plan.bins for index in bin) / shape.work
        if rate > best_rate:
            best, best_rate = plan, rate
    assert best is not None  # lengths are positive, so every plan has a positive rate
    return best


def fill_bins(lengths: Sequence[int], shape: Shaped, answers: Sequence[int] = ()) -> Plan:
    """Fill the bins of one shape with text 0 and whatever fits best behind it.

    Lengths with waiting texts are bits of one integer, so "the longest that fits" is one mask and one bit_length.
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
        free = shape.segments - (0 if number else (answers[0] if answers else 1))
        passed = 0  # lengths whose next text takes more segments than this bin has left
        while free and (fits := present & ~passed & ((2 << room) - 1)):
            length = fits.bit_length() - 1
            taken = answers[waiting[length][-1]] if answers else 1
            if taken > free:
                passed |= 1 << length
                continue
            bin.append(waiting[length].pop())
            room -= length
            free -= taken
            if not waiting[length]:
                present ^= 1 << length
        bins.append(bin)
        if not present:
            break
    return Plan(shape, bins)


def full_row(shapes: Sequence[Shaped]) -> Shaped:
    """The row of a deep queue: the largest of several bins. Single bins that are larger are there for one long text each."""
    several = [shape for shape in shapes if shape.bins > 1] or shapes
    return max(several, key=lambda shape: shape.bins * shape.positions)


def room(tokens: int, align: int) -> int:
    """Positions that a text of so many tokens takes, where texts begin at multiples of ``align``."""
    return -(-tokens // align) * align


def pack(jobs: Sequence[Job], plan: Plan, layout: RowFormat, kind: Kind = Kind.DENSE) -> Pack:
    """The arrays of a planned row; ``jobs`` are those the plan's indices count. Padding has segment -1."""
    shape = plan.shape
    arrays = layout.inputs(shape.bins, shape.positions, shape.segments)
    inputs = {name: np.zeros(dimensions, of) for name, (dimensions, of) in arrays.items()}
    ids, positions, segments = inputs["input_ids"], inputs["position_ids"], inputs["segment_ids"]
    pool, types = inputs.get("pool"), inputs.get("type_ids")
    segments.fill(-1)
    chosen: list[Job] = []
    slots: list[Slot] = []
    for bin, indices in enumerate(plan.bins):
        start = segment = 0
        for index in indices:
            encoding = jobs[index].encoding
            count = encoding.tokens
            span = slice(start, start + count)
            ids[bin, span] = encoding.ids
            positions[bin, span] = np.arange(count)
            segments[bin, span] = segment
            if encoding.seen >= 0:
                segments[bin, start + encoding.seen : start + count] += UNSEEN
            if types is not None and encoding.types is not None:
                types[bin, span] = encoding.types
            if pool is not None:
                for part, (first, stop) in enumerate(encoding.parts or ((0, count),)):
                    skip = 0 if first else encoding.prompt
                    fill_pool(layout.pooling, pool[bin], segment + part, start + first, stop - first, skip)
            chosen.append(jobs[index])
            slots.append(Slot(bin, segment, start))
            start += room(count, layout.align)
            segment += encoding.answers
    return Pack(chosen, slots, shape, inputs, kind)
