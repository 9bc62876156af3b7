"""Kinds of device failure, recognized by the text of an error, because drivers raise RuntimeError for everything."""

from __future__ import annotations

import re
from enum import StrEnum

from npu_proxy.errors import DeviceError


class Failure(StrEnum):
    """Kinds of failure; accelerator/breaker.py defines how each is handled."""

    ABSENT = "absent"
    """There is no such device, or no driver, runtime or compiler for it."""
    COMPILE = "compile"
    LOST = "lost"
    """The device fell off its bus, or its driver reset it."""
    HANG = "hang"
    """A batch, or the worker's heartbeat, is overdue."""
    CRASH = "crash"
    """The worker process died."""
    NUMBERS = "numbers"
    """NaN, infinity, or golden texts whose vectors differ from the CPU's."""
    CANARY = "canary"
    """A canary in a batch was wrong (canary.py), or a second computation of a batch gave other vectors."""
    ERROR = "error"
    """Any other error."""
    BUSY = "busy"
    """The device works, but had no capacity for the batch in time."""


WRONG = (Failure.CANARY, Failure.NUMBERS)
"""Failures after which earlier results of a device cannot be trusted either."""


class BatchError(DeviceError):
    """A DeviceError with its kind of failure."""

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
_PATTERNS = (
    (Failure.LOST, "|".join(_LOST)),
    (Failure.ABSENT, "|".join(_ABSENT)),
    (Failure.COMPILE, "|".join(_COMPILE)),
)
"""Patterns in an error's text; the first match decides."""


def classify_failure(text: str, otherwise: Failure = Failure.ERROR) -> Failure:
    """The kind of failure that an error's text indicates, or ``otherwise`` if no pattern matches."""
    return next((failure for failure, pattern in _PATTERNS if re.search(pattern, text)), otherwise)


def first_line(error: BaseException | str) -> str:
    """The most informative line of an error. OpenVINO's messages begin with lines that only name a place in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    informative = [line for line in lines if not line.startswith(("Exception from ", "Check '", "Node "))]
    return (informative or lines or [type(error).__name__])[0][:300]
