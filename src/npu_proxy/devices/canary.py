"""Canaries and echoes in the free room of batches, which show at once that a device computes wrong vectors.

A canary is a short golden text. Every bin of a batch that has room for one gets one, at a place that changes from batch to
batch; it costs nothing there, because padding is computed too. `plan_batch` (engine/packing.py) keeps room free where that costs
at most LARGEST_LOSS of a batch. The vectors of the canaries are known from the examination of the device. An echo is a free segment
of a bin that pools one of the bin's texts again, which costs nothing either; it numbers the batch, because which text is pooled
again changes too. If a canary is wrong, or an echo differs from its text, the whole batch is thrown away and computed elsewhere,
and the device is taken out of service.

What canaries see: wrong weights (every text passes through all of them), and whatever is wrong in their bin. What echoes see, in
every bin: outputs that belong to another batch, slot, bin or segment. Outputs that were not written are NaN, because they are NaN
before. What none of them sees: a fault that spares the canaries' own tokens, such as a damaged row of the word embeddings, and
deviations within the bound of certification. Batches without room for a canary are not fully covered; the chain of devices
computes one in `verify_every` of them twice (fallback.py).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from npu_proxy.batch import Batch, BatchShape, output_at, output_for
from npu_proxy.devices.failure import BatchError, Failure
from npu_proxy.types import OutputType

CANARY_TEXTS = ("a", "2", "the", "of")
"""Several, so that an output that was written for another batch is noticed even if the canary is in the same place."""
MOST_CANARY_TOKENS = 8
"""So that all of them fit into the smallest batch shape."""
_ECHO = 0.01
"""How much two vectors of the same text in one batch may differ, relative to the largest number; in half precision they may."""
LARGEST_LOSS = 0.02
"""Share of a batch's tokens that may be given up to make room for a canary; on a queue of real texts it costs no batch."""


def place_canaries(
    bins: Sequence[Sequence[int]],
    lengths: Sequence[int],
    vectors: Sequence[int],
    shape: BatchShape,
    sizes: Sequence[int],
    turn: int,
) -> dict[int, tuple[int, int]]:
    """Which canary each bin gets, and before which of its texts: {bin: (canary, index)}; bins without room are left out.

    bins: the texts of each bin, as indices of ``lengths`` (positions that a text takes) and ``vectors`` (segments; empty if each
    takes 1). sizes: positions that each canary takes. turn: the number of the batch; places and canaries change with it.
    """
    places: dict[int, tuple[int, int]] = {}
    if not sizes:
        return places
    for bin in range(shape.bins):
        texts = bins[bin] if bin < len(bins) else ()
        canary = (turn + bin) % len(sizes)
        room = shape.positions - sum(lengths[index] for index in texts)
        segments = shape.segments - (sum(vectors[index] for index in texts) if vectors else len(texts))
        if room >= sizes[canary] and segments > 0:
            places[bin] = (canary, (turn // len(sizes) + bin) % (len(texts) + 1))
    return places


class Guard:
    """Checks the canaries and echoes of a device's batches, and counts them. Thread-safe."""

    def __init__(self, device: str, least: float) -> None:
        """least: the minimum similarity of a canary to its known output."""
        self.canaries: Sequence[npt.NDArray[np.float32]] = ()
        """The known output of each canary; empty until the device was examined."""
        self.passed: int = 0
        """Batches with canaries, all of which were right."""
        self.failures: int = 0
        self._device = device
        self._least = least
        self._lock = threading.Lock()

    def check(self, batch: Batch, vectors: npt.NDArray[np.float32]) -> None:
        """Raise BatchError (CANARY) if a batch is wrong."""
        try:
            check_guards(self._device, batch, vectors, self.canaries, self._least)
        except BatchError:
            with self._lock:
                self.failures += 1
            raise
        with self._lock:
            self.passed += bool(batch.canaries and self.canaries)


def check_guards(
    device: str, batch: Batch, vectors: npt.NDArray[np.float32], expected: Sequence[npt.NDArray[np.float32]], least: float
) -> None:
    """Raise BatchError (CANARY) if an echo differs from its text, or a canary's similarity to ``expected`` is below ``least``."""
    if batch.echoes:
        bins, segments, echoes = np.array(batch.echoes).T
        outputs, again = vectors[bins, segments], vectors[bins, echoes]
        same = np.array_equal(outputs, again, equal_nan=True) or np.abs(outputs - again).max() <= _ECHO * np.abs(outputs).max()
        if not same:
            raise BatchError(Failure.CANARY, f"{device} computed two vectors of the same text in one batch that differ")
    if not expected or not batch.canaries:
        return
    kind = batch.output_type
    outputs = np.concatenate([output_at(kind, canary.encoding, canary.slot, vectors) for canary in batch.canaries])
    known = np.concatenate([expected[canary.number] for canary in batch.canaries])
    similarity = least_similarity(kind, outputs, known)
    if not similarity >= least:
        message = f"{device} computed a canary at cosine {similarity:.6f} to its known vector; at least {least:g} is required"
        raise BatchError(Failure.CANARY, message)


def same_vectors(batch: Batch, vectors: npt.NDArray[np.float32], again: npt.NDArray[np.float32], least: float) -> bool:
    """Whether two computations of a batch gave the same vectors, but for rounding."""
    outputs = ((output_for(batch, index, vectors), output_for(batch, index, again)) for index in range(len(batch.slots)))
    return all(is_same(batch.output_type, first, second, least) for first, second in outputs)


def is_same(kind: OutputType, output: npt.NDArray[np.float32], known: npt.NDArray[np.float32], least: float) -> bool:
    """Whether an output is equal to a known one or, if not, similar enough."""
    return np.array_equal(output, known, equal_nan=True) or least_similarity(kind, output, known) >= least


def least_similarity(kind: OutputType, vectors: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """The minimum similarity between outputs [n, width]: the minimum cosine.

    For scores, which are too few numbers for a meaningful cosine: 1 minus the largest difference relative to the largest score.
    """
    if kind is OutputType.SCORES:
        return 1 - float(np.abs(vectors - expected).max() / max(1.0, np.abs(expected).max()))
    if kind is OutputType.SPARSE:  # a text may have no weights; the added column keeps its norm above 0
        vectors, expected = (np.concatenate([weights, np.ones_like(weights[:, :1])], axis=1) for weights in (vectors, expected))
    return least_cosine(vectors, expected)


def least_cosine(vectors: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """The minimum cosine between corresponding rows of [n, width], in float64; NaN if any number is not finite.

    Rows of zeros, which have no cosine, count as equal to each other.
    """
    a, b = vectors.astype(np.float64), expected.astype(np.float64)
    products, lengths = (a * b).sum(1), np.sqrt((a * a).sum(1) * (b * b).sum(1))
    both_zero = (lengths == 0) & ~(a.any(1) | b.any(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.where(both_zero, 1.0, products / lengths).min())
