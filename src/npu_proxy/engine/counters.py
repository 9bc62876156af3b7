"""Counters of a pipeline since its start, and a snapshot of its state."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from npu_proxy.batch import Batch, Output
from npu_proxy.engine.queue import Depth
from npu_proxy.types import Lane


@dataclass(slots=True)
class Counters:
    """Totals since the pipeline's start; read them through Pipeline.stats()."""

    requests: int = 0
    texts: int = 0
    tokens: int = 0
    batches: int = 0
    positions: int = 0
    batch_texts: dict[int, int] = field(default_factory=dict[int, int])
    """Number of batches, by their number of texts."""
    batch_tokens: dict[int, int] = field(default_factory=dict[int, int])
    """Number of batches, by their number of useful tokens."""
    merged: int = 0
    abandoned: int = 0
    """Texts dropped before inference because the caller cancelled or the deadline passed."""
    refused: int = 0
    retries: int = 0
    """Attempts after a batch had failed on every device."""
    infer_seconds: float = 0.0
    faults: int = 0
    executed: dict[str, int] = field(default_factory=dict[str, int])
    """Texts, by the device that computed them."""
    fallbacks: dict[str, int] = field(default_factory=dict[str, int])
    """Texts not computed by the first device of the chain, by the device that computed them."""
    errors: dict[str, int] = field(default_factory=dict[str, int])

    def count_batch(self, batch: Batch, output: Output) -> None:
        """Count a batch that was computed."""
        texts, tokens = len(batch.slots), batch.tokens
        self.texts += texts
        self.tokens += tokens
        self.batches += 1
        _add(self.batch_texts, texts, 1)
        _add(self.batch_tokens, tokens, 1)
        self.positions += batch.shape.tokens
        self.infer_seconds += output.seconds
        self.retries += output.retries
        _add(self.executed, output.device, texts)
        if output.fallback:
            _add(self.fallbacks, output.device, texts)

    def count_error(self, kind: str) -> None:
        """Count a text that failed."""
        _add(self.errors, kind, 1)

    def copy(self, *, merged: int, abandoned: int) -> Counters:
        """A copy, with the values that the queue counts."""
        return replace(
            self,
            executed=dict(self.executed),
            fallbacks=dict(self.fallbacks),
            errors=dict(self.errors),
            batch_texts=dict(self.batch_texts),
            batch_tokens=dict(self.batch_tokens),
            merged=merged,
            abandoned=abandoned,
        )


def _add(counts: dict[Any, int], key: object, count: int) -> None:
    counts[key] = counts.get(key, 0) + count


@dataclass(frozen=True, kw_only=True)
class Stats:
    """A snapshot of a pipeline: its counters, its queue, and whether each stage's thread is alive.

    tokens_per_second: recent speed of full batches; 0 if it is unknown, as after a start.
    """

    counters: Counters
    depth: Depth
    lane_tokens: dict[Lane, int]
    open_texts: int
    stages: dict[str, bool]
    tokens_per_second: float
