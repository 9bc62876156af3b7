"""What `npu-proxy tune` found fastest on this machine, and how it fills in the settings that were left to it."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import openvino as ov

from npu_proxy.devices.kinds import ALONE, chain
from npu_proxy.devices.openvino import available_threads
from npu_proxy.devices.shapes import ROW_TOKENS
from npu_proxy.errors import ModelError
from npu_proxy.models.quantized import int8_spec
from npu_proxy.settings import Settings
from npu_proxy.types import ModelSpec

log = logging.getLogger("npu_proxy.devices")


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that are tuned. Zero streams and row tokens: the device's own."""

    device: str
    precision: str = "fp32"
    streams: int = 0
    row_tokens: int = 0

    def __str__(self) -> str:
        streams = f", {self.streams} streams" if self.streams else ""
        return f"{self.device} {self.precision}{streams}" + (f", rows of {self.row_tokens}" if self.row_tokens else "")


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """What one choice was measured to do. error: why it was not measured or not kept."""

    choice: Choice
    tokens_per_second: float = 0.0
    ratio: float = 0.0
    """To the CPU in fp32 as it is without tuning, median of the rounds, within the same run."""
    mean_cosine: float = 0.0
    least_cosine: float = 0.0
    rounds: int = 0
    error: str = ""


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome for one model on one machine."""

    model: str
    fingerprint: str
    machine: str
    chosen: Choice
    trials: Sequence[Trial]
    unix: float


def machine() -> str:
    """What a profile holds for: processor, threads, OpenVINO."""
    name = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:  # not Linux
        pass
    return f"{name}, {available_threads()} threads, OpenVINO {ov.get_version()}"


def keep(store: Path, profile: Profile) -> Path:
    """Store a profile in place of an older one; where it lies. Raises OSError."""
    path = _path(store, profile.fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(profile)))
    partial.replace(path)
    return path


def find(store: Path, fingerprint: str) -> Profile | None:
    """The profile of a model (by its fp32 fingerprint) on this machine, if there is a readable one."""
    try:
        return msgspec.json.decode(_path(store, fingerprint).read_bytes(), type=Profile)
    except (OSError, ValueError):
        return None


def settled(settings: Settings, spec: ModelSpec) -> Settings:
    """The settings with nothing left open: what they leave to the profile is the profile's, else the default.

    The profile counts where it was made for the device that the settings put first, and not at all when its int8 copy
    has gone.
    """
    profile = find(settings.store, spec.fingerprint) if settings.profile == "on" else None
    chosen = profile.chosen if profile and _fits(settings, spec, profile.chosen) else Choice(device="")
    precision = settings.precision if settings.precision != "auto" else chosen.precision
    same = precision == chosen.precision  # streams and rows were measured with it
    return replace(
        settings,
        device=_first(chosen.device) if settings.device == "auto" and chosen.device else settings.device,
        precision="fp32" if settings.device in ALONE and settings.precision == "auto" else precision,
        streams=settings.streams or (chosen.streams if same else 0),
        row_tokens=settings.row_tokens or (chosen.row_tokens if same else 0) or ROW_TOKENS,
    )


def _fits(settings: Settings, spec: ModelSpec, chosen: Choice) -> bool:
    """Whether a profile's choice can be used: its device is meant, and its int8 copy is there."""
    names = chain(settings.device)
    meant = chosen.device in (*names, *ALONE) if settings.device == "auto" else chosen.device == names[0]
    if not meant or chosen.precision != "int8" or settings.precision not in ("auto", "int8"):
        return meant
    try:
        int8_spec(settings.store, spec)
    except ModelError as error:
        log.warning("the tuned profile is not used: %s", error)
        return False
    return True


def _first(device: str) -> str:
    """The chain of `auto` with ``device`` in front."""
    if device in ALONE or device == "cpu":
        return device
    return ",".join([device, *(name for name in chain("auto") if name != device)])


def _path(store: Path, fingerprint: str) -> Path:
    key = hashlib.sha256(f"{fingerprint} {machine()}".encode()).hexdigest()[:16]
    return store / "profiles" / f"{key}.json"
