"""Checks one accelerator with golden texts: certifies it at its first start, later checks that its output has not changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from npu_proxy.batch import Batch, BatchShape, Output
from npu_proxy.devices.base import GoldenBatch
from npu_proxy.devices.certify import Certificates, Subject, Verdict, compare, judge
from npu_proxy.devices.worker.main import Hello
from npu_proxy.spec import ModelSpec
from npu_proxy.targets import Target
from npu_proxy.version import __version__

Run = Callable[[Batch], Output]

_LEAST_COSINE = 0.999
"""The minimum cosine of a certified device's golden batch to its expected output; below it, the numbers are wrong."""


class QuarantinedError(Exception):
    """The device computes wrong vectors, so it stays out of service."""


class Examiner:
    """Checks one device and model. ``reference`` computes a batch in fp32 on the CPU; it is released after certification."""

    def __init__(
        self,
        target: Target,
        spec: ModelSpec,
        shapes: Sequence[BatchShape],
        golden: GoldenBatch,
        reference: Run,
        certificates: Certificates,
    ) -> None:
        self._target = target
        self._spec = spec
        self._shapes = shapes
        self._golden = golden
        self._reference: Run | None = reference
        self._certificates = certificates
        self._expected: dict[BatchShape, tuple[Batch, Output]] = {}
        self.cosine: float | None = None
        """The minimum over all golden texts and shapes; None before certification."""

    def examine(self, run: Run, hello: Hello) -> None:
        """Check every batch shape.

        The first check certifies: it raises QuarantinedError for wrong numbers. Later checks raise BatchError and may be repeated.
        """
        if self.cosine is None:
            self.cosine = min(self._certify(run, shape, hello) for shape in self._shapes)
            self._reference = None  # for int8 it is a separate model that takes memory
        else:
            self.cosine = min(self._recheck(run, shape) for shape in self._shapes)

    def probe(self, run: Run) -> None:
        """Check the smallest batch shape. Raises BatchError."""
        self._recheck(run, min(self._shapes, key=lambda shape: shape.tokens))

    def _certify(self, run: Run, shape: BatchShape, hello: Hello) -> float:
        subject = self._subject(shape, hello)
        known = self._certificates.find(subject)
        if known is not None and known.reason:
            hint = f"run `npu-proxy certify --device {self._target.name}` to check it again"
            raise QuarantinedError(f"{known.reason} (from an earlier check; {hint})")
        verdict = self._judge(run, shape, subject)
        if verdict.reason:  # retried, because verdicts are stored and a driver that was just reset may compute one bad batch
            verdict = self._judge(run, shape, subject)
        self._certificates.keep(verdict)
        if verdict.reason:
            raise QuarantinedError(verdict.reason)
        return verdict.cosine

    def _judge(self, run: Run, shape: BatchShape, subject: Subject) -> Verdict:
        """Compare with fp32 on the CPU. Later checks also compare with fp32 or, for int8, with this output of the device."""

        def recorded(batch: Batch) -> Output:
            output = run(batch)
            if self._spec.precision == "int8":
                self._expected[shape] = (batch, output)
            return output

        def reference(batch: Batch) -> Output:
            assert self._reference is not None
            self._expected[shape] = (batch, self._reference(batch))
            return self._expected[shape][1]

        return judge(subject, shape, self._golden, recorded, reference, self._target.kind.least_cosine[self._spec.precision])

    def _recheck(self, run: Run, shape: BatchShape) -> float:
        batch, expected = self._expected[shape]
        return compare(self._target.name, batch, run(batch), expected, _LEAST_COSINE)

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
