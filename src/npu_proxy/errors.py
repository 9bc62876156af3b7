"""The public exceptions of npu-proxy.

NpuProxyError
├── InputError                 the request is wrong; sending it again cannot help
│   ├── EmptyInputError        a text, or the list of texts, is empty
│   ├── TooLongError           a text is longer than the model's limit and truncation is off
│   ├── NothingLeftError       the token limit leaves no room for the text
│   ├── ModelNotFoundError     no model of that name is served or stored
│   ├── AnswerTooLargeError    the result would have more numbers than allowed
│   ├── RequestTooLargeError   the texts cannot be computed within the request's time
│   ├── UnsupportedError       the model does not support what was requested
│   └── FingerprintError       the model is not the one that the request expects
├── SettingsError              a setting is unknown, malformed or contradicts another
├── ModelError                 a model's files are missing, contradictory or not supported
│   └── PullError              a model could not be fetched or did not match its checksum
├── UnavailableError           nothing is wrong with the request; it may be sent again
│   ├── OverloadedError        the queue is full; a retry after ``retry_after`` seconds may succeed
│   │   └── ClientLimitError   the client has reached its own limit
│   └── StoppedError           the engine is not running or is stopping
├── JobError                   a job cannot go on, but what it has done is kept
├── DeadlineError              the request's deadline passed
└── DeviceError                a device failed or returned numbers that are not finite

Further subclasses are in server/errors.py (HTTP requests), cache/tier.py (TierError), models/weights.py (NoWeightsError,
MissingTensorError), devices/failure.py (BatchError) and commands/files.py (Ended).

APIs and logs distinguish errors by ``kind``; ``param`` names the request field or setting at fault. A message says what
happened, then what to do. Clients never see a path of the server or a stack trace.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator


class NpuProxyError(Exception):
    """Base class of all errors. ``str(error)`` is the message."""

    kind = "internal"

    text: int | None = None
    """Index of the text that caused the error, if the request has several; counted from 0."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def __str__(self) -> str:
        message = super().__str__()
        return message if self.text is None else f"{message} (text {self.text}, counted from 0)"


class InputError(NpuProxyError):
    """The request is wrong; sending it again cannot help."""

    kind = "invalid"


class EmptyInputError(InputError):
    """A text, or the list of texts, is empty."""

    kind = "empty"


class TooLongError(InputError):
    """A text of ``tokens`` tokens (or more, if ``more``) exceeds the model's ``limit`` and truncation is off."""

    kind = "too_long"

    def __init__(self, *, limit: int, tokens: int, more: bool = False, param: str | None = "input") -> None:
        super().__init__(
            f"This model's maximum context length is {limit} tokens, however you requested {'over ' * more}{tokens} tokens "
            "in one input. Shorten the input, or set `truncate` to `end`, `start` or `chunk` (to true if it is a boolean).",
            param=param,
        )
        self.limit = limit
        self.tokens = tokens


class NothingLeftError(InputError):
    """The token limit is so small that nothing is left of a text after adding the special tokens."""

    kind = "nothing_left"


class AnswerTooLargeError(InputError):
    """The result would have more numbers than allowed (``EmbedRequest.most_numbers``)."""

    kind = "too_large"

    def __init__(self, most: int) -> None:
        """most: how many numbers are allowed."""
        message = f"the answer would have more than the {most} numbers that are allowed (`max_answer_mb`)"
        super().__init__(f"{message}; send fewer or shorter texts at once")


class ModelNotFoundError(InputError):
    """No model of that name is served or stored."""

    kind = "model_not_found"


class RequestTooLargeError(InputError):
    """The texts of the request cannot be computed within its time, at the measured speed."""

    kind = "too_large"


class UnsupportedError(InputError):
    """The model does not support what was requested."""

    kind = "unsupported"


class FingerprintError(InputError):
    """The model has another fingerprint than the request expects, so its vectors must not be mixed with those it has."""

    kind = "fingerprint"


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
    """The queue is full; a retry after ``retry_after`` seconds may succeed."""

    kind = "overloaded"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ClientLimitError(OverloadedError):
    """The client has used up its part: of the queue, as its API key allows, or of the memory for bodies and answers."""

    kind = "client_limit"


class StoppedError(UnavailableError):
    """The engine is not running or is stopping."""

    kind = "stopped"


class JobError(NpuProxyError):
    """A job over files cannot go on, such as for want of disk space; what it has done is kept, and can be resumed."""

    kind = "job"


class DeadlineError(NpuProxyError):
    """The request's deadline passed."""

    kind = "deadline"


class DeviceError(NpuProxyError):
    """A device failed or returned numbers that are not finite."""

    kind = "device"


@contextmanager
def model_errors(name: str) -> Generator[None]:
    """Convert any error to a ModelError, around code that computes with values from the files of the model ``name``.

    Those values may be anything: a negative size, a list in place of a number, a number that no float holds.
    """
    try:
        yield
    except NpuProxyError:
        raise
    except OSError as error:
        raise ModelError(f"{name}: a file cannot be read: {error.strerror or type(error).__name__}") from error
    except Exception as error:
        what = f"{type(error).__name__}: {str(error)[:_LONGEST_CAUSE]}"
        raise ModelError(f"{name}: its files contradict one another, or contain a value that is not possible ({what})") from error


def unread_error(what: str, key: str) -> ModelError:
    """The refusal of a key or tensor that nothing reads, with the way out. what: the start of the message."""
    return ModelError(
        f"{what}, so vectors could differ from the model's own; if you know that it does not change them, set `accept_unread` to"
        f" {key}"
    )


_LONGEST_CAUSE = 200
