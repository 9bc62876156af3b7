"""What all commands share: the settings as flags, variables and TOML keys, and small helpers."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from typing import Annotated, Any, get_origin

from cyclopts import Parameter

from npu_proxy.settings import Settings, types_of_settings


def _split(kind: object, value: str, *, delimiter: str | None = None) -> list[str]:
    """Split a variable with several values at commas, not at spaces, because folder names may contain spaces."""
    if get_origin(kind) is not tuple:
        return [value]
    return [part.strip() for part in value.split(delimiter or ",") if part.strip()]


def _whole(kind: object, value: str, *, delimiter: str | None = None) -> list[str]:
    """A variable with one text, in which commas and the space at the end matter."""
    return [value]


def _switch(kind: Any, tokens: Any) -> bool:
    """Parse a boolean from a variable or TOML file; `on` and `off` are accepted as well."""
    value = str(tokens[0].value).lower()
    if value in ("on", "true", "1", "yes"):
        return True
    if value in ("off", "false", "0", "no"):
        return False
    raise ValueError(f"`{tokens[0].value}` is not a boolean; use true or false")


for _setting in fields(Settings):  # the help text lists each setting under its group
    _hint = types_of_settings()[_setting.name]
    _parameter = Parameter(
        group=_setting.metadata["group"],
        converter=_switch if _hint is bool else None,
        env_var_split=_whole if _setting.name.endswith("_instruction") else _split,
    )
    Settings.__annotations__[_setting.name] = Annotated[_hint, _parameter]

SharedSettings = Annotated[Settings, Parameter(name="*", negative_iterable=(), env_var_split=_split)]
"""The settings as flags of every command."""
DEFAULTS = Settings()


def with_model(settings: Settings, model: str) -> Settings:
    """The settings with ``model`` in place of their own, unless it is empty."""
    return replace(settings, model=(model,)) if model else settings


def say(line: str) -> None:
    """Print a progress line to standard error."""
    print(line, file=sys.stderr, flush=True)
