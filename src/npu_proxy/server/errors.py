"""Errors that only the server raises, and the HTTP status of every error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from npu_proxy.errors import InputError, ModelNotFoundError, NpuProxyError

STATUS: Mapping[str, int] = {
    "invalid": 400,
    "empty": 400,
    "too_long": 400,
    "nothing_left": 400,
    "no_body": 400,
    "unsupported": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "model_not_found": 404,
    "not_found": 404,
    "not_allowed": 405,
    "fingerprint": 409,
    "too_large": 413,
    "encoding": 415,
    "model": 500,
    "client_limit": 429,
    "gone": 499,
    "pull": 502,
    "overloaded": 503,
    "stopped": 503,
    "unavailable": 503,
    "device": 503,
    "deadline": 504,
}
"""HTTP status for each error ``kind``; any other is 500. An API may override it (``Dialect.status``)."""


_SHOWN = 5
"""Names of models that the error of an unknown one shows."""


class NoBodyError(InputError):
    """The request has no body."""

    kind = "no_body"


class UnauthorizedError(InputError):
    """The request does not carry a valid API key."""

    kind = "unauthorized"


class ForbiddenError(InputError):
    """The operation is not allowed on this server."""

    kind = "forbidden"


class RouteNotFoundError(InputError):
    """No route has this path."""

    kind = "not_found"


class MethodNotAllowedError(InputError):
    """The path does not support the request's method."""

    kind = "not_allowed"


class BodyTooLargeError(InputError):
    """The body is larger than the setting `max_body_mb`."""

    kind = "too_large"


class UnsupportedEncodingError(InputError):
    """The body has a Content-Encoding or a charset that is not supported."""

    kind = "encoding"


class UnknownModelError(ModelNotFoundError):
    """The request names a ``model`` that is not served."""

    def __init__(self, model: str, served: Sequence[str] = ()) -> None:
        shown = model if len(model) <= 200 else f"{model[:200]}..."
        names = f" ({', '.join(f'`{name}`' for name in served[:_SHOWN])})" if served else ""
        message = f"The model `{shown}` does not exist; GET /v1/models lists the available models{names}."
        super().__init__(message, param="model")
        self.model = shown


class ClientGoneError(NpuProxyError):
    """The client has disconnected; its request is dropped."""

    kind = "gone"
