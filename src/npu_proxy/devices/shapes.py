"""Which batch shapes a device takes, and what each costs. Pure functions.

Short bins spend less on attention, long bins hold long texts; full batches serve a deep queue, small ones a shallow queue.
If shapes are free (the CPU), there are many; if each is a compiled graph with another copy of the weights, there are few.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from npu_proxy.batch import BatchShape
from npu_proxy.settings import Settings

ROW_TOKENS = 512
"""Positions in a full batch, unless the setting `row_tokens` or a tuning profile says otherwise."""
SHORTEST_BIN = 32
"""Bin lengths double from this one until one holds the model's longest text."""
SHORTEST_IN_FULL_BATCH = 64
"""On the CPU, shorter bins are only used for a few short texts: in a full batch, too much of them would stay empty."""


MOST_SEGMENTS = 64
"""The most texts per bin: each costs a row of the bin's pooling matrix."""

SHORT_BIN = 128
"""Length of the short bins of compiled batches."""


def full_batch_tokens(settings: Settings) -> int:
    """Positions in a full batch: the setting `row_tokens`, or its default."""
    return settings.row_tokens or ROW_TOKENS


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of an inference in units of one token's linear layers: call + tokens (1 + positions / attention).

    call: the fixed cost. attention: positions per bin at which attention costs as much as everything else.
    """

    call: float
    attention: float

    def work(self, bins: int, positions: int) -> float:
        """Cost of one inference of ``bins`` x ``positions``."""
        return self.call + bins * positions * (1 + positions / self.attention)


CPU_COST = Cost(call=8, attention=1000)
"""Measured, see docs/adr/0003."""
NPU_COST = Cost(call=190, attention=260)
"""Fitted to within a tenth of the vendor's cost model for platform 4000, see docs/adr/0006; not measured on an NPU."""


def dynamic_shapes(max_length: int, batch_tokens: int, *, packed: bool) -> list[BatchShape]:
    """Shapes for a device on which they are free: full batches of ``batch_tokens`` in bins of each length, and single bins.

    packed: whether a bin takes several texts. A text longer than ``batch_tokens`` gets a single bin.
    """
    lengths = _doubling(SHORTEST_BIN, max_length)
    full = [
        (batch_tokens // length, length) for length in lengths if length >= SHORTEST_IN_FULL_BATCH and batch_tokens % length == 0
    ]
    return _shapes([*full, *((1, length) for length in lengths)], CPU_COST, packed=packed)


def static_shapes(max_length: int, batch_tokens: int, *, packed: bool) -> list[BatchShape]:
    """Shapes for a device that compiles each: full batches in bins of 128 and of the longest text, and one short batch.

    By the vendor's cost model, a third full shape would save 1.5 % of the time on a real corpus; see docs/adr/0006.
    """
    longest = _doubling(SHORTEST_BIN, max_length)[-1]
    short = min(SHORT_BIN, longest)
    bins = [(max(1, batch_tokens // length), length) for length in (short, longest)]
    return _shapes([*bins, (1, short)], NPU_COST, packed=packed)


def _doubling(first: int, last: int) -> list[int]:
    """The lengths first, 2 first, 4 first, ..., up to the first one that is not below ``last``."""
    lengths = [first]
    while lengths[-1] < last:
        lengths.append(2 * lengths[-1])
    return lengths


def _shapes(bins: Iterable[tuple[int, int]], cost: Cost, *, packed: bool) -> list[BatchShape]:
    return [
        BatchShape(
            bins=count,
            positions=length,
            segments=max(1, min(length // 8, MOST_SEGMENTS)) if packed else 1,
            work=cost.work(count, length),
        )
        for count, length in dict.fromkeys(bins)
    ]
