"""The owner's side of one slot of a worker: it carries one batch at a time."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from npu_proxy.batch import Batch, BatchShape, Output
from npu_proxy.devices.failure import BatchError, Failure, classify_failure
from npu_proxy.devices.worker.messages import REPLY, REQUEST, receive
from npu_proxy.devices.worker.shared_memory import OUTPUT, MemoryLayout, SharedMemory

SEND_SECONDS = 5.0
"""Time limit for what takes no time unless the worker is stuck."""


class WorkerSlot:
    """Carries one batch at a time: its part of the shared memory, and the socket that announces a batch."""

    def __init__(self, name: str, number: int, memory: SharedMemory, layout: MemoryLayout) -> None:
        self._name = name
        self.mine: socket.socket
        self.theirs: socket.socket
        self.mine, self.theirs = socket.socketpair()
        self.since: float = 0.0
        """When the batch in progress was sent, in time.monotonic() seconds; 0 if there is none."""
        self.ended: BatchError = BatchError(Failure.CRASH, f"the worker process of {name} died")
        """The error raised for a batch if the worker ends."""
        self._number = 0
        self._index = {shape: index for index, shape in enumerate(layout.shapes)}
        self._views: dict[BatchShape, Mapping[str, npt.NDArray[Any]]] = {
            shape: memory.views(number, shape) for shape in layout.shapes
        }

    def begin(self, batch: Batch) -> None:
        """Send a batch to the worker. Raises BatchError if the worker is gone."""
        views = self._views[batch.shape]
        views[OUTPUT].fill(np.nan)  # what the worker does not write must not look like an output
        for name, array in batch.inputs.items():
            np.copyto(views[name], array)
        self._number += 1
        self.since = time.monotonic()
        self.mine.settimeout(SEND_SECONDS)
        try:
            self.mine.sendall(REQUEST.pack(self._number, self._index[batch.shape]))
        except OSError as error:
            self._raise_ended(error)

    def wait(self, batch: Batch, seconds: float) -> Output | None:
        """Wait for the batch's output. Returns None after ``seconds``. Raises BatchError."""
        took, message = 0.0, ""
        number, end = 0, time.monotonic() + seconds
        try:
            while number != self._number:  # the reply to an abandoned batch may come first
                self.mine.settimeout(max(0.001, end - time.monotonic()))
                reply = receive(self.mine, REPLY.size)
                if len(reply) < REPLY.size:
                    self._raise_ended(None)
                number, took, length = REPLY.unpack(reply)
                message = receive(self.mine, length).decode(errors="replace") if length else ""
        except TimeoutError:
            return None
        except OSError as error:
            self._raise_ended(error)
        self.since = 0.0
        if message:
            raise BatchError(classify_failure(message), f"{self._name} failed: {message}")
        return Output(self._views[batch.shape][OUTPUT].copy(), self._name, took)

    def _raise_ended(self, error: OSError | None) -> NoReturn:
        self.since = 0.0
        raise BatchError(self.ended.failure, str(self.ended)) from error

    def cut(self, reason: BatchError | None) -> None:
        """Close the socket, so that a thread waiting on it raises ``reason``."""
        self.ended = reason or self.ended
        try:
            self.mine.shutdown(socket.SHUT_RDWR)
        except OSError:  # the worker has closed its end
            return
