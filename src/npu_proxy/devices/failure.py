"""What went wrong on a device, by the text of its error: drivers raise RuntimeError for everything."""

from __future__ import annotations

import re
from enum import StrEnum

from npu_proxy.errors import DeviceError


class Failure(StrEnum):
    """Kinds of trouble; breaker.py says what each leads to."""

    ABSENT = "absent"
    """There is no such device, or no driver, runtime or compiler for it."""
    COMPILE = "compile"
    LOST = "lost"
    """The device fell off its bus or its driver reset it."""
    HANG = "hang"
    """A row, or the worker's heartbeat, is overdue."""
    CRASH = "crash"
    """The worker process died."""
    NUMBERS = "numbers"
    """NaN, infinity, or vectors that differ from the CPU's."""
    ERROR = "error"
    """Anything else, once."""
    BUSY = "busy"
    """Nothing is wrong with the device, it had no room for the row in time."""


class RowError(DeviceError):
    """A DeviceError that says which kind of failure it was."""

    def __init__(self, failure: Failure, message: str) -> None:
        super().__init__(message)
        self.failure = failure


_ABSENT = (
    "No available backend",
    "driver wasn't found",
    r"Could not find an? \w+ device",
    "Incompatibility between NPU plugin and driver",
    "Cannot load library",
    "not registered in the OpenVINO",
    "compiler loading failed",
    "No device found",
    "Device with .* name is not",
)
_COMPILE = (
    "StopLocationVerifierPass",
    "ZE_RESULT_ERROR_UNSUPPORTED",
    "ZE_RESULT_ERROR_MODULE_BUILD",
    "[Cc]ompilation (failed|error)",
)
_LOST = ("DEVICE_LOST", "0x70000001", "DEVICE_REMOVED")
_SIGNS = (
    (Failure.LOST, "|".join(_LOST)),
    (Failure.ABSENT, "|".join(_ABSENT)),
    (Failure.COMPILE, "|".join(_COMPILE)),
)
"""Signs in an error's text, the first match counts."""


def classify(text: str, otherwise: Failure = Failure.ERROR) -> Failure:
    """The kind of failure an error's text tells of; ``otherwise`` where it tells nothing."""
    return next((failure for failure, sign in _SIGNS if re.search(sign, text)), otherwise)


def first_line(error: BaseException | str) -> str:
    """The line of an error that says most: OpenVINO's texts begin with lines that only say where in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from ", "Check '", "Node "))]
    return (telling or lines or [type(error).__name__])[0][:300]
