"""npu-proxy: embeds text on Intel NPUs, GPUs and CPUs, as a Python library and as a server."""

import sys

from npu_proxy.engine.async_engine import AsyncEngine
from npu_proxy.engine.engine import Engine
from npu_proxy.engine.vector_quantization import calibrate, dequantize, quantize_embeddings, rescore
from npu_proxy.errors import (
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
    SettingsError,
    StoppedError,
    TooLongError,
    UnavailableError,
    UnsupportedError,
)
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

# `import openvino` reports to its maker through this package, from a process that it forks while other threads run. That process
# can stop for ever in a lock that one of them held; it then outlives its parent, with all its open files. There is a stub instead.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

__all__ = [
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
