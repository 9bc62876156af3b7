"""The interface between the engine and a device. Device errors leave this package only as DeviceError."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from npu_proxy.batch import Batch, BatchShape, Encoding, Output, text_outputs
from npu_proxy.devices.failure import BatchError, Failure
from npu_proxy.types import OutputType


class GoldenBatch(Protocol):
    """Makes batches of golden texts, for certification and examination. canaries: those that ride in other batches (canary.py)."""

    @property
    def canaries(self) -> Sequence[Encoding]: ...

    def __call__(self, shape: BatchShape) -> Batch:
        """A batch of golden texts in a shape."""
        ...

    def canary_batch(self, shape: BatchShape) -> Batch:
        """A batch of all canaries as its texts. Raises ValueError if they do not fit into the shape."""
        ...


@dataclass(frozen=True, kw_only=True)
class DeviceReport:
    """The state of a device, as /health reports it.

    state: `serving`, `waiting`, `compiling`, `certifying`, `recovering`, `failing`, `quarantined`, `absent`, `stopped`.
    certified: the minimum cosine to fp32 on the CPU over all golden texts and shapes; None until it is known.
    slots: how many serve; None if the device has none. guarded: batches whose canaries were right. canary_failures: batches thrown
    away because a canary was wrong. examined: the share of slots and shapes whose golden texts were compared in the last hour.
    """

    name: str
    kind: str
    state: str
    breaker: str = "closed"
    reason: str = ""
    worker_pid: int | None = None
    restarts: int = 0
    certified: float | None = None
    precision: str = "fp32"
    slots: int | None = None
    guarded: int = 0
    canary_failures: int = 0
    examined: float | None = None


class Device(Protocol):
    """Computes batches.

    name: as users write it in ``--device``; it appears in every result. kind: which rules apply to it (shapes, precision,
    isolation). ready: whether it accepts batches now. streams: how many batches it computes at once now, up to
    ``max_streams``. shapes: the batch shapes it currently handles best, in any order.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def ready(self) -> bool: ...
    @property
    def streams(self) -> int: ...
    @property
    def max_streams(self) -> int: ...
    @property
    def shapes(self) -> Sequence[BatchShape]: ...

    def takes(self, shape: BatchShape) -> bool:
        """Whether it can compute a batch of this shape. ``shapes`` may list fewer, and may have changed since packing."""
        ...

    def submit(self, batch: Batch) -> Future[Output]:
        """Compute a batch of a shape that it takes. Never blocks.

        The future returns vectors [bins, segments, width] float32 that the caller owns ([bins, positions, width] with one
        vector per token), or raises DeviceError. Cancelling it drops a batch that has not started.
        """
        ...

    def reports(self) -> Sequence[DeviceReport]:
        """The state of each device that this one consists of."""
        ...

    def probe(self) -> None:
        """Compute a golden batch now on each device that is ready, and compare it with what is known. Raises DeviceError."""
        ...

    def doubt(self, reason: str) -> None:
        """Examine the device, because a second computation of one of its batches gave other vectors."""
        ...

    def close(self) -> None:
        """Release compiled models, processes, threads and memory. Calling it again does nothing."""
        ...


class InProcessDevice(Device, Protocol):
    """A device in this process. busy_since: when the batch that it computes longest began, in time.monotonic() seconds, if any."""

    @property
    def busy_since(self) -> float | None: ...


def check_finite(device: str, vectors: npt.NDArray[np.float32]) -> None:
    """Raise BatchError unless all numbers are finite, including empty segments. One dot product, as every batch pays for it."""
    flat = vectors.ravel()
    if not math.isfinite(np.vdot(flat, flat)):
        raise BatchError(Failure.NUMBERS, f"{device} returned numbers that are not finite")


def check_vectors(device: str, batch: Batch, vectors: npt.NDArray[np.float32]) -> None:
    """Raise BatchError unless every text's vector is finite and nonzero: all that can be checked without a reference."""
    check_finite(device, vectors)
    if batch.output_type is OutputType.SPARSE:
        return  # a text may have no weights
    if not (np.linalg.norm(text_outputs(batch, vectors), axis=1) > 0).all():
        raise BatchError(Failure.NUMBERS, f"{device} returned vectors of length zero")
