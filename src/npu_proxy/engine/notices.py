"""Log lines about requests that did not go as they should: at most one of each kind in a while, with the number left out.

They name the model, the device, numbers of texts and tokens and where the time went, never a text.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

INTERVAL_SECONDS = 10.0

_log = logging.getLogger("npu_proxy.engine")


class Notices:
    """Logs warnings of several kinds. Thread-safe."""

    def __init__(self, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._model = model
        self._clock = clock
        self._last: dict[str, float] = {}
        self._left_out: dict[str, int] = {}
        self._lock = threading.Lock()

    def warn(self, kind: str, message: str) -> None:
        """Log ``message`` unless this kind was logged within the last ten seconds."""
        now = self._clock()
        with self._lock:
            if now - self._last.get(kind, float("-inf")) < INTERVAL_SECONDS:
                self._left_out[kind] = self._left_out.get(kind, 0) + 1
                return
            self._last[kind] = now
            left_out = self._left_out.pop(kind, 0)
        more = f" ({left_out} more since the last such line)" if left_out else ""
        _log.warning("%s: %s: %s%s", self._model, kind, message, more)
