"""`npu-proxy cache`: what lies in the cache of vectors, and emptying it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from npu_proxy.cache.tier import Tier
from npu_proxy.errors import SettingsError


def show(tiers: Sequence[Tier], names: Mapping[str, str], say: Callable[[str], None] = print) -> None:
    """A line a tier and a line a model in it. names: of models by fingerprint. Raises TierError."""
    for tier in _some(tiers):
        stats = tier.stats()
        limit = f" of {stats.limit / 1e6:.0f} MB" if stats.limit else ""
        size = f", {stats.size / 1e6:.1f} MB{limit}" if stats.size or limit else ""
        say(f"{stats.name}: {sum(stats.entries.values())} texts{size}")
        for fingerprint, count in sorted(stats.entries.items(), key=lambda one: -one[1]):
            say(f"  {fingerprint.rstrip('-')}  {count:>9} texts  {names.get(fingerprint, 'a model that is not in the store')}")


def clear(tiers: Sequence[Tier], fingerprint: str | None, say: Callable[[str], None] = print) -> None:
    """Remove everything, or what one model computed."""
    for tier in _some(tiers):
        removed = tier.clear(fingerprint)
        say(f"{tier.name}: removed {removed} texts")


def _some(tiers: Sequence[Tier]) -> Sequence[Tier]:
    if not tiers:
        message = "there is no cache beside memory; set `cache_disk_mb` or `cache_url` as the server has it"
        raise SettingsError(message, param="cache_disk_mb")
    return tiers
