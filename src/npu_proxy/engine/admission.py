"""Whether a request may join the queue: how full it is, how fast it moves, and how long the request would wait. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from npu_proxy.errors import OverloadedError
from npu_proxy.types import Lane

_FADE = 0.98
"""Factor by which each new batch reduces the weight of the previous ones."""
_WAIT_SHARE = 0.7
"""Share of its time limit that a request may be expected to wait; a request that would wait longer is refused at once."""


@dataclass(slots=True)
class Throughput:
    """Speed of recent batches; older ones have exponentially less weight."""

    tokens: float = 0.0
    texts: float = 0.0
    seconds: float = 0.0

    def add(self, *, tokens: int, texts: int, seconds: float) -> None:
        """Count a batch. seconds: since the previous batch, or its own duration if the device was idle in between."""
        self.tokens = _FADE * self.tokens + tokens
        self.texts = _FADE * self.texts + texts
        self.seconds = _FADE * self.seconds + seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all streams together; 0 before the first batch."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_text(self) -> float:
        """Mean tokens per text; 0 before the first batch."""
        return self.tokens / self.texts if self.texts else 0.0


@dataclass(frozen=True, kw_only=True)
class QueueLoad:
    """Current load. texts: unfinished texts. tokens: waiting tokens per lane. untokenized: texts not yet tokenized, per lane."""

    texts: int
    tokens: Mapping[Lane, int]
    untokenized: Mapping[Lane, int]


@dataclass(frozen=True, kw_only=True)
class QueueLimits:
    """Maximum number of unfinished texts, and of waiting tokens."""

    texts: int
    tokens: int


def expected_wait(
    lane: Lane, tokens: Mapping[Lane, int], untokenized: Mapping[Lane, int], tokens_per_text: float, tokens_per_second: float
) -> float:
    """Expected seconds until a text that joins ``lane`` now is computed; 0 while the speed is unknown.

    tokens: waiting tokens per lane. untokenized: texts not yet in the queue, per lane, including the new ones.
    Interactive texts wait for their own lane only, bulk texts for both.
    """
    ahead = [lane] if lane is Lane.INTERACTIVE else list(Lane)
    waiting = sum(tokens[lane] + untokenized[lane] * tokens_per_text for lane in ahead)
    return waiting / tokens_per_second if tokens_per_second else 0.0


def check_admission(
    count: int, lane: Lane, seconds: float, *, load: QueueLoad, limits: QueueLimits, throughput: Throughput
) -> None:
    """Raise OverloadedError if there is no room for ``count`` texts, or if they would wait for most of their ``seconds``.

    load: includes the new texts in ``untokenized``, but not in ``texts``.
    """
    if not load.texts:
        return  # an idle engine accepts any request; its deadline is the only limit
    tokens, speed = sum(load.tokens.values()), throughput.tokens_per_second
    if load.texts + count > limits.texts or tokens > limits.tokens:
        raise OverloadedError(
            f"the queue is full ({load.texts} of {limits.texts} texts, {tokens} of {limits.tokens} tokens);"
            " try again later, or raise `max_queue_items` or `max_queue_tokens`",
            retry_after=max(1.0, tokens / speed) if speed else 1.0,
        )
    wait = expected_wait(lane, load.tokens, load.untokenized, throughput.tokens_per_text, speed)
    if wait > _WAIT_SHARE * seconds > 0:  # a request whose time is over fails by its deadline instead
        raise OverloadedError(
            f"the expected wait of {wait:.1f} seconds is too long for a request that must finish within {seconds:.3g} seconds;"
            " try again later, or increase its timeout",
            retry_after=max(1.0, wait - _WAIT_SHARE * seconds),
        )
