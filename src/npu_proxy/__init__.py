"""npu-proxy: embeds text on Intel NPUs, GPUs and CPUs, as a Python library and as a server."""

from npu_proxy.engine.async_engine import AsyncEngine
from npu_proxy.engine.engine import Engine
from npu_proxy.engine.vector_quantization import calibrate, dequantize, quantize_embeddings, rescore
from npu_proxy.errors import (
    AnswerTooLargeError,
    ClientLimitError,
    DeadlineError,
    DeviceError,
    EmptyInputError,
    FingerprintError,
    InputError,
    ModelError,
    ModelNotFoundError,
    NothingLeftError,
    NpuProxyError,
    OverloadedError,
    PullError,
    RequestTooLargeError,
    SettingsError,
    StoppedError,
    TooLongError,
    UnavailableError,
    UnsupportedError,
)
from npu_proxy.quiet import keep_quiet
from npu_proxy.settings import Settings
from npu_proxy.types import (
    Chunking,
    Client,
    DType,
    EmbedRequest,
    EmbedResult,
    Label,
    Lane,
    OutputType,
    Pair,
    Pooling,
    RerankResult,
    SparseVector,
    Truncate,
)
from npu_proxy.version import __version__

keep_quiet()

__all__ = [
    "AnswerTooLargeError",
    "AsyncEngine",
    "Chunking",
    "Client",
    "ClientLimitError",
    "DType",
    "DeadlineError",
    "DeviceError",
    "EmbedRequest",
    "EmbedResult",
    "EmptyInputError",
    "Engine",
    "FingerprintError",
    "InputError",
    "Label",
    "Lane",
    "ModelError",
    "ModelNotFoundError",
    "NothingLeftError",
    "NpuProxyError",
    "OutputType",
    "OverloadedError",
    "Pair",
    "Pooling",
    "PullError",
    "RequestTooLargeError",
    "RerankResult",
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
