"""The CPU in this process, as a Device.

This file is longer than most, because computing a batch, examining a slot and repairing it change the same few slots.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from npu_proxy.batch import CPU_STYLE, Batch, BatchShape, GraphShape, Output, output_for
from npu_proxy.devices.base import DeviceReport, GoldenBatch
from npu_proxy.devices.canary import Guard, is_same
from npu_proxy.devices.examined import Examined
from npu_proxy.devices.failure import BatchError, Failure, first_line
from npu_proxy.devices.graphs import Graphs
from npu_proxy.devices.openvino import open_core
from npu_proxy.devices.shapes import dynamic_shapes
from npu_proxy.devices.slots import SlotPool, agreeing, slots_that_fit
from npu_proxy.devices.threads import WAIT_SECONDS, WAITING, DeviceThreads
from npu_proxy.errors import DeviceError
from npu_proxy.spec import ModelSpec
from npu_proxy.system import available_memory, available_threads
from npu_proxy.targets import TARGETS

Vectors = npt.NDArray[np.float32]

_ATTEMPTS = 3
"""How often a batch is computed in slots where a canary is wrong."""

_log = logging.getLogger("npu_proxy.devices")


@dataclass(eq=False)
class _Slot:
    """A compiled graph with one stream, and its only infer request. full: it takes full batches only, instead of any."""

    name: str
    full: bool
    threads: int
    infer_request: Any
    since: float | None = None
    """When its current batch began, in time.monotonic() seconds."""


class OpenVinoCpu:
    """The CPU as a Device.

    It has two kinds of graph. Full batches, from a deep queue, use one of fixed size, in which only attention depends on the bins;
    it is up to a fifth faster than the graph of dynamic size, which small batches from a shallow queue use. Batches of any other
    shape, which come from accelerators that failed, are accepted too.

    Each slot has a compiled graph with a single stream: one slot for small batches, ``streams`` for full ones. (If a model's limit
    is so low that there are no full batches, at least two slots take small ones.) Several streams of one graph would share its
    weights, but now and then one of them computes wrong vectors from the start, and a batch goes to whichever is free
    (docs/openvino-races.md). Golden texts pass through every slot before it serves, and later in turn; all slots must give the same
    vectors. The device serves when the first two do, while the others are compiled. A slot that differs, or in which a canary was
    wrong, is compiled again, and the batch is computed again; if that does not help, the slot is left out.
    """

    name = "cpu"
    kind = "cpu"

    def __init__(
        self,
        spec: ModelSpec,
        *,
        threads: int | None = None,
        streams: int | None = None,
        batch_tokens: int = 512,
        packed: bool = True,
        golden: GoldenBatch | None = None,
    ) -> None:
        """threads: None uses as many as affinity and cgroup allow.

        streams: full batches computed at once; None means one per thread, unless the weights would take too much memory.
        golden: without it, the slots are not examined.
        """
        self._spec = spec
        self._batch_tokens = batch_tokens
        self._golden = golden
        self._threads = threads or available_threads()
        weights = sum(file.stat().st_size for file in spec.weight_files)
        self.max_streams: int = streams or slots_that_fit(self._threads, weights, available_memory())
        self.streams: int = 1
        self.shapes: Sequence[BatchShape] = dynamic_shapes(spec.max_length, batch_tokens, packed=packed)
        self._reason = ""
        self._known: dict[bytes, Vectors] = {}
        """Outputs of golden texts, by the key of their encoding."""
        self._least_cosine = TARGETS["cpu"].kind.least_cosine[spec.precision]
        self._guard = Guard(self.name, self._least_cosine)
        self._repairing = threading.Lock()
        self._repairs = 0
        self._changing = threading.Lock()
        self._pools: dict[bool, SlotPool[_Slot]] = {True: SlotPool(), False: SlotPool()}
        """Free slots: for full batches (True), for any batch (False)."""
        share = max(1, self._threads // self.max_streams)
        numbers = [str(number) for number in range(self.max_streams if self._full_shapes() else max(2, self.max_streams))]
        kinds = [(number, bool(self._full_shapes()), share) for number in numbers]
        if self._full_shapes():
            kinds.insert(0, ("small", False, self._threads))
        try:
            graphs = Graphs(spec)
            self._slots = [_Slot(*kind, self._compile(graphs, full=kind[1], threads=kind[2])) for kind in kinds[:2]]
        except RuntimeError as error:
            raise DeviceError(f"the CPU could not compile {spec.name}: {first_line(error)}") from error
        self._workers = DeviceThreads(WAITING * self.max_streams, self.name)
        self._examined: Examined[tuple[str, BatchShape]] = Examined()
        if golden is not None:
            self._examine(golden)
        for slot in self._slots:
            self._pools[slot.full].put(slot)
        self._closing = threading.Event()
        self._growth = threading.Thread(target=self._grow, args=(graphs, kinds[2:]), name="npu-proxy-cpu-slots", daemon=True)
        self._growth.start()

    def _grow(self, graphs: Graphs, kinds: Sequence[tuple[str, bool, int]]) -> None:
        """Compile, examine and open the other slots, one after another, while the first ones serve."""
        for kind in kinds:
            if self._closing.is_set():
                return
            try:
                slot = _Slot(*kind, self._compile(graphs, full=kind[1], threads=kind[2]))
            except RuntimeError as error:
                _log.warning("cpu: slot %s could not be compiled: %s", kind[0], first_line(error))
                continue
            try:
                if self._golden is not None:
                    self._compare(slot, self._examination(self._golden))
            except BatchError as error:
                if self._repair(slot, error) is None:
                    continue
            with self._changing:
                self._slots = [*self._slots, slot]
            for shape in self._shapes_of(slot) if self._golden is not None else ():
                self._examined.mark((slot.name, shape))
            self.streams = max(1, sum(other.full == slot.full for other in self._slots))
            self._pools[slot.full].put(slot)
        graphs.release()

    # -- what the chain sees -------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether it accepts batches: as long as it has a slot that takes any."""
        return any(not slot.full for slot in self._slots)

    @property
    def busy_since(self) -> float | None:
        """When the batch that is being computed longest began."""
        return min((since for slot in self._slots if (since := slot.since) is not None), default=None)

    def takes(self, shape: BatchShape) -> bool:
        """Any shape."""
        return True

    def submit(self, batch: Batch) -> Future[Output]:
        """Compute vectors [bins, segments, width] float32. Fails with DeviceError."""
        return self._workers.submit(self._infer, batch)

    def reports(self) -> Sequence[DeviceReport]:
        """One report."""
        return [
            DeviceReport(
                name=self.name,
                kind=self.kind,
                state="failing" if self._reason or not self.ready else "serving",
                reason=self._reason,
                precision=self._spec.precision,
                restarts=self._repairs,
                slots=len(self._slots),
                guarded=self._guard.passed,
                canary_failures=self._guard.failures,
                examined=self._examined.share() if self._golden is not None else None,
            )
        ]

    def probe(self) -> None:
        """Compute a golden batch in the slot and shape examined longest ago, and compare it. Raises DeviceError."""
        key = self._examined.next()
        if key is not None:
            self._probe(*key)

    def doubt(self, reason: str) -> None:
        """Examine every slot now, because two computations of a batch gave different vectors."""
        _log.warning("cpu: %s; examining all slots", reason)
        for slot in self._slots:
            for shape in self._shapes_of(slot)[:1]:
                with suppress(DeviceError):  # the slot was left out
                    self._probe(slot.name, shape)

    def _probe(self, name: str, shape: BatchShape) -> None:
        slot = next((slot for slot in self._slots if slot.name == name), None)
        if self._golden is None or slot is None or self._pools[slot.full].take(WAIT_SECONDS, slot) is None:
            self._examined.drop((name, shape))
            return
        left: _Slot | None = slot
        try:
            self._compare(slot, [self._golden(shape)])
        except BatchError as error:
            left = self._repair(slot, error)
            if left is None:
                raise
        finally:
            if left is not None:
                self._pools[slot.full].put(left)
        self._examined.mark((name, shape))

    def close(self) -> None:
        """Stop the threads; the compiled graphs are freed with this object."""
        self._closing.set()
        for pool in self._pools.values():
            pool.close()
        self._workers.close()
        self._growth.join(timeout=WAIT_SECONDS)

    # -- one batch -----------------------------------------------------------------------------------------------

    def _infer(self, batch: Batch) -> Output:
        for attempt in range(_ATTEMPTS):
            pool = self._pool_for(batch.shape)
            slot = pool.take(WAIT_SECONDS)
            if slot is None:
                late = f"could not start a batch within {WAIT_SECONDS:g} seconds"
                raise BatchError(Failure.BUSY, f"the CPU {f'computes no batches: {self._reason}' if pool.closed else late}")
            start = time.perf_counter()
            try:
                vectors = self._run(slot, batch)
                self._guard.check(batch, vectors)
                return Output(vectors, self.name, time.perf_counter() - start, repaired=attempt > 0)
            except BatchError as error:
                if error.failure is not Failure.CANARY or attempt == _ATTEMPTS - 1:
                    raise
                slot = self._repair(slot, error)  # the batch is computed again, in this slot or in another
            finally:
                if slot is not None:
                    pool.put(slot)
        raise AssertionError

    def _pool_for(self, shape: BatchShape) -> SlotPool[_Slot]:
        return self._pools[shape.tokens == self._batch_tokens and any(slot.full for slot in self._slots)]

    def _run(self, slot: _Slot, batch: Batch) -> Vectors:
        """Compute a batch in a slot. Numbers that are not written are NaN."""
        shape = batch.shape
        vectors = np.full(self._spec.batch_layout.output(shape.bins, shape.positions, shape.segments), np.nan, np.float32)
        try:
            # Inputs and output are shared, not copied: the batch and the caller keep them alive until inference ends.
            slot.since = time.monotonic()
            slot.infer_request.set_output_tensor(ov.Tensor(vectors, shared_memory=True))
            slot.infer_request.infer(dict(batch.inputs), share_inputs=True)
        except RuntimeError as error:
            raise BatchError(Failure.ERROR, f"the CPU failed: {first_line(error)}") from error
        finally:
            slot.since = None
        return vectors

    # -- slots and their examination -----------------------------------------------------------------------------

    def _compile(self, graphs: Graphs, *, full: bool, threads: int) -> ov.InferRequest:
        graph = graphs(GraphShape(tokens=self._batch_tokens) if full else GraphShape(), CPU_STYLE)
        target = TARGETS["cpu"]
        wanted = {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
        compiled = open_core(target).compile_model(graph, target.openvino, target.requested(self._spec.precision, wanted))
        return compiled.create_infer_request()

    def _compile_again(self, slot: _Slot) -> None:
        graphs = Graphs(self._spec)
        slot.infer_request = self._compile(graphs, full=slot.full, threads=slot.threads)
        graphs.release()

    def _examine(self, golden: GoldenBatch) -> None:
        """Compute golden texts and canaries in all slots at once, and compare. Slots that differ are compiled again, then left out.

        Raises DeviceError if no two slots agree, or if no slot that takes any batch is right.
        """
        batches = self._examination(golden)
        found: list[dict[bytes, Vectors]] = []
        right: list[int] = []
        for attempt in range(2):
            found = [run.result() for run in [self._workers.submit(self._outputs, slot, batches) for slot in self._slots]]
            right = agreeing([[self._same(a, b) for b in found] for a in found])
            wrong = [slot for index, slot in enumerate(self._slots) if index not in right]
            if not wrong:
                break
            _log.warning("cpu: golden texts differ in slot %s", ", ".join(slot.name for slot in wrong))
            if not attempt:
                for slot in wrong if len(right) > 1 else self._slots:
                    self._compile_again(slot)
        if len(right) == 1 or all(self._slots[index].full for index in right):
            raise DeviceError(f"the CPU computes {self._spec.name} differently each time it compiles it")
        self._slots = [slot for index, slot in enumerate(self._slots) if index in right]
        self._known = found[right[0]]
        if not all(np.isfinite(output).all() for output in self._known.values()):
            hint = "its weights may be damaged" if self._spec.precision == "fp32" else "use `precision` fp32"
            raise DeviceError(f"the CPU computes numbers of {self._spec.name} that are not finite; {hint}")
        if len(batches) > 1:
            self._guard.canaries = [self._known[canary.key] for canary in golden.canaries]
        self._examined = Examined((slot.name, shape) for slot in self._slots for shape in self._shapes_of(slot))
        for slot in self._slots:
            self._examined.mark((slot.name, batches[0].shape))

    def _examination(self, golden: GoldenBatch) -> Sequence[Batch]:
        """A batch of golden texts and one of canaries, which every slot takes."""
        shape = min(self._full_shapes() or self.shapes, key=lambda shape: shape.positions)
        return [golden(shape), *([golden.canary_batch(shape)] if golden.canaries and shape.segments > 1 else [])]

    def _outputs(self, slot: _Slot, batches: Sequence[Batch]) -> dict[bytes, Vectors]:
        """The outputs of a slot, by the key of the text's encoding."""
        outputs: dict[bytes, Vectors] = {}
        for batch in batches:
            vectors = self._run(slot, batch)
            outputs.update((encoding.key, output_for(batch, index, vectors)) for index, encoding in enumerate(batch.encodings))
        return outputs

    def _same(self, outputs: Mapping[bytes, Vectors], known: Mapping[bytes, Vectors]) -> bool:
        """Whether the outputs of all texts that are in both are the same, but for rounding."""
        kind, least = self._spec.output_type, self._least_cosine
        return all(is_same(kind, outputs[key], known[key], least) for key in outputs.keys() & known.keys())

    def _full_shapes(self) -> list[BatchShape]:
        return [shape for shape in self.shapes if shape.tokens == self._batch_tokens]

    def _shapes_of(self, slot: _Slot) -> list[BatchShape]:
        """The shapes in which a slot is examined later; the longest would take too long."""
        return self._full_shapes() if slot.full else [shape for shape in self.shapes if shape.tokens < self._batch_tokens]

    def _compare(self, slot: _Slot, batches: Sequence[Batch]) -> None:
        """Compare golden texts in a slot with what is known, and add those that were not known. Raises BatchError."""
        outputs = self._outputs(slot, batches)
        if not self._same(outputs, self._known):
            raise BatchError(Failure.NUMBERS, f"golden texts are wrong in slot {slot.name}")
        self._known = {**outputs, **self._known}

    def _repair(self, slot: _Slot, why: BatchError) -> _Slot | None:
        """Compile a slot again and examine it. Returns None if that does not help; the slot is then left out."""
        with self._repairing:
            _log.warning("cpu: %s; compiling slot %s again", why, slot.name)
            self._repairs += 1
            try:
                self._compile_again(slot)
                if self._golden is not None:
                    self._compare(slot, self._examination(self._golden))
            except (RuntimeError, BatchError) as error:
                with self._changing:
                    self._slots = [other for other in self._slots if other is not slot]
                self._reason = f"slot {slot.name} was left out: {first_line(error)}"
                _log.error("cpu: %s", self._reason)
                if not any(other.full == slot.full for other in self._slots):
                    self._pools[slot.full].close()
                return None
            return slot
