"""How much memory bodies and answers may hold, all together and for one client."""

from __future__ import annotations

from collections import Counter

from npu_proxy.errors import ClientLimitError, OverloadedError

SMALL = 64 * 1024
"""Bytes up to which a body or an answer is small: it is handled in the event loop, and has a reserve of memory."""
_SHARE = 0.5
"""The part that one client may hold, so that others are not locked out by it."""


class MemoryBudget:
    """Bytes that are held until they are released. Used in the event loop only.

    what: what is held, for messages; setting: the setting that limits it.
    """

    def __init__(self, what: str, setting: str, limit: int) -> None:
        self.limit: int = limit
        self.held: int = 0
        self._by_client: Counter[str] = Counter()
        self._what = what
        self._setting = setting

    def hold(self, client: str, size: int, *, reserve: float = 1.0) -> None:
        """Hold so many more bytes for a client. reserve: factor on the limit, for what is small.

        Raises OverloadedError if the budget is exceeded, ClientLimitError if the client has used its part; then nothing is held.
        """
        if self.held + size > reserve * self.limit:
            raise OverloadedError(f"too many large {self._what} at once (`{self._setting}`); try again later")
        if self._by_client[client] + size > reserve * _SHARE * self.limit:
            message = f"this client has too many large {self._what} at once (half of `{self._setting}`); send fewer at a time"
            raise ClientLimitError(message, retry_after=1.0)
        self.held += size
        self._by_client[client] += size

    def release(self, client: str, size: int) -> None:
        """Release bytes that were held."""
        self.held -= size
        self._by_client[client] -= size
        if self._by_client[client] <= 0:
            del self._by_client[client]
