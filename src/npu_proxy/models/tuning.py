"""Tuning profiles: what `npu-proxy tune` found fastest on this machine, and how it fills in settings that are not set."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from npu_proxy.models.graph_files import available_devices
from npu_proxy.settings import Settings
from npu_proxy.spec import ModelSpec
from npu_proxy.system import available_threads, private_folder
from npu_proxy.targets import device_chain


class TuningChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that are tuned. streams, row_tokens: 0 means the device's default."""

    device: str
    precision: str = "fp32"
    streams: int = 0
    row_tokens: int = 0

    def __str__(self) -> str:
        streams = f", {self.streams} streams" if self.streams else ""
        return f"{self.device} {self.precision}{streams}" + (f", batches of {self.row_tokens}" if self.row_tokens else "")


class TuningTrial(msgspec.Struct, frozen=True, kw_only=True):
    """Measurements of one choice. error: why it cannot be used, "" if it can."""

    choice: TuningChoice
    tokens_per_second: float = 0.0
    ratio: float = 0.0
    """Speed relative to the untuned CPU in fp32 within the same run, median of the rounds."""
    mean_cosine: float = 0.0
    least_cosine: float = 0.0
    rounds: int = 0
    error: str = ""


class TuningProfile(msgspec.Struct, frozen=True, kw_only=True):
    """The result for one model on one machine: all trials, the fastest correct one first."""

    model: str
    fingerprint: str
    machine: str
    trials: Sequence[TuningTrial]
    unix: float

    @property
    def usable(self) -> list[TuningTrial]:
        """The trials without an error, the fastest first."""
        return [trial for trial in self.trials if not trial.error]

    def best(self, devices: Sequence[str], precision: str) -> TuningChoice | None:
        """The fastest choice for one of ``devices`` in a precision; None if any of them was not tried."""
        if not set(devices) <= {trial.choice.device for trial in self.trials}:
            return None
        fitting = (trial.choice for trial in self.usable if trial.choice.device in devices)
        return next((choice for choice in fitting if choice.precision == precision), None)


def machine() -> str:
    """The machine that a profile is valid for: processor, threads, OpenVINO version."""
    import openvino as ov  # reading a model without a profile does not need it

    name = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:  # not Linux
        pass
    return f"{name}, {available_threads()} threads, OpenVINO {ov.get_version()}"


def save_profile(store: Path, profile: TuningProfile) -> Path:
    """Store a profile, replacing any older one, and return its path. Raises OSError if it cannot be written."""
    path = _path(store, profile.fingerprint)
    private_folder(path.parent)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(profile)))
    partial.replace(path)
    return path


def find_profile(store: Path, fingerprint: str) -> TuningProfile | None:
    """The profile of a model (by its fp32 fingerprint) on this machine, or None if there is no readable one."""
    if not (store / "profiles").is_dir():
        return None
    try:
        return msgspec.json.decode(_path(store, fingerprint).read_bytes(), type=TuningProfile)
    except (OSError, ValueError):
        return None


def apply_profile(settings: Settings, spec: ModelSpec) -> Settings:
    """Fill in settings that are not set from this machine's profile, if there is one.

    This never changes vectors: the precision stays the same, and devices that compute from another copy of the model are not
    chosen. `auto` follows the profile only if all of this machine's devices were compared. A model that only a graph file can
    serve gets the device for that file.
    """
    if spec.refused and settings.device == "auto":
        settings = replace(settings, device=next(iter(available_devices(settings, spec.folder)), settings.device))
    profile = find_profile(settings.store, spec.fingerprint) if settings.profile else None
    names = device_chain(settings.device)
    auto = settings.device == "auto"
    chosen = profile.best(names if auto else names[:1], settings.precision) if profile else None
    if chosen is None:
        return settings
    first = [chosen.device, *(name for name in names if name not in (chosen.device, "cpu"))]
    fallback = ["cpu"] if "cpu" in names and chosen.device != "cpu" else []
    return replace(
        settings,
        device=",".join(["cpu"] if chosen.device == "cpu" else first + fallback) if auto else settings.device,
        streams=settings.streams or (None if settings.threads else chosen.streams),  # measured with all threads
        row_tokens=settings.row_tokens or chosen.row_tokens,
    )


def _path(store: Path, fingerprint: str) -> Path:
    key = hashlib.sha256(f"{fingerprint} {machine()}".encode()).hexdigest()[:16]
    return store / "profiles" / f"{key}.json"


def remove_profile(store: Path, fingerprint: str) -> None:
    """Remove this machine's profile of a model."""
    _path(store, fingerprint).unlink(missing_ok=True)
