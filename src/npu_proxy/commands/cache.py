"""`npu-proxy cache`: show and clear the vectors cached on disk or on a server."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from cyclopts import App

from npu_proxy.cache.tier import Tier
from npu_proxy.cache.tiers import open_tiers
from npu_proxy.commands.shared import DEFAULTS, SharedSettings
from npu_proxy.errors import ModelError, ModelNotFoundError, SettingsError
from npu_proxy.models.fingerprint import fingerprint
from npu_proxy.models.quantized import int8_reports
from npu_proxy.models.resolve import read_model
from npu_proxy.models.store import ModelStore, StoredModel
from npu_proxy.settings import Settings

cache: App = App(name="cache", help="Show or remove the vectors cached on disk (`cache_disk_mb`) or on a server (`cache_url`).")


@cache.command
def stats(*, settings: SharedSettings = DEFAULTS) -> None:
    """Show how many vectors each tier of the cache holds, by model."""
    names: dict[str, str] = {}
    for stored in ModelStore(settings.store).list():
        with suppress(ModelError):
            names |= _fingerprints(settings, stored)
    with _tiers(settings) as tiers:
        for tier in tiers:
            for line in describe(tier, names, limit=bool(settings.cache_disk_mb)):
                print(line)


@cache.command
def clear(*, only: str = "", settings: SharedSettings = DEFAULTS) -> None:
    """Remove the vectors of all models from each tier of the cache.

    Running servers keep the vectors that they hold in memory. The file on disk does not shrink.

    Parameters
    ----------
    only
        Name or fingerprint of a model. Only its vectors are removed; for a name, those of every precision.
    """
    fingerprints: Sequence[str] | None = None
    if re.fullmatch("(?i)[0-9a-f]{16}", only):
        fingerprints = [only.lower()]
    elif only:
        stored = ModelStore(settings.store).find(only)
        if stored is None:
            message = f"model `{only}` is not in the local store; use a fingerprint that `npu-proxy cache stats` shows"
            raise ModelNotFoundError(message, param="only")
        fingerprints = list(_fingerprints(settings, stored))
    with _tiers(settings) as tiers:
        for tier in tiers:
            removed = tier.clear(None) if fingerprints is None else sum(tier.clear(name) for name in fingerprints)
            print(f"{tier.name}: removed {removed} vectors")


def describe(tier: Tier, names: Mapping[str, str], *, limit: bool) -> list[str]:
    """Describe a tier in one line, and each model in it in another.

    names: maps fingerprints to model names. limit: whether to include the tier's capacity. Raises TierError.
    """
    stats = tier.stats()
    capacity = f" of {stats.limit / 1e6:.0f} MB" if stats.limit and limit else ""
    size = f", {stats.size / 1e6:.1f} MB{capacity}" if stats.size or capacity else ""
    lines = [f"{stats.name}: {sum(stats.entries.values())} vectors{size}"]
    for key, count in sorted(stats.entries.items(), key=lambda entry: -entry[1]):
        lines.append(f"  {key.rstrip('-')}  {count:>9} vectors  {names.get(key, 'a model that is not in the store')}")
    return lines


def _fingerprints(settings: Settings, stored: StoredModel) -> dict[str, str]:
    """The fingerprints that a stored model may have (one per precision), each with a description."""
    spec = read_model(settings, stored.name)
    int8 = {report.fingerprint: f"{stored.name} in int8" for report in int8_reports(settings.store, spec.fingerprint)}
    return {spec.fingerprint: stored.name, fingerprint(spec, precision="fp16"): f"{stored.name} in fp16", **int8}


@contextmanager
def _tiers(settings: Settings) -> Generator[Sequence[Tier]]:
    """Open the tiers of the cache other than memory, and close them at exit. Raises SettingsError if none is configured."""
    if not settings.cache_disk_mb and settings.cache_folder.is_dir():
        settings = replace(settings, cache_disk_mb=4_000)
    tiers = open_tiers(settings)
    if not tiers:
        message = (
            "no cache on disk or on a server is configured; set `cache_disk_mb` or `cache_url` to the values that the server uses"
        )
        raise SettingsError(message, param="cache_disk_mb")
    try:
        yield tiers
    finally:
        for tier in tiers:
            tier.close()
