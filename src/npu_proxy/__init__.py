"""npu-proxy: embeds text on Intel NPUs, GPUs and CPUs, as a Python library and as a server."""

from npu_proxy.engine.async_engine import AsyncEngine
from npu_proxy.engine.engine import Engine
from npu_proxy.errors import (
    DeadlineError,
    DeviceError,
    EmptyInputError,
    InputError,
    ModelError,
    ModelNotFoundError,
    NothingLeftError,
    NpuProxyError,
    OverloadedError,
    PullError,
    SettingsError,
    StoppedError,
    TooLongError,
    UnavailableError,
)
from npu_proxy.settings import Settings
from npu_proxy.types import DType, EmbedRequest, EmbedResult, Lane, Pooling, Truncate
from npu_proxy.version import __version__

__all__ = [
    "AsyncEngine",
    "DType",
    "DeadlineError",
    "DeviceError",
    "EmbedRequest",
    "EmbedResult",
    "EmptyInputError",
    "Engine",
    "InputError",
    "Lane",
    "ModelError",
    "ModelNotFoundError",
    "NothingLeftError",
    "NpuProxyError",
    "OverloadedError",
    "Pooling",
    "PullError",
    "Settings",
    "SettingsError",
    "StoppedError",
    "TooLongError",
    "Truncate",
    "UnavailableError",
    "__version__",
]
