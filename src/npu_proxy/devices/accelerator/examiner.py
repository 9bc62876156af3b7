"""Checks one accelerator with golden texts: certifies it at its first start, later checks that its output has not changed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt

from npu_proxy.batch import Batch, BatchShape, Output, output_for
from npu_proxy.devices.base import GoldenBatch
from npu_proxy.devices.certify import LEAST_COSINE, Certificates, Subject, Verdict, compare
from npu_proxy.devices.examined import Examined
from npu_proxy.devices.failure import BatchError, Failure
from npu_proxy.devices.worker.messages import Hello
from npu_proxy.spec import ModelSpec
from npu_proxy.targets import Target
from npu_proxy.version import __version__

Run = Callable[[Batch, int], Future[Output]]
"""Computes a batch in a certain slot."""

_log = logging.getLogger("npu_proxy.devices")


class QuarantinedError(Exception):
    """The device computes wrong vectors, so it stays out of service."""


class Examiner:
    """Checks every slot of one device and model. ``reference`` computes a batch in fp32 on the CPU; certification needs it."""

    def __init__(
        self,
        target: Target,
        spec: ModelSpec,
        shapes: Sequence[BatchShape],
        golden: GoldenBatch,
        reference: Callable[[Batch], Output],
        certificates: Certificates,
    ) -> None:
        self._target = target
        self._spec = spec
        self._shapes = shapes
        self._golden = golden
        self._reference: Callable[[Batch], Output] | None = reference
        self._certificates = certificates
        self._batches: Sequence[Batch] = ()
        """A golden batch per shape, then one of the canaries."""
        self._known: list[Output | None] = []
        """The output of each of these batches: that of fp32 on the CPU or, for int8, that of the first slot that passed."""
        self._fp32: list[Output] = []
        self._examined: Examined[tuple[int, int]] = Examined()
        self.cosine: float | None = None
        """The minimum over all golden texts, shapes and slots; None before certification."""
        self.canaries: Sequence[npt.NDArray[np.float32]] = ()
        """The known output of each canary."""

    @property
    def share(self) -> float:
        """The share of slots and shapes that were examined in the last hour."""
        return self._examined.share()

    def examine(self, run: Run, hello: Hello, recompile_slot: Callable[[int], None]) -> list[int]:
        """Check every batch shape in every slot, then all slots at once. Returns the slots that passed.

        A slot that fails is compiled again, and left out if it fails again. If none passes, the first examination, which certifies,
        raises QuarantinedError, and later ones raise BatchError and may be repeated.
        """
        subjects = [self._subject(shape, hello) for shape in self._shapes]
        certifies = self.cosine is None
        if certifies:
            for subject in subjects:
                known = self._certificates.find(subject)
                if known is not None and known.reason:
                    hint = f"run `npu-proxy certify --device {self._target.name}` to check it again"
                    raise QuarantinedError(f"{known.reason} (from an earlier check; {hint})")
        self.prepare()
        results = {slot: self._examine_slot(run, slot, recompile_slot) for slot in range(hello.slots)}
        passed = {slot: result for slot, result in results.items() if not isinstance(result, BatchError)}
        if not passed:
            failure = next(result for result in results.values() if isinstance(result, BatchError))
            if certifies:
                self._keep(subjects, [0.0] * len(subjects), str(failure))
                raise QuarantinedError(str(failure))
            raise failure
        self._check_at_once(run, list(passed))
        lowest = [min(cosines) for cosines in zip(*passed.values(), strict=True)]
        if certifies:
            self._keep(subjects, lowest[: len(subjects)], "")
            self._reference = None  # for int8 it is a separate model that takes memory
            self._fp32 = []
        self.cosine = min(lowest)
        self._examined = Examined()
        for slot in passed:
            for index in range(len(self._shapes)):
                self._examined.mark((slot, index))
        return list(passed)

    def probe(self, run: Run) -> None:
        """Check the slot and shape whose examination is longest ago. Raises BatchError."""
        key = self._examined.next()
        if key is not None:
            self._check(run, *key)
            self._examined.mark(key)

    def prepare(self) -> None:
        """Compute the golden batches in fp32 on the CPU, once. Raises BatchError."""
        if self._batches:
            return
        assert self._reference is not None
        batches = [self._golden(shape) for shape in self._shapes]
        roomiest = max(self._shapes, key=lambda shape: shape.segments)
        if self._golden.canaries and roomiest.segments > 1:
            batches.append(self._golden.canary_batch(roomiest))
        self._fp32 = [self._reference(batch) for batch in batches]
        self._known = [None] * len(batches)
        self._batches = batches

    def _examine_slot(self, run: Run, slot: int, recompile_slot: Callable[[int], None]) -> list[float] | BatchError:
        """The cosine of each batch in a slot, or why the slot has failed twice. Raises BatchError for other failures."""
        result = self._check_slot(run, slot)
        if isinstance(result, BatchError):
            _log.warning("%s: slot %d fails its examination and is compiled again: %s", self._target.name, slot, result)
            recompile_slot(slot)
            result = self._check_slot(run, slot)
        return result

    def _check_slot(self, run: Run, slot: int) -> list[float] | BatchError:
        try:
            return [self._check(run, slot, index) for index in range(len(self._batches))]
        except BatchError as error:
            if error.failure is not Failure.NUMBERS:
                raise
            return error

    def _check(self, run: Run, slot: int, index: int) -> float:
        """Compute one of the batches in a slot and compare it. Raises BatchError."""
        batch, known = self._batches[index], self._known[index]
        output = run(batch, slot).result()
        if known is not None:
            return compare(self._target.name, batch, output, known, LEAST_COSINE)
        least = self._target.kind.least_cosine[self._spec.precision]
        cosine = compare(self._target.name, batch, output, self._fp32[index], least)
        known = self._known[index] = output if self._spec.precision == "int8" else self._fp32[index]
        if index == len(self._shapes):
            by_key = {encoding.key: output_for(batch, text, known.vectors) for text, encoding in enumerate(batch.encodings)}
            self.canaries = [by_key[canary.key] for canary in self._golden.canaries]
        return cosine

    def _check_at_once(self, run: Run, slots: Sequence[int]) -> None:
        """Compute the largest golden batch in all slots at the same time. Raises BatchError."""
        index = max(range(len(self._shapes)), key=lambda index: self._shapes[index].tokens)
        runs = [run(self._batches[index], slot) for slot in slots]
        for output in [one.result() for one in runs]:
            known = self._known[index]
            assert known is not None
            compare(self._target.name, self._batches[index], output, known, LEAST_COSINE)

    def _keep(self, subjects: Sequence[Subject], cosines: Sequence[float], reason: str) -> None:
        for subject, cosine in zip(subjects, cosines, strict=True):
            self._certificates.keep(Verdict.of(subject, cosine, reason))

    def _subject(self, shape: BatchShape, hello: Hello) -> Subject:
        return Subject(
            fingerprint=self._spec.fingerprint,
            shape=f"{shape}x{shape.segments}",
            target=self._target.name,
            device=hello.device,
            driver=hello.driver,
            openvino=hello.openvino,
            npu_proxy=__version__,
            precision=self._spec.precision,
        )
