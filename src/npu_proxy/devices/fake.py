"""A device without a model, for tests: its vectors depend only on the token ids, and its failures can be scripted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from npu_proxy.batch import Batch, BatchShape, Output
from npu_proxy.devices.base import DeviceReport
from npu_proxy.devices.threads import DeviceThreads
from npu_proxy.errors import DeviceError
from npu_proxy.types import Vector


def fake_vector(ids: Sequence[int], width: int) -> Vector:
    """The vector [width] float32 that this device computes for a text of these ids, whatever else is in the batch."""
    phases = np.arange(1, width + 1, dtype=np.float64)
    weights = np.arange(1, len(ids) + 1, dtype=np.float64)
    return np.sin(phases * float(np.dot(np.asarray(ids, np.float64), weights) % 7919 + 1)).astype(np.float32)


class FakeDevice:
    """A Device for tests. ``script`` is called with each batch before it is computed; it may raise, wait or count."""

    kind = "fake"
    ready = True

    def __init__(
        self,
        *,
        width: int = 8,
        streams: int = 2,
        shapes: Sequence[BatchShape] = (
            BatchShape(bins=1, positions=64, segments=8),
            BatchShape(bins=2, positions=64, segments=8),
        ),
        seconds: float = 0.0,
        script: Callable[[Batch], None] = lambda batch: None,
        name: str = "fake",
        records: bool = True,
    ) -> None:
        """records: keep every batch in ``batches``."""
        self.name = name
        self.width = width
        self.streams: int = streams
        self.max_streams: int = streams
        self.shapes = shapes
        self.batches: list[Batch] = []
        self.closed: bool = False
        self.doubts: list[str] = []
        self._records = records
        self._seconds = seconds
        self._script = script
        self._began: dict[int, float] = {}
        """When the batches that are being computed began, by thread."""
        self._pause = threading.Event()  # never set; waiting for it pauses the thread
        self._threads = DeviceThreads(4 * streams, name)

    @property
    def busy_since(self) -> float | None:
        """When the batch that is being computed longest began."""
        return min(list(self._began.values()), default=None)

    def takes(self, shape: BatchShape) -> bool:
        """Any shape."""
        return True

    def submit(self, batch: Batch) -> Future[Output]:
        """Call the script, then compute vectors [bins, segments, width]."""
        return self._threads.submit(self.infer, batch)

    def infer(self, batch: Batch) -> Output:
        """Like ``submit``, but in the caller's thread."""
        start = time.perf_counter()
        if self._records:
            self.batches.append(batch)
        self._began[threading.get_ident()] = time.monotonic()
        try:
            self._script(batch)
            if self._seconds:
                self._pause.wait(self._seconds)
        finally:
            del self._began[threading.get_ident()]
        vectors = np.zeros([batch.shape.bins, batch.shape.segments, self.width], np.float32)
        for slot in batch.slots:
            ids = batch.inputs["input_ids"][slot.bin][batch.inputs["segment_ids"][slot.bin] == slot.segment]
            vectors[slot.bin, slot.segment] = fake_vector(ids, self.width)
        return Output(vectors, self.name, time.perf_counter() - start)

    def reports(self) -> Sequence[DeviceReport]:
        """Always serving."""
        return [DeviceReport(name=self.name, kind=self.kind, state="serving")]

    def probe(self) -> None:
        """Nothing to check."""

    def doubt(self, reason: str) -> None:
        """Record the reason."""
        self.doubts.append(reason)

    def close(self) -> None:
        """Stop the threads, and record that it was called."""
        self.closed = True
        self._threads.close()


def fail(message: str = "scripted failure") -> Callable[[Batch], None]:
    """A script that always raises DeviceError."""

    def script(batch: Batch) -> None:
        raise DeviceError(message)

    return script
