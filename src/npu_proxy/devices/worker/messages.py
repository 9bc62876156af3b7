"""What a worker process and its owner tell each other: the job, requests and replies, and the worker's greeting."""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from npu_proxy.devices.worker.compile_cache import CompileCache
from npu_proxy.devices.worker.shared_memory import MemoryLayout
from npu_proxy.spec import ModelSpec
from npu_proxy.targets import Target

CONTROL = struct.Struct("<i")
"""Owner to worker, on the control socket: the slot to compile again, without stored blobs; -1 for all slots, with them."""
ALL_SLOTS = -1
REQUEST = struct.Struct("<QI")
"""Owner to worker: number of the batch, index of its shape."""
REPLY = struct.Struct("<QdI")
"""Worker to owner: number of the batch, seconds on the device, bytes of the error message that follows (0: success)."""


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """Everything a worker needs. sockets: control, then one per slot; file descriptors, or the results of `socket.share`.

    slots: how many to compile; None means as many as the plugin recommends.
    """

    target: Target
    spec: ModelSpec
    layout: MemoryLayout
    properties: Mapping[str, object]
    slots: int | None
    cache: CompileCache | None
    store: Path | None
    faults: bool
    memory: int | str
    sockets: Sequence[int | bytes]
    owner: int


class Hello(msgspec.Struct, kw_only=True, array_like=True):
    """A worker's message after compiling: its properties, or why compiling failed."""

    slots: int = 0
    """How many batches it computes at once."""
    device: str = ""
    driver: str = ""
    openvino: str = ""
    seconds: float = 0.0
    failure: str = ""
    error: str = ""


def receive(source: socket.socket, count: int) -> bytes:
    """Read exactly ``count`` bytes, or fewer if the other side has closed. Raises TimeoutError after the socket's timeout."""
    content = source.recv(count)
    while 0 < len(content) < count:
        more = source.recv(count - len(content))
        if not more:
            break
        content += more
    return content
