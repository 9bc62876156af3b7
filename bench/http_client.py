"""A small HTTP/1.1 client over raw sockets, so that what is measured is the server, and not a client library."""

import asyncio
import time
from collections.abc import Callable
from typing import cast


class Connection(asyncio.Protocol):
    """Sends one prepared request after another; ``answered(status, seconds)`` says whether to go on."""

    def __init__(self, request: Callable[[], bytes], answered: Callable[[int, float], bool]) -> None:
        self.request, self.answered = request, answered
        self.buffer = b""
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.send()

    def send(self) -> None:
        self.begun = time.perf_counter()
        self.transport.write(self.request())

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(body) < length:
            return
        self.buffer = body[length:]
        if self.answered(int(head[9:12]), time.perf_counter() - self.begun):
            self.send()
        else:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)


def prepared(path: str, body: bytes, host: str = "localhost") -> bytes:
    """The bytes of a POST."""
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def rate(port: int, request: bytes, *, connections: int, seconds: float) -> float:
    """Requests per second that are answered with 200."""
    end = time.perf_counter() + seconds
    count = 0

    def answered(status: int, _: float) -> bool:
        nonlocal count
        assert status == 200, status
        count += 1
        return time.perf_counter() < end

    loop = asyncio.get_running_loop()
    begun = time.perf_counter()
    made = [
        await loop.create_connection(lambda: Connection(lambda: request, answered), "127.0.0.1", port) for _ in range(connections)
    ]
    await asyncio.gather(*(connection.lost for _, connection in made))
    return count / (time.perf_counter() - begun)
