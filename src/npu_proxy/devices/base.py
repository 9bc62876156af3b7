"""What the engine asks of a device. Device trouble never leaks above this package: it arrives as DeviceError."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from npu_proxy.devices.failure import Failure, RowError
from npu_proxy.graph.packed import RowShape
from npu_proxy.types import Kind, Output, Pack, Shaped

GoldenRow = Callable[[RowShape], Pack]
"""A row of golden texts of any shape: what probes and certification run."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What /health says of a device.

    state: `serving`, `waiting`, `compiling`, `certifying`, `recovering`, `quarantined`, `absent`, `stopped`.
    certified: the least cosine against fp32 on the CPU over all golden texts and shapes, None before that is known.
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


class LateError(RowError):
    """A row is not done after the time the caller gave it; ``pending`` waits for it on."""

    def __init__(self, message: str, pending: Callable[[], Output]) -> None:
        super().__init__(Failure.HANG, message)
        self.pending = pending


class Device(Protocol):
    """Runs rows. ``infer`` may be called by up to ``most_streams`` threads at once and blocks until the row is done.

    name: as users write it in ``--device``; it stands in every result. kind: the rules that hold (shapes, precision,
    isolation). ready: whether it takes rows at this moment. streams: rows it computes at once at this moment, never more
    than ``most_streams``. shapes: the rows it is best at, any order, at this moment.
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
    def most_streams(self) -> int: ...
    @property
    def shapes(self) -> Sequence[Shaped]: ...

    def takes(self, shape: Shaped) -> bool:
        """Whether it can run a row of this shape; ``shapes`` may be fewer, and may have changed since a row was packed."""
        ...

    def infer(self, pack: Pack, late: float = math.inf) -> Output:
        """Vectors [bins, segments, width] float32 of one row that it takes, owned by the caller. Raises DeviceError.

        late: seconds after which a device that can tell raises LateError while it goes on.
        """
        ...

    def reports(self) -> Sequence[Report]:
        """The state of each device behind this one."""
        ...

    def probe(self) -> None:
        """Run a golden row now, on each device that serves. Raises DeviceError."""
        ...

    def close(self) -> None:
        """Let go of compiled models, processes and memory; a second call does nothing."""
        ...


def texts_of(pack: Pack, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The vectors [texts, width] of a row's texts, in the order of its slots; what lies in empty segments means nothing.

    Where every token has a vector, those of all tokens, [tokens, width].
    """
    return np.concatenate([own(pack, number, vectors) for number in range(len(pack.slots))])


def own(pack: Pack, number: int, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What a row's output has for one of its jobs: [answers, width], or [tokens, width] where every token has a vector."""
    slot, job = pack.slots[number], pack.jobs[number]
    first, count = (slot.start, job.encoding.tokens) if pack.kind.per_token else (slot.segment, job.encoding.answers)
    return vectors[slot.bin, first : first + count]


def check_finite(device: str, vectors: npt.NDArray[np.float32]) -> None:
    """Raise RowError unless every vector is finite; empty segments are, too. One product, because every row pays for it."""
    flat = vectors.ravel()
    if not math.isfinite(np.vdot(flat, flat)):
        raise RowError(Failure.NUMBERS, f"{device} answered with numbers that are not finite")


def check_vectors(device: str, pack: Pack, vectors: npt.NDArray[np.float32]) -> None:
    """Raise RowError unless every text's vector is finite and has a length: what can be said without a reference."""
    check_finite(device, vectors)
    if pack.kind is Kind.SPARSE:
        return  # a text may have no weight at all
    if not (np.linalg.norm(texts_of(pack, vectors), axis=1) > 0).all():
        raise RowError(Failure.NUMBERS, f"{device} answered with vectors of no length")
