"""What an engine runs on, made from settings."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

from npu_proxy.cache.vectors import VectorCache, open_tiers
from npu_proxy.devices.base import Device
from npu_proxy.devices.chain import open_devices, served
from npu_proxy.engine.golden import GoldenRows
from npu_proxy.engine.tokenize import TextEncoder
from npu_proxy.settings import Settings
from npu_proxy.types import ModelSpec

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What an engine runs on. Made from settings by ``load``; tests make their own."""

    spec: ModelSpec
    encoder: TextEncoder
    device: Device


def load(settings: Settings, stopping: threading.Event) -> Parts:
    """Read the model, its tokenizer, and compile it. No network. ``stopping`` ends a wait for a device.

    Raises ModelError, ModelNotFoundError, DeviceError, and UnavailableError when none of the devices can serve.
    """
    settings, spec = served(settings)
    if spec.refused:
        _log.info("%s is served from its own graph file, padded (device %s): %s", spec.name, settings.device, spec.refused)
    encoder = TextEncoder(spec, sanitize=settings.sanitize, on_empty=settings.on_empty)
    device = open_devices(settings, spec, GoldenRows(encoder, spec), stopping)
    return Parts(spec=spec, encoder=encoder, device=device)


def open_cache(settings: Settings) -> VectorCache | None:
    """The cache of vectors that the settings ask for, None where they ask for none. Raises SettingsError."""
    tiers = open_tiers(
        disk=settings.cache_disk_mb * 1_000_000,
        folder=settings.cache_folder,
        url=settings.cache_url,
        prefix=settings.cache_prefix,
    )
    return VectorCache(memory=settings.cache_mb * 1_000_000, tiers=tiers) if settings.cache_mb or tiers else None
