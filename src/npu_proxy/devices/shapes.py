"""Which row shapes a device takes, and what each costs. Pure functions.

Short bins spend less on attention, long bins hold long texts; full rows serve a deep queue, short rows a shallow one.
Where shapes are free (the CPU) there are many; where each is a compiled graph that holds the weights again, few.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from npu_proxy.graph.packed import RowShape

ROW_TOKENS = 512
"""Positions in a full row, unless settings or a tuned profile say otherwise."""
SHORTEST_BIN = 32
"""Bins double from here until one holds the model's longest text."""
SHORTEST_IN_FULL_ROW = 64
"""On the CPU shorter bins are for a few short texts alone: in a full row they would leave too much of themselves empty."""


MOST_SEGMENTS = 64
"""Texts of a bin at most: of a long bin each would cost a row of its pooling matrix."""

SHORT_BIN = 128
"""The short bins of compiled rows."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of an inference in tokens' worth of linear layers: call + tokens (1 + positions / attention).

    call: the fixed part. attention: positions a bin at which attention costs as much as everything else.
    """

    call: float
    attention: float

    def work(self, bins: int, positions: int) -> float:
        """Cost of one inference of ``bins`` x ``positions``."""
        return self.call + bins * positions * (1 + positions / self.attention)


CPU_COST = Cost(call=8, attention=1000)
"""Measured, see docs/adr/0003."""
NPU_COST = Cost(call=190, attention=260)
"""Fitted to the vendor's cost model for platform 4000 to within a tenth, see docs/adr/0006; no NPU was measured."""


def dynamic_shapes(max_length: int, row_tokens: int, *, packed: bool) -> list[RowShape]:
    """For a device to which shapes are free: full rows of ``row_tokens`` in bins of each length, and single bins.

    packed: whether a bin takes several texts. A text longer than ``row_tokens`` is a single bin.
    """
    lengths = _doubling(SHORTEST_BIN, max_length)
    full = [(row_tokens // length, length) for length in lengths if length >= SHORTEST_IN_FULL_ROW and row_tokens % length == 0]
    return _shapes([*full, *((1, length) for length in lengths)], CPU_COST, packed=packed)


def static_shapes(max_length: int, row_tokens: int, *, packed: bool) -> list[RowShape]:
    """For a device that compiles each shape: full rows in bins of 128 and of the longest text, and one short row.

    By the vendor's cost model a third full row would save 1.5 % of the time over a real corpus; see docs/adr/0006.
    """
    longest = _doubling(SHORTEST_BIN, max_length)[-1]
    short = min(SHORT_BIN, longest)
    bins = [(max(1, row_tokens // length), length) for length in (short, longest)]
    return _shapes([*bins, (1, short)], NPU_COST, packed=packed)


def _doubling(first: int, last: int) -> list[int]:
    """first, 2 first, 4 first, ... up to the first that is not below ``last``."""
    lengths = [first]
    while lengths[-1] < last:
        lengths.append(2 * lengths[-1])
    return lengths


def _shapes(bins: Iterable[tuple[int, int]], cost: Cost, *, packed: bool) -> list[RowShape]:
    return [
        RowShape(
            bins=count,
            positions=length,
            segments=max(1, min(length // 8, MOST_SEGMENTS)) if packed else 1,
            work=cost.work(count, length),
        )
        for count, length in dict.fromkeys(bins)
    ]
