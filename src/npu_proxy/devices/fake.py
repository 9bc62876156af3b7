"""A device without a model, for tests of what surrounds one: vectors that depend on the ids alone, and scripted failures."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from npu_proxy.devices.base import Report
from npu_proxy.errors import DeviceError
from npu_proxy.graph.packed import RowShape
from npu_proxy.types import Output, Pack, Shaped, Vector


def fake_vector(ids: Sequence[int], width: int) -> Vector:
    """The vector [width] float32 this device gives to a text of these ids, whatever lies beside it."""
    phases = np.arange(1, width + 1, dtype=np.float64)
    weights = np.arange(1, len(ids) + 1, dtype=np.float64)
    return np.sin(phases * float(np.dot(np.asarray(ids, np.float64), weights) % 7919 + 1)).astype(np.float32)


class FakeDevice:
    """A Device. ``script`` is called with each pack before it is answered, and may raise, wait or count."""

    kind = "fake"
    ready = True

    def __init__(
        self,
        *,
        width: int = 8,
        streams: int = 2,
        shapes: Sequence[RowShape] = (RowShape(bins=1, positions=64, segments=8), RowShape(bins=2, positions=64, segments=8)),
        seconds: float = 0.0,
        script: Callable[[Pack], None] = lambda pack: None,
        name: str = "fake",
    ) -> None:
        self.name = name
        self.width = width
        self.streams = self.most_streams = streams
        self.shapes = shapes
        self.packs: list[Pack] = []
        self.closed = False
        self._seconds = seconds
        self._script = script
        self._turn = threading.Event()  # never set: a wait on it is a bounded pause

    def takes(self, shape: Shaped) -> bool:
        """Any row."""
        return True

    def infer(self, pack: Pack, late: float = math.inf) -> Output:
        """Vectors [bins, segments, width], after the script has had its say."""
        start = time.perf_counter()
        self.packs.append(pack)
        self._script(pack)
        if self._seconds:
            self._turn.wait(self._seconds)
        vectors = np.zeros([pack.shape.bins, pack.shape.segments, self.width], np.float32)
        for slot in pack.slots:
            ids = pack.inputs["input_ids"][slot.bin][pack.inputs["segment_ids"][slot.bin] == slot.segment]
            vectors[slot.bin, slot.segment] = fake_vector(ids, self.width)
        return Output(vectors, self.name, time.perf_counter() - start)

    def reports(self) -> Sequence[Report]:
        """It serves."""
        return [Report(name=self.name, kind=self.kind, state="serving")]

    def probe(self) -> None:
        """Nothing to find out."""

    def close(self) -> None:
        """Remember that it was called."""
        self.closed = True


def fail(message: str = "scripted failure") -> Callable[[Pack], None]:
    """A script that always fails as a device does."""

    def script(pack: Pack) -> None:
        raise DeviceError(message)

    return script
