"""What one accelerator has to show with golden texts: at its first start to be certified, then whenever it is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from npu_proxy.devices.base import GoldenRow
from npu_proxy.devices.certify import Certificates, Subject, Verdict, compare, judge
from npu_proxy.devices.kinds import Target
from npu_proxy.devices.worker import Hello
from npu_proxy.graph.packed import RowShape
from npu_proxy.types import ModelSpec, Output, Pack
from npu_proxy.version import __version__

Run = Callable[[Pack], Output]

_SAME = 0.999
"""Cosine of a golden row to what it must be, once the device is certified: below it the device gives wrong numbers."""


class QuarantinedError(Exception):
    """The device gives wrong vectors; it stays out until somebody changes something."""


class Examiner:
    """Of one device and model. ``reference`` gives the CPU's fp32 vectors of a row; it is let go of once all is certified."""

    def __init__(
        self,
        target: Target,
        spec: ModelSpec,
        shapes: Sequence[RowShape],
        golden: GoldenRow,
        reference: Run,
        certificates: Certificates,
    ) -> None:
        self._target = target
        self._spec = spec
        self._shapes = shapes
        self._golden = golden
        self._reference: Run | None = reference
        self._certificates = certificates
        self._expected: dict[RowShape, tuple[Pack, Output]] = {}
        self.cosine: float | None = None
        """The least over all golden texts and shapes, None before it is certified."""

    def examine(self, run: Run, hello: Hello) -> None:
        """Every row shape.

        Raises QuarantinedError for wrong numbers in the first examination, RowError for later ones, which may pass.
        """
        if self.cosine is None:
            self.cosine = min(self._certified(run, shape, hello) for shape in self._shapes)
            self._reference = None  # for int8 it is a model of its own
        else:
            self.cosine = min(self._again(run, shape) for shape in self._shapes)

    def probe(self, run: Run) -> None:
        """The smallest row shape. Raises RowError."""
        self._again(run, min(self._shapes, key=lambda shape: shape.tokens))

    def _certified(self, run: Run, shape: RowShape, hello: Hello) -> float:
        subject = self._subject(shape, hello)
        known = self._certificates.find(subject)
        if known is not None and known.reason:
            cure = f"`npu-proxy certify --device {self._target.name}` judges anew"
            raise QuarantinedError(f"{known.reason} (found before; {cure})")
        verdict = self._judge(run, shape, subject)
        if verdict.reason:  # once more, because a verdict stays: a driver just reset may have given one bad row
            verdict = self._judge(run, shape, subject)
        self._certificates.keep(verdict)
        if verdict.reason:
            raise QuarantinedError(verdict.reason)
        return verdict.cosine

    def _judge(self, run: Run, shape: RowShape, subject: Subject) -> Verdict:
        """Against fp32 on the CPU. Later golden rows are held to fp32 as well, or for int8 to what the device says now."""

        def remembered(row: Pack) -> Output:
            output = run(row)
            if self._spec.precision == "int8":
                self._expected[shape] = (row, output)
            return output

        def reference(row: Pack) -> Output:
            assert self._reference is not None
            self._expected[shape] = (row, self._reference(row))
            return self._expected[shape][1]

        return judge(subject, shape, self._golden, remembered, reference, self._target.kind.least_cosine[self._spec.precision])

    def _again(self, run: Run, shape: RowShape) -> float:
        row, expected = self._expected[shape]
        return compare(self._target.name, row, run(row), expected, _SAME)

    def _subject(self, shape: RowShape, hello: Hello) -> Subject:
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
