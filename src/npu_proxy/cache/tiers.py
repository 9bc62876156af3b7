"""Open the cache that the settings ask for: memory and the tiers behind it. A tier is one row of ``TIERS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from npu_proxy.cache.disk import DiskTier
from npu_proxy.cache.shared import SharedTier
from npu_proxy.cache.tier import Tier
from npu_proxy.cache.vectors import VectorCache
from npu_proxy.settings import Settings, general_value

OFF: dict[str, int | str] = {"cache_mb": 0, "cache_disk_mb": 0, "cache_url": ""}
"""Settings that turn off memory and each tier."""
TIERS: tuple[Callable[[Settings], Tier | None], ...] = (
    lambda settings: DiskTier(settings.cache_folder, settings.cache_disk_mb * 1_000_000) if settings.cache_disk_mb else None,
    lambda settings: SharedTier(settings.cache_url, general_value(settings.cache_prefix)) if settings.cache_url else None,
)
"""Functions that make a tier from settings, or return None if it is turned off; in order of lookup."""


def open_tiers(settings: Settings) -> list[Tier]:
    """Make the tiers behind memory that the settings ask for. Raises SettingsError."""
    return [tier for make in TIERS if (tier := make(settings)) is not None]


def open_cache(settings: Settings) -> VectorCache | None:
    """Make the vector cache that the settings ask for; None if they turn it off. Raises SettingsError."""
    tiers = open_tiers(settings)
    return VectorCache(memory=settings.cache_mb * 1_000_000, tiers=tiers) if settings.cache_mb or tiers else None


def without_cache(settings: Settings) -> Settings:
    """The same settings with memory and all tiers turned off."""
    return replace(settings, **OFF)
