"""Settings that may differ between the models of one server: VALUE is for all of them, MODEL=VALUE for one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from npu_proxy.errors import SettingsError
from npu_proxy.models.catalog import canonical
from npu_proxy.settings import Settings, general_value

PER_MODEL = ("query_instruction", "document_instruction", "cache_prefix")


def settings_of(settings: Settings, model: str) -> Settings:
    """The settings of one model: of those that may differ, only its own or the general value is left, in the form ``=VALUE``."""
    names = _names(model)
    values = {name: _value(getattr(settings, name), names) for name in PER_MODEL}
    changes = {name: () if value is None else (f"={value}",) for name, value in values.items()}
    return replace(settings, model=(model,), **changes)


def check_models(settings: Settings, models: Iterable[str]) -> None:
    """Raise SettingsError if a setting names a model that is not one of ``models``."""
    known = {name for model in (*settings.model, *models) for name in _names(model)}
    for setting in PER_MODEL:
        for entry in getattr(settings, setting):
            model, equals, _ = entry.partition("=")
            if equals and model and not _names(model) & known:
                hint = f"for a value that contains =, write `={entry}`"
                raise SettingsError(f"`{setting}` has `{entry}`, but no model is named `{model}`; {hint}", param=setting)


def _value(entries: Sequence[str], names: set[str]) -> str | None:
    own = [entry.partition("=")[2] for entry in entries if _names(entry.partition("=")[0]) & names and "=" in entry]
    return own[-1] if own else general_value(entries) or None


def _names(model: str) -> set[str]:
    return {model.lower(), canonical(model).lower(), Path(model).name.lower()} - {""}
