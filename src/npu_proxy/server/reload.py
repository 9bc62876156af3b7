"""What a running server takes over when it is told to read its settings again (SIGHUP): keys, certificate, limits and names.

Nothing is dropped: requests in progress keep the settings they began with. If a new value is wrong, everything stays as it was.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

from npu_proxy.server.http.app import AppState
from npu_proxy.server.http.clients import ApiKey, read_keys
from npu_proxy.settings import Settings

LIMITS = (
    "timeout",
    "bulk_timeout",
    "max_client_batch",
    "interactive_texts",
    "max_queue_items",
    "max_queue_tokens",
    "max_body_mb",
    "max_bodies_mb",
    "max_answer_mb",
    "max_pull_gb",
    "keep_alive",
    "models_mb",
    "load_on_demand",
    "allow_pull",
    "drain",
)
NAMES = ("served_model_name",)
KEYS = ("api_key", "api_key_file", "api_keys_file")
CERTIFICATE = ("ssl_certfile", "ssl_keyfile")
_TAKEN_OVER = (*LIMITS, *NAMES, *KEYS, *CERTIFICATE)


async def reload(state: AppState, read: Callable[[], Settings], context: ssl.SSLContext | None) -> list[str]:
    """Read the settings again and take over what can change. Returns what changed, in words.

    context: the server's TLS context, to which a new certificate is added for new connections. Raises SettingsError, or OSError if
    the certificate cannot be read.
    """
    wanted = await asyncio.to_thread(read)
    old = state.settings
    settings = replace(old, **{name: getattr(wanted, name) for name in _TAKEN_OVER})
    keys = await asyncio.to_thread(read_keys, settings)  # the server still listens where it did
    if settings.ssl_certfile is not None and context is not None:
        _check_certificate(settings.ssl_certfile, settings.ssl_keyfile)
    await state.models.take_over(settings)  # loads models that get a new name first
    changes = [_change(old, settings, name) for name in (*LIMITS, *NAMES) if getattr(old, name) != getattr(settings, name)]
    changes += _key_changes(state.keys, keys)
    if settings.ssl_certfile is not None and context is not None:
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
        changes.append("the certificate")
    state.settings, state.keys = settings, keys
    state.bodies.limit(settings)
    left = [field.name for field in fields(Settings) if getattr(wanted, field.name) != getattr(settings, field.name)]
    if left:
        changes.append(f"not {', '.join(f'`{name}`' for name in left)}, which need a restart")
    return changes


def _change(old: Settings, new: Settings, name: str) -> str:
    before, after = (", ".join(value) if isinstance(value := getattr(each, name), tuple) else value for each in (old, new))
    return f"`{name}` {after} (was {before})"


def _key_changes(old: Sequence[ApiKey], new: Sequence[ApiKey]) -> list[str]:
    """Which keys were added, removed or changed, by name."""
    before, after = {key.name: key for key in old}, {key.name: key for key in new}
    words = {
        "new": after.keys() - before.keys(),
        "removed": before.keys() - after.keys(),
        "changed": {name for name in before.keys() & after.keys() if before[name] != after[name]},
    }
    return [f"API keys {word}: {', '.join(sorted(names))}" for word, names in words.items() if names]


def _check_certificate(certificate: Path, key: Path | None) -> None:
    """Raise OSError if they cannot be used; loading them into the running context would leave it half changed."""
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
