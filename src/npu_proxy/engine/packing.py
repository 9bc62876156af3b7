"""Which of the waiting texts go into the next row, where each lies, and the row's arrays. Pure functions, no threads.

A row has ``bins`` bins of ``positions`` positions (graph/packed.py). The text that has waited longest is always in it,
so nothing is passed over for ever; the rest is chosen to fill: bin by bin, the longest text that still fits
(first-fit-decreasing, seen from the bin). Of the shapes at hand the one wins that computes least for each useful token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from npu_proxy.types import Job, Pack, Shaped, Slot

PoolFiller = Callable[[npt.NDArray[Any], int, int, int], None]
"""graph.heads.fill_pool with the pooling bound: (pool of one bin, segment, start, count)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A row before its arrays: for each bin the indices of its texts, in order of their place."""

    shape: Shaped
    bins: Sequence[Sequence[int]]


def plan_row(lengths: Sequence[int], shapes: Sequence[Shaped]) -> Plan:
    """The next row from waiting texts of ``lengths`` tokens, first come first; every shape that can hold the first is tried.

    Raises ValueError when no shape holds the first text (the engine refuses such texts long before).
    """
    fitting = [shape for shape in shapes if shape.positions >= lengths[0]]
    if not fitting:
        raise ValueError(f"a text of {lengths[0]} tokens fits no row of {', '.join(map(str, shapes))}")
    best: Plan | None = None
    best_rate = 0.0
    for shape in fitting:
        plan = fill_bins(lengths, shape)
        rate = sum(lengths[index] for bin in plan.bins for index in bin) / shape.work
        if rate > best_rate:
            best, best_rate = plan, rate
    assert best is not None  # lengths are positive, so every plan has a positive rate
    return best


def fill_bins(lengths: Sequence[int], shape: Shaped) -> Plan:
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
        while len(bin) < shape.segments and (fits := present & ((2 << room) - 1)):
            length = fits.bit_length() - 1
            bin.append(waiting[length].pop())
            room -= length
            if not waiting[length]:
                present ^= 1 << length
        bins.append(bin)
        if not present:
            break
    return Plan(shape, bins)


def pack(jobs: Sequence[Job], plan: Plan, fill_pool: PoolFiller, *, by_index: bool) -> Pack:
    """The arrays of a planned row; ``jobs`` are those the plan's indices count. Padding has segment -1."""
    shape = plan.shape
    row = [shape.bins, shape.positions]
    ids, positions = np.zeros(row, np.int32), np.zeros(row, np.int32)
    segments = np.full(row, -1, np.int32)
    pool = np.zeros([shape.bins, shape.segments], np.int32) if by_index else np.zeros([row[0], shape.segments, row[1]], np.float32)
    chosen: list[Job] = []
    slots: list[Slot] = []
    for bin, indices in enumerate(plan.bins):
        start = 0
        for segment, index in enumerate(indices):
            count = jobs[index].encoding.tokens
            span = slice(start, start + count)
            ids[bin, span] = jobs[index].encoding.ids
            positions[bin, span] = np.arange(count)
            segments[bin, span] = segment
            fill_pool(pool[bin], segment, start, count)
            chosen.append(jobs[index])
            slots.append(Slot(bin, segment))
            start += count
    inputs = {"input_ids": ids, "position_ids": positions, "segment_ids": segments, "pool": pool}
    return Pack(chosen, slots, shape, inputs)
