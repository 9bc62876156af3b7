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
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from npu_proxy.batch import Batch, BatchShape, Output, text_outputs
from npu_proxy.devices.base import check_vectors
from npu_proxy.devices.failure import BatchError, Failure
from npu_proxy.types import OutputType


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
            self._folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            partial.write_bytes(msgspec.json.encode(verdict))
            partial.replace(path)
        except OSError:
            return


def least_similarity(kind: OutputType, vectors: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """The minimum similarity between outputs [n, width]: the minimum cosine.

    For scores, which are too few numbers for a meaningful cosine: 1 minus the largest difference relative to the largest score.
    """
    if kind is OutputType.SCORES:
        return 1 - float(np.abs(vectors - expected).max() / max(1.0, np.abs(expected).max()))
    if kind is OutputType.SPARSE:  # a text may have no weights; the added column keeps its norm above 0
        vectors, expected = (np.concatenate([weights, np.ones_like(weights[:, :1])], axis=1) for weights in (vectors, expected))
    return least_cosine(vectors, expected)


def least_cosine(vectors: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """The minimum cosine between corresponding rows of [n, width], in float64."""
    a, b = vectors.astype(np.float64), expected.astype(np.float64)
    return float(((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())


def compare(name: str, batch: Batch, output: Output, reference: Output, least: float) -> float:
    """The minimum cosine of a golden batch to its reference. Raises BatchError (NUMBERS) if it is below ``least``."""
    check_vectors(name, batch, output.vectors)
    vectors, expected = text_outputs(batch, output.vectors), text_outputs(batch, reference.vectors)
    cosine = least_similarity(batch.output_type, vectors, expected)
    if not cosine >= least:
        message = f"{name} computes golden texts at cosine {cosine:.6f} to the reference; at least {least:g} is required"
        raise BatchError(Failure.NUMBERS, message)
    return cosine


def judge(
    subject: Subject,
    shape: BatchShape,
    golden: Callable[[BatchShape], Batch],
    run: Callable[[Batch], Output],
    reference: Callable[[Batch], Output],
    least: float,
) -> Verdict:
    """Compare a shape's golden batch on the device with the reference. Raises BatchError for failures other than wrong numbers."""
    batch = golden(shape)
    expected = reference(batch)
    try:
        cosine = compare(subject.target, batch, run(batch), expected, least)
    except BatchError as error:
        if error.failure is not Failure.NUMBERS:
            raise
        return Verdict(subject=subject, cosine=0.0, reason=str(error), unix=time.time())
    return Verdict(subject=subject, cosine=cosine, reason="", unix=time.time())
