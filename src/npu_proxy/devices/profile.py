"""What `npu-proxy tune` found fastest on this machine, and how it fills in the settings that are left to it."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import openvino as ov

from npu_proxy.devices.exported import with_graph
from npu_proxy.devices.kinds import chain
from npu_proxy.devices.openvino import available_threads
from npu_proxy.devices.shapes import ROW_TOKENS
from npu_proxy.settings import Settings
from npu_proxy.types import ModelSpec


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
    """What one choice was measured to do. error: why it cannot be used, or ''."""

    choice: Choice
    tokens_per_second: float = 0.0
    ratio: float = 0.0
    """To the CPU in fp32 as it is without tuning, median of the rounds, within the same run."""
    mean_cosine: float = 0.0
    least_cosine: float = 0.0
    rounds: int = 0
    error: str = ""


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome for one model on one machine: every trial, the fastest that is right first."""

    model: str
    fingerprint: str
    machine: str
    trials: Sequence[Trial]
    unix: float

    @property
    def usable(self) -> list[Trial]:
        """The trials that are right, the fastest first."""
        return [trial for trial in self.trials if not trial.error]

    def best(self, devices: Sequence[str], precision: str) -> Choice | None:
        """The fastest for one of these devices in a precision; None where one of them was not tried at all."""
        if not set(devices) <= {trial.choice.device for trial in self.trials}:
            return None
        fitting = (trial.choice for trial in self.usable if trial.choice.device in devices)
        return next((choice for choice in fitting if choice.precision == precision), None)


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

    It never changes vectors: precision is the settings' own, and devices that compute from another copy of the model are
    not chosen. `auto` follows it only where all of this machine's devices were compared. A model that is served from a graph
    file only gets the device for the one it has.
    """
    if spec.refused and settings.device == "auto":
        settings = replace(settings, device=next(iter(with_graph(settings, spec.folder)), settings.device))
    profile = find(settings.store, spec.fingerprint) if settings.profile == "on" else None
    names = chain(settings.device)
    auto = settings.device == "auto"
    chosen = profile.best(names if auto else names[:1], settings.precision) if profile else None
    if chosen is None:
        return replace(settings, row_tokens=settings.row_tokens or ROW_TOKENS)
    first = [chosen.device, *(name for name in names if name not in (chosen.device, "cpu"))]
    behind = ["cpu"] if "cpu" in names and chosen.device != "cpu" else []
    return replace(
        settings,
        device=",".join(["cpu"] if chosen.device == "cpu" else first + behind) if auto else settings.device,
        streams=settings.streams or (0 if settings.threads else chosen.streams),  # measured with all threads
        row_tokens=settings.row_tokens or chosen.row_tokens or ROW_TOKENS,
    )


def _path(store: Path, fingerprint: str) -> Path:
    key = hashlib.sha256(f"{fingerprint} {machine()}".encode()).hexdigest()[:16]
    return store / "profiles" / f"{key}.json"


def remove(store: Path, fingerprint: str) -> None:
    """Remove this machine's profile of a model."""
    _path(store, fingerprint).unlink(missing_ok=True)
