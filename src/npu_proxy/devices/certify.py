"""Certification: before a device may serve, golden texts must give the vectors that fp32 on the CPU gives.

A clean compile is not a right answer (openvino issues 37264, 38100), so every start compares. Verdicts are kept, by
everything that can change the answer (model fingerprint, row shape, device, driver, versions): a failed one holds over
restarts.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from npu_proxy.devices.base import check_vectors, texts_of
from npu_proxy.devices.failure import Failure, RowError
from npu_proxy.graph.packed import RowShape
from npu_proxy.types import Kind, Output, Pack


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What a verdict is about."""

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
        """The name of its verdict."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:24]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What was found: the least cosine over the golden texts, and why it failed ('' when it passed)."""

    subject: Subject
    cosine: float
    reason: str
    unix: float


class Certificates:
    """Verdicts in a folder, a file each. anew: what is stored does not count, what is found is stored."""

    def __init__(self, folder: Path, *, anew: bool = False) -> None:
        self._folder = folder
        self._anew = anew
        self.found: list[Verdict] = []
        """The verdicts of this life, in order."""

    def find(self, subject: Subject) -> Verdict | None:
        """The stored verdict, if there is a readable one."""
        if self._anew:
            return None
        try:
            return msgspec.json.decode((self._folder / f"{subject.key}.json").read_bytes(), type=Verdict)
        except (OSError, ValueError):
            return None

    def keep(self, verdict: Verdict) -> None:
        """Store a verdict; with a full disk it holds for this life only."""
        self.found.append(verdict)
        path = self._folder / f"{verdict.subject.key}.json"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            partial.write_bytes(msgspec.json.encode(verdict))
            partial.replace(path)
        except OSError:
            return


def least_likeness(kind: Kind, one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """How alike answers [n, width] are at least: the smallest cosine.

    For scores, which are few numbers whose cosine says nothing, 1 less the largest difference as a share of the largest.
    """
    if kind is Kind.SCORES:
        return 1 - float(np.abs(one - other).max() / max(1.0, np.abs(other).max()))
    if kind is Kind.SPARSE:  # no weights at all are a vector too
        one, other = (np.concatenate([weights, np.ones_like(weights[:, :1])], axis=1) for weights in (one, other))
    return least_cosine(one, other)


def least_cosine(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """The smallest cosine between rows of [n, width], in float64."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    return float(((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())


def compare(name: str, row: Pack, output: Output, reference: Output, least: float) -> float:
    """The least cosine of a golden row against its reference. Raises RowError (NUMBERS) below ``least``."""
    check_vectors(name, row, output.vectors)
    cosine = least_likeness(row.kind, texts_of(row, output.vectors), texts_of(row, reference.vectors))
    if not cosine >= least:
        text = f"{name} answered golden texts at cosine {cosine:.6f} to what is right; {least:g} is asked for"
        raise RowError(Failure.NUMBERS, text)
    return cosine


def judge(
    subject: Subject,
    shape: RowShape,
    golden: Callable[[RowShape], Pack],
    run: Callable[[Pack], Output],
    reference: Callable[[Pack], Output],
    least: float,
) -> Verdict:
    """Run the golden row of a shape on device and reference. RowErrors other than wrong numbers are raised."""
    row = golden(shape)
    expected = reference(row)
    try:
        return Verdict(subject=subject, cosine=compare(subject.target, row, run(row), expected, least), reason="", unix=time.time())
    except RowError as error:
        if error.failure is not Failure.NUMBERS:
            raise
        return Verdict(subject=subject, cosine=0.0, reason=str(error), unix=time.time())
