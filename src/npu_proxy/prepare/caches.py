"""`npu-proxy cache`: what is kept on disk or on a server, by model. The arithmetic of it is in cache/commands.py."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress

from cyclopts import App

from npu_proxy.cache.tier import Tier
from npu_proxy.cache.vectors import open_tiers
from npu_proxy.errors import ModelError, ModelNotFoundError
from npu_proxy.models.fingerprint import fingerprint
from npu_proxy.models.layout import read_spec
from npu_proxy.models.quantized import reports
from npu_proxy.models.store import Store, StoredModel
from npu_proxy.prepare.commands import DEFAULTS, Shared
from npu_proxy.settings import Settings

cache = App(name="cache", help="The vectors that are kept on disk (`cache_disk_mb`) or on a server (`cache_url`).")


@cache.command(name="stats")
def cache_stats(*, settings: Shared = DEFAULTS) -> None:
    """Show how many texts each tier holds, by model."""
    from npu_proxy.cache.commands import show

    names: dict[str, str] = {}
    for stored in Store(settings.store).list():
        with suppress(ModelError):
            names |= _fingerprints(settings, stored)
    with _tiers(settings) as tiers:
        show(tiers, names, limit=bool(settings.cache_disk_mb))


@cache.command(name="clear")
def cache_clear(*, only: str = "", settings: Shared = DEFAULTS) -> None:
    """Remove the texts of all models from each tier. Servers that run keep what they have in memory; the file does not shrink.

    Parameters
    ----------
    only
        Name or fingerprint of a model: remove what it computed, in every precision, and nothing else.
    """
    from npu_proxy.cache.commands import clear

    fingerprints: Sequence[str] | None = None
    if re.fullmatch("(?i)[0-9a-f]{16}", only):
        fingerprints = [only.lower()]
    elif only:
        stored = Store(settings.store).find(only)
        if stored is None:
            message = f"model `{only}` is not in the local store; `npu-proxy cache stats` shows fingerprints, which serve as well"
            raise ModelNotFoundError(message, param="only")
        fingerprints = list(_fingerprints(settings, stored))
    with _tiers(settings) as tiers:
        clear(tiers, fingerprints)


def _fingerprints(settings: Settings, stored: StoredModel) -> dict[str, str]:
    """The fingerprints that a stored model may have, and what each is."""
    spec = read_spec(stored.folder, name=stored.name, pooling=settings.pooling, max_length=settings.max_length)
    int8 = {report.fingerprint: f"{stored.name} in int8" for report in reports(settings.store) if report.of == spec.fingerprint}
    return {spec.fingerprint: stored.name, fingerprint(spec, precision="fp16"): f"{stored.name} in fp16", **int8}


@contextmanager
def _tiers(settings: Settings) -> Generator[Sequence[Tier]]:
    disk = settings.cache_disk_mb * 1_000_000 or (4_000_000_000 if settings.cache_folder.is_dir() else 0)
    tiers = open_tiers(disk=disk, folder=settings.cache_folder, url=settings.cache_url, prefix=settings.cache_prefix)
    try:
        yield tiers
    finally:
        for tier in tiers:
            tier.close()
