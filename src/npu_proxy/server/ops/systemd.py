"""Tell systemd when the server is ready, and that it is alive (sd_notify). Without systemd nothing is sent.

The watchdog is for faults that no thread of this process can notice, such as native code that never gives Python's lock back: then
nothing here runs, systemd gets no message, and restarts the service (WatchdogSec= and Restart= in deploy/systemd).
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import suppress


def notify(state: str) -> None:
    """Send a state such as ``READY=1`` to the socket that NOTIFY_SOCKET names."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address or not hasattr(socket, "AF_UNIX"):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, suppress(OSError):  # a lost message must not end the server
        sender.setblocking(False)
        sender.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


async def keep_watchdog(is_alive: Callable[[], bool]) -> None:
    """Send signs of life, twice in each WATCHDOG_USEC, for as long as ``is_alive``. Returns at once without a watchdog."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdigit() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        if is_alive():
            notify("WATCHDOG=1")
        await asyncio.sleep(int(microseconds) / 2e6)
