"""What the engine asks of a device. Device trouble never leaks above this package: it arrives as DeviceError."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from npu_proxy.types import Output, Pack, Shaped


class Device(Protocol):
    """Runs rows. ``infer`` may be called by up to ``streams`` threads at once and blocks until the row is done.

    name: as users write it in ``--device``; it stands in every result. kind: the rules that hold (shapes, precision,
    isolation). shapes: the rows it takes, any order.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def streams(self) -> int: ...
    @property
    def shapes(self) -> Sequence[Shaped]: ...

    def infer(self, pack: Pack) -> Output:
        """Vectors [bins, segments, width] float32 of one row, owned by the caller. Raises DeviceError."""
        ...

    def close(self) -> None:
        """Let go of compiled models and memory; a second call does nothing."""
        ...
