"""What a pipeline has done, and a moment of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from npu_proxy.engine.queue import Depth
from npu_proxy.types import Lane, Output, Pack


@dataclass(slots=True)
class Counters:
    """What has happened since the start. Read it through Pipeline.stats()."""

    requests: int = 0
    texts: int = 0
    tokens: int = 0
    rows: int = 0
    positions: int = 0
    row_texts: dict[int, int] = field(default_factory=dict[int, int])
    """Rows by how many texts they had, and by their useful tokens."""
    row_tokens: dict[int, int] = field(default_factory=dict[int, int])
    merged: int = 0
    abandoned: int = 0
    """Texts dropped before inference: their callers had gone, or their time was over."""
    refused: int = 0
    infer_seconds: float = 0.0
    faults: int = 0
    executed: dict[str, int] = field(default_factory=dict[str, int])
    fallbacks: dict[str, int] = field(default_factory=dict[str, int])
    """Texts by the device that answered them in place of the first of the chain."""
    errors: dict[str, int] = field(default_factory=dict[str, int])

    def row(self, row: Pack, answer: Output) -> None:
        """A row was inferred."""
        texts, tokens = len(row.jobs), row.tokens
        self.texts += texts
        self.tokens += tokens
        self.rows += 1
        _add(self.row_texts, texts, 1)
        _add(self.row_tokens, tokens, 1)
        self.positions += row.shape.bins * row.shape.positions
        self.infer_seconds += answer.seconds
        _add(self.executed, answer.device, texts)
        if answer.fallback:
            _add(self.fallbacks, answer.device, texts)

    def error(self, kind: str) -> None:
        """A text failed."""
        _add(self.errors, kind, 1)

    def copy(self, *, merged: int, abandoned: int) -> Counters:
        """As it is now, with what the queue counts itself."""
        return replace(
            self,
            executed=dict(self.executed),
            fallbacks=dict(self.fallbacks),
            errors=dict(self.errors),
            row_texts=dict(self.row_texts),
            row_tokens=dict(self.row_tokens),
            merged=merged,
            abandoned=abandoned,
        )


def _add(counts: dict[Any, int], key: object, more: int) -> None:
    counts[key] = counts.get(key, 0) + more


@dataclass(frozen=True, kw_only=True)
class Stats:
    """A moment of the pipeline: counters, what waits, and whether every stage's thread lives."""

    counters: Counters
    depth: Depth
    lane_tokens: dict[Lane, int]
    open_texts: int
    stages: dict[str, bool]
