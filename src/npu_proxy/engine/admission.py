"""Whether a request may join the queue: how full it is, how fast it moves, and how long the request would wait. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from npu_proxy.errors import ClientLimitError, OverloadedError, RequestTooLargeError
from npu_proxy.types import Client, Pair, TextInput

_FADE = 0.98
"""Factor by which each new amount reduces the weight of the previous ones."""
_WAIT_SHARE = 0.7
"""Share of its time limit that a request may be expected to wait; a request that would wait longer is refused at once."""
_SLOWER = 3.0
"""How much longer than at the measured speed a request may take, since others may be computed beside it."""
_HOPELESS = 2.0
"""Factor by which a request must exceed its time limit at the measured speed to be refused before it is computed."""
_CHARACTERS_PER_TOKEN = 4
_SPECIAL_TOKENS = 2


def estimated_tokens(texts: Sequence[TextInput], limit: int) -> int:
    """About how many tokens texts have, before they are tokenized. limit: maximum per text."""
    return sum(min(limit, _estimated(text)) for text in texts)


def _estimated(text: TextInput) -> int:
    if isinstance(text, str):
        return len(text) // _CHARACTERS_PER_TOKEN + _SPECIAL_TOKENS
    if isinstance(text, Pair):
        return (len(text.first) + len(text.second)) // _CHARACTERS_PER_TOKEN + _SPECIAL_TOKENS
    return len(text) + _SPECIAL_TOKENS


@dataclass(slots=True)
class RecentRatio:
    """The ratio of two sums, such as tokens per second, in which older amounts have exponentially less weight."""

    amount: float = 0.0
    per: float = 0.0

    def add(self, amount: float, per: float) -> None:
        """Add to both sums."""
        self.amount = _FADE * self.amount + amount
        self.per = _FADE * self.per + per

    @property
    def value(self) -> float:
        """The ratio; 0 if it is unknown."""
        return self.amount / self.per if self.per else 0.0


def time_limit(seconds: float | None, *, timeout: float, bulk_timeout: float) -> float:
    """Seconds for a request that sets no limit: ``timeout``, and for a large one more, up to ``bulk_timeout``.

    seconds: how long it takes at the measured speed if nothing else is computed; None if that is unknown, as after a start.
    """
    return max(timeout, bulk_timeout if seconds is None else min(bulk_timeout, timeout + _SLOWER * seconds))


@dataclass(frozen=True, kw_only=True)
class QueueLoad:
    """Current load. texts: unfinished texts. tokens: waiting tokens. client_texts: unfinished texts of the client that asks.

    ahead: waiting tokens that would be computed before the new texts, which are included. own: tokens of the new texts.
    """

    texts: int
    tokens: float
    client_texts: int
    ahead: float
    own: float = 0.0


@dataclass(frozen=True, kw_only=True)
class QueueLimits:
    """Maximum number of unfinished texts, and of waiting tokens."""

    texts: int
    tokens: int


def check_admission(
    count: int, client: Client, seconds: float, *, load: QueueLoad, limits: QueueLimits, tokens_per_second: float
) -> None:
    """Raise OverloadedError if there is no room for ``count`` texts, or if they would wait for most of their ``seconds``.

    tokens_per_second: recent speed; 0 if it is unknown. Raises ClientLimitError if the client has too many texts in the queue, and
    RequestTooLargeError if they cannot be computed within ``seconds`` even if nothing else is.
    """
    if client.max_texts is not None and load.client_texts + count > client.max_texts:
        message = f"this API key may have {client.max_texts} texts in the queue at once (now {load.client_texts}, and {count} more)"
        raise ClientLimitError(f"{message}; send fewer at once", retry_after=1.0)
    speed = tokens_per_second
    if speed and count > 1 and 0 < _HOPELESS * seconds < load.own / speed:
        fitting = max(1, int(count * seconds * speed / load.own / _HOPELESS))
        raise RequestTooLargeError(
            f"{count} texts of about {load.own:.0f} tokens take about {load.own / speed:.3g} seconds on this machine, and may take"
            f" {seconds:.3g}; send up to {fitting} such texts at once, or increase the timeout (`bulk_timeout` on the server)"
        )
    if not load.texts:
        return  # an idle engine accepts any other request
    if load.texts + count > limits.texts or load.tokens > limits.tokens:
        raise OverloadedError(
            f"the queue is full ({load.texts} of {limits.texts} texts, {load.tokens:.0f} of {limits.tokens} tokens);"
            " try again later, or raise `max_queue_items` or `max_queue_tokens`",
            retry_after=max(1.0, load.tokens / speed) if speed else 1.0,
        )
    wait = load.ahead / speed if speed else 0.0
    if wait > _WAIT_SHARE * seconds > 0:  # a request whose time is over fails by its deadline instead
        raise OverloadedError(
            f"the expected wait of {wait:.1f} seconds is too long for a request that must finish within {seconds:.3g} seconds;"
            " try again later, or increase its timeout",
            retry_after=max(1.0, wait - _WAIT_SHARE * seconds),
        )
