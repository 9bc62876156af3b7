"""npu-proxy: embeds text on Intel NPUs, GPUs and CPUs, as a Python library and as a server."""

from npu_proxy.engine.async_engine import AsyncEngine
from npu_proxy.engine.compact import calibrate, dequantize, quantize_embeddings, rescore
from npu_proxy.engine.engine import Engine
from npu_proxy.engine.verbs import Label, Ranked
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
    UnsupportedError,
)
from npu_proxy.settings import Settings
from npu_proxy.types import Chunking, DType, EmbedRequest, EmbedResult, Kind, Lane, Pair, Pooling, SparseVector, Truncate
from npu_proxy.version import __version__

__all__ = [
    "AsyncEngine",
    "Chunking",
    "DType",
    "DeadlineError",
    "DeviceError",
    "EmbedRequest",
    "EmbedResult",
    "EmptyInputError",
    "Engine",
    "InputError",
    "Kind",
    "Label",
    "Lane",
    "ModelError",
    "ModelNotFoundError",
    "NothingLeftError",
    "NpuProxyError",
    "OverloadedError",
    "Pair",
    "Pooling",
    "PullError",
    "Ranked",
    "Settings",
    "SettingsError",
    "SparseVector",
    "StoppedError",
    "TooLongError",
    "Truncate",
    "UnavailableError",
    "UnsupportedError",
    "__version__",
    "calibrate",
    "dequantize",
    "quantize_embeddings",
    "rescore",
]
