"""Every error that npu-proxy raises on purpose.

NpuProxyError
├── InputError                 what the caller sent is wrong; sending it again cannot help
│   ├── EmptyInputError        a text (or the list of texts) is empty
│   ├── TooLongError           a text is longer than the model's limit and truncation is off
│   ├── ModelNotFoundError     no model of that name is served or stored
│   └── UnsupportedError       the model is of another kind than what is asked of it
├── SettingsError              a setting is unknown, malformed or contradicts another
├── ModelError                 a model's files are missing, contradictory or not supported
│   └── PullError              a model could not be fetched or did not match its checksum
├── UnavailableError           nothing wrong with the request; it may be sent again
│   ├── OverloadedError        the queue is at its limit; ``retry_after`` seconds may help
│   └── StoppedError           the engine is not running or is stopping
├── DeadlineError              the request's time ran out
└── DeviceError                a device failed, or answered with numbers that are not finite

``kind`` is what protocols and logs branch on; ``param`` names the request field or setting at fault. Messages say what
happened, then what to do, and never show a path of the server or a stack trace to a client.
"""

from __future__ import annotations


class NpuProxyError(Exception):
    """Base of the tree. ``str(error)`` is the message."""

    kind = "internal"

    text: int | None = None
    """Which text of several it is about, counted from 0."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def __str__(self) -> str:
        said = super().__str__()
        return said if self.text is None else f"{said} (text {self.text}, counted from 0)"


class InputError(NpuProxyError):
    """What the caller sent is wrong; sending it again cannot help."""

    kind = "invalid"


class EmptyInputError(InputError):
    """A text, or the list of texts, is empty."""

    kind = "empty"


class TooLongError(InputError):
    """A text of ``tokens`` tokens, or of ``more``, exceeds the model's ``limit`` and truncation is off."""

    kind = "too_long"

    def __init__(self, *, limit: int, tokens: int, more: bool = False, param: str | None = "input") -> None:
        super().__init__(
            f"This model's maximum context length is {limit} tokens, however you requested {'over ' * more}{tokens} tokens "
            "in one input. Shorten it, or set truncate to `end`, `start` or `chunk`, or to true where it is yes or no.",
            param=param,
        )
        self.limit = limit
        self.tokens = tokens


class NothingLeftError(InputError):
    """So few tokens are allowed that nothing is left of a text beside the special tokens."""

    kind = "nothing_left"


class ModelNotFoundError(InputError):
    """No model of that name is served or stored."""

    kind = "model_not_found"


class UnsupportedError(InputError):
    """The model is of another kind than what is asked of it."""

    kind = "unsupported"


class SettingsError(NpuProxyError):
    """A setting is unknown, malformed or contradicts another."""

    kind = "settings"


class ModelError(NpuProxyError):
    """A model's files are missing, contradictory or not supported; the message names the file."""

    kind = "model"


class PullError(ModelError):
    """A model could not be fetched, or what was fetched did not match its checksum."""

    kind = "pull"


class UnavailableError(NpuProxyError):
    """Nothing is wrong with the request; it may be sent again."""

    kind = "unavailable"


class OverloadedError(UnavailableError):
    """The queue is at its limit; trying again after ``retry_after`` seconds may help."""

    kind = "overloaded"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class StoppedError(UnavailableError):
    """The engine is not running, or stops."""

    kind = "stopped"


class DeadlineError(NpuProxyError):
    """The request's time ran out."""

    kind = "deadline"


class DeviceError(NpuProxyError):
    """A device failed, or answered with numbers that are not finite."""

    kind = "device"
