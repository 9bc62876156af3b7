"""The chain of devices, itself a Device: a batch goes to the first that is ready, then to the next if that one fails or is late.

The Output records which device computed it, and why it was not the first. This module does not use OpenVINO.
"""

from __future__ import annotations

import itertools
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace

from npu_proxy.batch import Batch, BatchShape, Output
from npu_proxy.devices.base import Device, DeviceReport
from npu_proxy.devices.canary import same_vectors
from npu_proxy.devices.failure import WRONG, BatchError
from npu_proxy.devices.futures import relay
from npu_proxy.devices.probes import Probes, unready
from npu_proxy.devices.threads import DeviceThreads
from npu_proxy.errors import DeviceError, UnavailableError

_FIRST_PAUSE = 0.1
"""Seconds before a batch that failed on every device starts again; doubled each time."""
_LATE_FACTOR = 4
"""A batch is late if it takes this many times as long as usual."""
_REMOTE_COST = 1e6
"""Cost factor for the shapes of later devices: only texts that need such a shape go there, and texts that fit beside them."""

_log = logging.getLogger("npu_proxy.devices")


class Fallback:
    """A Device that combines devices, in order of preference."""

    def __init__(
        self,
        devices: Sequence[Device],
        *,
        hedge: float | None = None,
        probe_every: float = 30.0,
        verify_every: int = 0,
        agreement: float = 0.998,
        max_retries: int = 0,
    ) -> None:
        """hedge: seconds after which a batch is also started on the next device; None waits until its time runs short.

        probe_every: seconds between test inferences on each device, 0 for none. verify_every: one in this many batches without a
        canary is computed twice, 0 for none. agreement: the minimum cosine of the two. max_retries: how often a batch that fails
        on every device starts again.
        """
        self._devices = devices
        self._hedge = hedge or math.inf
        self._usual: dict[str, float] = {}
        self._joined: dict[tuple[int, ...], Sequence[BatchShape]] = {}
        self.name: str = ",".join(device.name for device in devices)
        self.kind: str = devices[0].kind
        self.max_streams: int = max(device.max_streams for device in devices)
        places = self.max_streams * max(1, len(devices) - 1)  # a batch may be late on each device but the last
        self._hedges = threading.BoundedSemaphore(places)
        # One thread watches each stream's batch, and the others the hedges; with fewer, a batch could wait for another.
        self._threads = DeviceThreads(self.max_streams + 2 * places, "fallback")
        self._verify_every = verify_every
        self._agreement = agreement
        self._max_retries = max_retries
        self._origins = {device.name: _new_origin() for device in devices}
        """Which start of each device computes now. A new one begins when the device was found to be wrong."""
        self.on_wrong: Callable[[int], None] = lambda _: None
        """Called with an origin when what it computed cannot be trusted."""
        self._unguarded = itertools.count(1)
        self._computed_at: dict[str, float] = {}
        """When each device last computed a batch, by name."""
        self._stopping = threading.Event()
        self.probes: Probes = Probes(devices, probe_every, computed_at=self._computed_at, found_wrong=self._found_wrong)

    # -- what the engine sees ------------------------------------------------------------------------------------

    @property
    def first(self) -> Device:
        """The first device that is ready, or the first of the chain if none is."""
        return next((device for device in self._devices if device.ready), self._devices[0])

    @property
    def ready(self) -> bool:
        """Whether any device is ready."""
        return any(device.ready for device in self._devices)

    @property
    def streams(self) -> int:
        """The streams of the first device that is ready."""
        return self.first.streams

    @property
    def shapes(self) -> Sequence[BatchShape]:
        """The shapes of the first device that is ready, plus those of later devices for texts too long for it."""
        ready = tuple(number for number, device in enumerate(self._devices) if device.ready) or (0,)
        shapes = self._devices[ready[0]].shapes
        if len(ready) == 1:
            return shapes
        if ready not in self._joined:  # cached: read several times per batch, and a device's shapes do not change
            self._joined[ready] = _with_longer([self._devices[number].shapes for number in ready])
        return self._joined[ready]

    def takes(self, shape: BatchShape) -> bool:
        """Whether any device takes this shape."""
        return any(device.takes(shape) for device in self._devices)

    def submit(self, batch: Batch) -> Future[Output]:
        """Compute a batch on the first device that can. Fails with the last device's error, or with UnavailableError."""
        if self._is_sampled(batch):
            return self._threads.submit(self._verified, batch)
        if len(self._devices) == 1 and not _why_not(self._devices[0], batch):
            return self._alone(batch)  # there is nothing to watch for
        return self._threads.submit(self._persistently, batch)

    def reports(self) -> Sequence[DeviceReport]:
        """The reports of every device."""
        return [report for device in self._devices for report in device.reports()]

    def probe(self) -> None:
        """Run a test inference on every device that is ready, then raise the first error, if any."""
        self.probes.probe()

    def doubt(self, reason: str) -> None:
        """Every device."""
        for device in self._devices:
            device.doubt(reason)

    def close(self) -> None:
        """Close every device."""
        self._stopping.set()
        for device in self._devices:
            device.close()
        self._threads.close()
        self.probes.close()

    # -- internal ------------------------------------------------------------------------------------------------

    def _alone(self, batch: Batch) -> Future[Output]:
        """Compute a batch on the only device; a thread is needed only if that fails."""

        def failed(error: BaseException) -> Future[Output] | None:
            if isinstance(error, DeviceError) and self._may_retry(batch, 0):
                return self._threads.submit(self._persistently, batch, error)
            return None

        return relay(self._submit(self._devices[0], batch), failed=failed)

    def _persistently(self, batch: Batch, error: DeviceError | UnavailableError | None = None) -> Output:
        """Try the whole chain, with longer and longer pauses, as often as allowed and as the deadline permits.

        error: of a first attempt that was made before. Errors of texts never get here: devices see ids that were checked.
        """
        attempt = 0 if error is None else 1
        while True:
            if attempt:
                _log.info("a batch of %d texts failed on every device: %s; trying again", len(batch.slots), error)
                self._stopping.wait(_pause(attempt - 1))
            try:
                # Why no device was ready then is not why one is not now.
                output = self._run(self._devices, batch, [str(error)] if isinstance(error, DeviceError) else [])
            except (DeviceError, UnavailableError) as failure:
                if not self._may_retry(batch, attempt):
                    raise
                error = failure
                attempt += 1
            else:
                return replace(output, retries=attempt)

    def _may_retry(self, batch: Batch, attempt: int) -> bool:
        """Whether there is another attempt after this one, and time for it."""
        soon = time.monotonic() + _pause(attempt)
        return attempt < self._max_retries and soon < batch.deadline and not self._stopping.is_set()

    def _run(self, devices: Sequence[Device], batch: Batch, reasons: list[str]) -> Output:
        """The output of the first of ``devices`` that computes the batch. reasons: why earlier devices did not."""
        last: DeviceError | None = None
        for number, device in enumerate(devices):
            if reason := _why_not(device, batch):
                reasons.append(reason)
                continue
            behind = devices[number + 1 :]
            run = self._submit(device, batch)
            if behind and not wait([run], self._patience(device, batch)).done:
                return self._hedged(run, device, behind, batch, reasons)  # it tries the devices behind, too
            try:
                output = run.result()
            except DeviceError as error:
                reasons.append(str(error))
                last = error
                continue
            return replace(output, fallback="; ".join(reasons)) if reasons else output
        raise last or UnavailableError(f"no device is ready: {'; '.join(reasons)}")

    def _submit(self, device: Device, batch: Batch) -> Future[Output]:
        """Compute a batch on a device; the output carries its origin, even if the device is found to be wrong meanwhile."""
        origin = self._origins[device.name]

        def receive(output: Output) -> Output:
            self._computed_at[device.name] = time.monotonic()
            usual = self._usual.get(device.name, output.seconds)
            self._usual[device.name] = output.seconds + 0.9 * (usual - output.seconds)
            if output.repaired:
                self._found_wrong(device)
            return replace(output, origin=origin)

        def failed(error: BaseException) -> None:
            if isinstance(error, BatchError) and error.failure in WRONG:
                self._found_wrong(device)

        return relay(device.submit(batch), receive, failed)

    def _found_wrong(self, device: Device) -> None:
        """What the device computed since it was last examined as a whole cannot be trusted."""
        origin, self._origins[device.name] = self._origins[device.name], _new_origin()
        self.on_wrong(origin)

    def _is_sampled(self, batch: Batch) -> bool:
        """Whether to compute a batch twice."""
        return bool(self._verify_every) and not batch.canaries and next(self._unguarded) % self._verify_every == 0

    def _verified(self, batch: Batch) -> Output:
        """Compute a batch, then again on the last device of the chain. If they differ, both devices are examined.

        Then what the last device computes after its examination counts.
        """
        output = self._run(self._devices, batch, [])
        others = [device for device in self._devices if device.name != output.device and not _why_not(device, batch)]
        same = next(device for device in self._devices if device.name == output.device)
        second = others[-1] if others else same
        try:
            again = self._submit(second, batch).result()
        except DeviceError:  # only one device could compute it
            return output
        if same_vectors(batch, output.vectors, again.vectors, self._agreement):
            return output
        reason = f"two computations of a batch differ, on {output.device} and on {again.device}"
        for device in {id(device): device for device in (same, second)}.values():
            self._found_wrong(device)
            device.doubt(reason)
        return replace(self._run([second, *self._devices], batch, []), fallback=reason if others else "")

    def _patience(self, device: Device, batch: Batch) -> float | None:
        """Seconds after which a batch on ``device`` is late: the setting `hedge`, or half of its time; None means never.

        Without the setting, a batch that takes less than a few times as long as usual is slow rather than late: starting it
        twice would only add to the load.
        """
        # Half of the time until the first deadline is left for another device.
        half = max(0.05, (batch.deadline - time.monotonic()) / 2)
        seconds = min(self._hedge, max(_LATE_FACTOR * self._usual.get(device.name, 0.0), half))
        return None if math.isinf(seconds) else seconds

    def _hedged(self, late: Future[Output], device: Device, behind: Sequence[Device], batch: Batch, reasons: list[str]) -> Output:
        """The first output of two runs: the late batch continues, and also starts on ``behind``. Raises the last device's error.

        A hedge keeps its place until its own run is over; the late one may never be. If all places are taken, the late batch is
        only waited for.
        """
        if not self._hedges.acquire(blocking=False):
            try:
                return late.result()
            except DeviceError as error:
                return self._run(behind, batch, [*reasons, str(error)])
        reason = f"{device.name} did not finish a batch in time"
        other = self._threads.submit(self._run, behind, batch, [*reasons, reason])
        other.add_done_callback(lambda _: self._hedges.release())
        runs: set[Future[Output]] = {late, other}
        while runs:
            done, runs = wait(runs, return_when=FIRST_COMPLETED)
            for run in done:
                if not run.cancelled() and run.exception() is None:
                    output = run.result()
                    if run is other:
                        late.cancel()  # if it still waits for a free stream, it need not run
                    return replace(output, fallback="; ".join(reasons)) if run is late and reasons else output
        errors = (run.exception() for run in (other, late) if not run.cancelled())
        raise next((error for error in errors if isinstance(error, DeviceError)), DeviceError(reason))


def trouble(device: Device) -> str:
    """Why a device, or a chain of them, cannot be trusted to compute now; "" if it can."""
    if isinstance(device, Fallback):
        return device.probes.trouble()
    return "" if device.ready else f"{device.name} is not ready"


def _new_origin() -> int:
    return secrets.randbits(63) | 1


def _pause(attempt: int) -> float:
    """Seconds to wait after an attempt."""
    return _FIRST_PAUSE * 2.0**attempt


def _why_not(device: Device, batch: Batch) -> str:
    """Why a device cannot compute a batch, or "" if it can."""
    if not device.ready:
        return unready(device)
    if device.takes(batch.shape):
        return ""
    longest = max((shape.positions for shape in device.shapes), default=batch.shape.positions)
    too_long = batch.shape.positions > longest
    return f"{device.name} " + ("does not take texts of this length" if too_long else "was not ready when the batch was packed")


def _with_longer(shapes: Sequence[Sequence[BatchShape]]) -> Sequence[BatchShape]:
    """The first device's shapes, then from each later device those longer than all before, at a high cost."""
    joined = list(shapes[0])
    for further in shapes[1:]:
        longest = max(shape.positions for shape in joined)
        joined += [replace(shape, work=_REMOTE_COST * shape.work) for shape in further if shape.positions > longest]
    return joined
