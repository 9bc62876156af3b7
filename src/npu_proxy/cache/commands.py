"""`npu-proxy cache`: what lies in the cache of vectors, and emptying it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from npu_proxy.cache.tier import Tier
from npu_proxy.errors import SettingsError


def show(tiers: Sequence[Tier], names: Mapping[str, str], *, limit: bool, say: Callable[[str], None] = print) -> None:
    """A line a tier and a line a model in it. names: of models by fingerprint.

    limit: whether to say how much there may be. Raises TierError.
    """
    for tier in _some(tiers):
        stats = tier.stats()
        most = f" of {stats.limit / 1e6:.0f} MB" if stats.limit and limit else ""
        size = f", {stats.size / 1e6:.1f} MB{most}" if stats.size or most else ""
        say(f"{stats.name}: {sum(stats.entries.values())} texts{size}")
        for fingerprint, count in sorted(stats.entries.items(), key=lambda one: -one[1]):
            say(f"  {fingerprint.rstrip('-')}  {count:>9} texts  {names.get(fingerprint, 'a model that is not in the store')}")


def clear(tiers: Sequence[Tier], fingerprints: Sequence[str] | None, say: Callable[[str], None] = print) -> None:
    """Remove everything, or what these models computed."""
    for tier in _some(tiers):
        removed = tier.clear(None) if fingerprints is None else sum(tier.clear(one) for one in fingerprints)
        say(f"{tier.name}: removed {removed} texts")


def _some(tiers: Sequence[Tier]) -> Sequence[Tier]:
    if not tiers:
        message = "there is no cache beside memory; set `cache_disk_mb` or `cache_url` as the server has it"
        raise SettingsError(message, param="cache_disk_mb")
    return tiers
