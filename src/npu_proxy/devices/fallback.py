"""The chain of devices, itself a Device: a row goes to the first that is ready, and on to the next when that one fails.

Which device answered, and why it was not the first, stands in the Output. Nothing here knows OpenVINO.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace

from npu_proxy.devices.base import Device, LateError, Report
from npu_proxy.errors import DeviceError, UnavailableError
from npu_proxy.graph.packed import RowShape
from npu_proxy.types import Output, Pack, Shaped

_LATE_ROWS = 4
"""Usual rows in the time of one that is late."""

_DEAR = 1e6
"""Times the cost of rows of devices behind the first: only texts that need such a row go there, and what rides along."""

_RUNS = 2
"""Of a row in a race: the late one, and the one that starts anew."""

log = logging.getLogger("npu_proxy.devices")


class Fallback:
    """A Device over devices in order of preference."""

    def __init__(self, devices: Sequence[Device], *, hedge: float = 0.0, probe_every: float = 30.0) -> None:
        """hedge: seconds after which a row is also started on the next device, 0 for only when its time runs short.

        probe_every: seconds between test inferences on each device, 0 for none.
        """
        self._devices = devices
        self._hedge = hedge or math.inf
        self._usual: dict[str, float] = {}
        self._joined: dict[tuple[int, ...], Sequence[Shaped]] = {}
        self.name = ",".join(device.name for device in devices)
        self.kind = devices[0].kind
        self.most_streams = max(device.most_streams for device in devices)
        places = self.most_streams * max(1, len(devices) - 1)  # a row may be late on each device but the last
        self._races = threading.BoundedSemaphore(places)
        self._spare = ThreadPoolExecutor(_RUNS * places, "npu-proxy-late")  # never fewer: one run could wait for another
        self._stopping = threading.Event()
        self._prober = threading.Thread(target=self._probe, args=(probe_every,), name="npu-proxy-probe", daemon=True)
        if probe_every:
            self._prober.start()

    # -- what the engine sees ------------------------------------------------------------------------------------

    @property
    def first(self) -> Device:
        """The first device that is ready, or the first at all."""
        return next((device for device in self._devices if device.ready), self._devices[0])

    @property
    def ready(self) -> bool:
        """Whether any device is."""
        return any(device.ready for device in self._devices)

    @property
    def streams(self) -> int:
        """Those of the first device that is ready."""
        return self.first.streams

    @property
    def shapes(self) -> Sequence[Shaped]:
        """Those of the first device that is ready, and for texts too long for it those of the ones behind."""
        ready = tuple(number for number, device in enumerate(self._devices) if device.ready) or (0,)
        own = self._devices[ready[0]].shapes
        if len(ready) == 1:
            return own
        if ready not in self._joined:  # asked for several times a row; the shapes of a single device do not change
            self._joined[ready] = _with_longer([self._devices[number].shapes for number in ready])
        return self._joined[ready]

    def takes(self, shape: Shaped) -> bool:
        """What any of its devices takes."""
        return any(device.takes(shape) for device in self._devices)

    def infer(self, pack: Pack, late: float = math.inf) -> Output:
        """The row's vectors from the first device that gives them. Raises the last device's error, or UnavailableError."""
        return self._first(self._devices, pack, [])

    def reports(self) -> Sequence[Report]:
        """Every device's."""
        return [report for device in self._devices for report in device.reports()]

    def probe(self) -> None:
        """A test inference on each device that is ready, all of them. Raises the first error."""
        errors: list[DeviceError] = []
        for device in self._devices:
            try:
                if device.ready:
                    device.probe()
            except DeviceError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Close every device."""
        self._stopping.set()
        for device in self._devices:
            device.close()
        self._spare.shutdown(wait=True)
        if self._prober.is_alive():
            self._prober.join(timeout=10)

    # -- inside --------------------------------------------------------------------------------------------------

    def _first(self, devices: Sequence[Device], pack: Pack, reasons: list[str]) -> Output:
        """The first of ``devices`` that gives the row's vectors; reasons: why those before them did not."""
        last: DeviceError | None = None
        for number, device in enumerate(devices):
            if not device.ready:
                reasons.append(_why(device))
                continue
            if not device.takes(pack.shape):
                long = pack.shape.positions > max((shape.positions for shape in device.shapes), default=pack.shape.positions)
                why = "takes no row for a text that long" if long else "was not ready when the row was packed"
                reasons.append(f"{device.name} {why}")
                continue
            behind = devices[number + 1 :]
            try:
                output = device.infer(pack, self._late(device, pack) if behind else math.inf)
            except LateError as error:
                return self._race(error, behind, pack, reasons)
            except DeviceError as error:
                reasons.append(str(error))
                last = error
                continue
            usual = self._usual.get(device.name, output.seconds)
            self._usual[device.name] = output.seconds + 0.9 * (usual - output.seconds)
            return replace(output, fallback="; ".join(reasons)) if reasons else output
        if last is not None:
            raise last
        raise UnavailableError(f"no device is ready: {'; '.join(reasons)}")

    def _late(self, device: Device, pack: Pack) -> float:
        """Seconds after which a row on ``device`` is late: the setting's, or when half the row's time is over.

        Without the setting, a row that takes less than a few usual ones is slow, not late: to start it twice would only
        add to the load.
        """
        return min(self._hedge, max(_LATE_ROWS * self._usual.get(device.name, 0.0), _patience(pack)))

    def _race(self, late: LateError, behind: Sequence[Device], pack: Pack, reasons: list[str]) -> Output:
        """The late row goes on, and on ``behind`` it starts anew: the first answer counts. Raises the last device's error.

        A race keeps its place until both runs are over; where all places are taken, the late row is only waited for.
        """
        if not self._races.acquire(blocking=False):
            try:
                return late.pending()
            except DeviceError as error:
                return self._first(behind, pack, [*reasons, str(error)])
        slow = self._spare.submit(late.pending)
        other = self._spare.submit(self._first, behind, pack, [*reasons, str(late)])
        over = itertools.count(1)
        for run in (slow, other):
            run.add_done_callback(lambda _: self._races.release() if next(over) == _RUNS else None)
        runs: set[Future[Output]] = {slow, other}
        while runs:
            done, runs = wait(runs, return_when=FIRST_COMPLETED)
            for run in done:
                if run.exception() is None:
                    output = run.result()
                    return replace(output, fallback="; ".join(reasons)) if run is slow and reasons else output
        failed = (run.exception() for run in (other, slow))
        raise next((error for error in failed if isinstance(error, DeviceError)), late)

    def _probe(self, every: float) -> None:
        """A test inference on each device, every so many seconds."""
        while not self._stopping.wait(every):
            try:
                self.probe()
            except DeviceError as error:
                log.warning("probe: %s", error)
            except Exception:  # the thread must go on
                log.exception("probe: unexpected error")


def _patience(pack: Pack) -> float:
    """Half of the time that is left until the first deadline in the row: then there is still time for another device."""
    deadlines = [job.deadline for job in pack.jobs]
    return max(0.05, (min(deadlines) - time.monotonic()) / 2) if deadlines else math.inf


def _with_longer(shapes: Sequence[Sequence[Shaped]]) -> Sequence[Shaped]:
    """The first device's shapes, then those of each further one that are longer than all before, dear."""
    found = list(shapes[0])
    for behind in shapes[1:]:
        longest = max(shape.positions for shape in found)
        found += [
            RowShape(bins=one.bins, positions=one.positions, segments=one.segments, work=_DEAR * one.work)
            for one in behind
            if one.positions > longest
        ]
    return found


def _why(device: Device) -> str:
    report = device.reports()[0]
    return f"{device.name} is {report.state}" + (f": {report.reason}" if report.reason else "")
