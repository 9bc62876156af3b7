"""Certification: a device may serve only if its vectors of golden texts match those computed in fp32 on the CPU.

A clean compilation does not guarantee correct results (openvino issues 37264, 38100), so every start compares. The key of a
stored verdict includes everything that can change the result (model fingerprint, batch shape, device, driver, versions), so
a failed verdict survives restarts.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path

import msgspec

from npu_proxy.batch import Batch, BatchShape, Output, text_outputs
from npu_proxy.devices.base import Device, GoldenBatch, check_vectors
from npu_proxy.devices.canary import least_similarity
from npu_proxy.devices.failure import BatchError, Failure
from npu_proxy.system import private_folder

LEAST_COSINE = 0.999
"""The minimum cosine of golden texts to what the device computed of them before; below it, the numbers are wrong."""


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What a verdict applies to."""

    fingerprint: str
    shape: str
    target: str
    device: str
    driver: str
    openvino: str
    npu_proxy: str
    precision: str

    @property
    def key(self) -> str:
        """The name of its verdict's file, without the suffix."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:24]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The result: the minimum cosine over the golden texts, and why it failed ("" if it passed)."""

    subject: Subject
    cosine: float
    reason: str
    unix: float

    @classmethod
    def of(cls, subject: Subject, cosine: float, reason: str) -> Verdict:
        """A verdict given now."""
        return cls(subject=subject, cosine=cosine, reason=reason, unix=time.time())


class Certificates:
    """Verdicts in a folder, one file each. fresh: ignore stored verdicts; new ones are still stored."""

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        self._folder = folder
        self._fresh = fresh
        self.found: list[Verdict] = []
        """The verdicts stored through this object, in order."""

    def find(self, subject: Subject) -> Verdict | None:
        """The stored verdict, or None if there is no readable one."""
        if self._fresh:
            return None
        try:
            return msgspec.json.decode((self._folder / f"{subject.key}.json").read_bytes(), type=Verdict)
        except (OSError, ValueError):
            return None

    def keep(self, verdict: Verdict) -> None:
        """Store a verdict. If it cannot be written, as on a full disk, it is only added to ``found``."""
        self.found.append(verdict)
        path = self._folder / f"{verdict.subject.key}.json"
        try:
            private_folder(self._folder)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            partial.write_bytes(msgspec.json.encode(verdict))
            partial.replace(path)
        except OSError:
            return


def compare(name: str, batch: Batch, output: Output, reference: Output, least: float) -> float:
    """The minimum cosine of a golden batch to its reference. Raises BatchError (NUMBERS) if it is below ``least``."""
    check_vectors(name, batch, output.vectors)
    vectors, expected = text_outputs(batch, output.vectors), text_outputs(batch, reference.vectors)
    cosine = least_similarity(batch.output_type, vectors, expected)
    if not cosine >= least:
        message = f"{name} computes golden texts at cosine {cosine:.6f} to the reference; at least {least:g} is required"
        raise BatchError(Failure.NUMBERS, message)
    return cosine


class KnownOutputs:
    """Compares what devices compute of golden texts with what they gave first: one device again later, or several in turn."""

    def __init__(self, golden: GoldenBatch, least: float, reference: Callable[[Batch], Output] | None = None) -> None:
        """least: the minimum cosine. reference: computes what is known; None takes the first output of the smallest shape.

        With a reference, the shape with the most bins is compared too.
        """
        self._golden = golden
        self._least = least
        self._reference = reference
        self._known: dict[BatchShape, Output] = {}

    def compare(self, device: Device, seconds: float | None = None) -> float:
        """The minimum cosine of a device's outputs. Raises BatchError, of kind HANG after ``seconds`` for one batch."""
        shapes = [min(device.shapes, key=lambda shape: shape.tokens)]
        if self._reference is not None:
            shapes.append(max(device.shapes, key=lambda shape: shape.bins))
        return min(self._compare(device, self._golden(shape), seconds) for shape in shapes)

    def _compare(self, device: Device, batch: Batch, seconds: float | None) -> float:
        try:
            output = device.submit(batch).result(seconds)
        except FutureTimeoutError:
            message = f"{device.name} did not compute golden texts within {seconds:g} seconds"
            raise BatchError(Failure.HANG, message) from None
        if batch.shape not in self._known:
            self._known[batch.shape] = output if self._reference is None else self._reference(batch)
        return compare(device.name, batch, output, self._known[batch.shape], self._least)
