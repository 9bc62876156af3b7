"""Test inferences on the devices of a chain: now and then in the background, or when asked. Their results tell whom to trust."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass

from npu_proxy.devices.base import Device
from npu_proxy.devices.failure import WRONG, BatchError
from npu_proxy.devices.threads import DeviceThreads
from npu_proxy.errors import DeviceError

_SECONDS = 5.0
"""How long a probe may take."""

_log = logging.getLogger("npu_proxy.devices")


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """at: when a device was probed, in time.monotonic() seconds. error: what was wrong, "" if nothing."""

    at: float
    error: str


class Probes:
    """Probes devices every so many seconds until closed; 0 for only when asked."""

    def __init__(
        self,
        devices: Sequence[Device],
        every: float,
        *,
        computed_at: Mapping[str, float],
        found_wrong: Callable[[Device], None],
    ) -> None:
        """computed_at: when each device last computed a batch, by name. found_wrong: called with a device whose numbers are."""
        self._devices = devices
        self._computed_at = computed_at
        self._found_wrong = found_wrong
        self._results: dict[str, ProbeResult] = {}
        self._threads = DeviceThreads(2 * len(devices), "probe")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(every,), name="npu-proxy-probe", daemon=True)
        if every:
            self._thread.start()

    def last(self, name: str) -> ProbeResult | None:
        """The result of a device's last probe; None if there was none."""
        return self._results.get(name)

    def probe(self) -> None:
        """Probe every device that is ready, all at once, each for at most five seconds. Then raise the first error, if any."""
        ready = [device for device in self._devices if device.ready]
        repairs = [_repairs(device) for device in ready]
        runs = [self._threads.submit(device.probe) for device in ready]
        wait(runs, timeout=_SECONDS)
        errors: list[DeviceError] = []
        for device, run, repaired in zip(ready, runs, repairs, strict=True):
            error = self._error(device, run)
            if (isinstance(error, BatchError) and error.failure in WRONG) or _repairs(device) > repaired:
                self._found_wrong(device)
            self._results[device.name] = ProbeResult(time.monotonic(), "" if error is None else str(error))
            errors += [] if error is None else [error]
        if errors:
            raise errors[0]

    def trouble(self) -> str:
        """Why no device can be trusted now, or "": none is ready, or the last probe of each that is ready has failed."""
        reasons: list[str] = []
        for device in self._devices:
            if not device.ready:
                reasons.append(unready(device))
            elif (probe := self.last(device.name)) is None or not probe.error:
                return ""
            else:
                reasons.append(f"{device.name}: {probe.error}")
        return "; ".join(reasons)

    def close(self) -> None:
        """End the threads; close the devices first, so that no probe waits for one."""
        self._stopping.set()
        self._threads.close()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def _error(self, device: Device, run: Future[None]) -> DeviceError | None:
        if run.done() and not run.cancelled():
            error = run.exception()
            return error if error is None or isinstance(error, DeviceError) else DeviceError(f"{device.name}: {error}")
        run.cancel()
        if time.monotonic() - self._computed_at.get(device.name, -math.inf) <= _SECONDS:
            return None  # it is only busy
        return DeviceError(f"{device.name} did not compute golden texts within {_SECONDS:g} seconds")

    def _run(self, every: float) -> None:
        while not self._stopping.wait(every):
            try:
                self.probe()
            except DeviceError as error:
                _log.warning("probe: %s", error)
            except Exception:  # the thread must keep running
                _log.exception("probe: unexpected error")


def unready(device: Device) -> str:
    """The state of a device that is not ready, and why."""
    report = device.reports()[0]
    return f"{device.name} is {report.state}" + (f": {report.reason}" if report.reason else "")


def _repairs(device: Device) -> int:
    """How often parts of a device were found to be wrong and made anew."""
    return sum(report.restarts for report in device.reports())
