"""Engines for the adapters: started when they are first used, with the model pulled if it is not there."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

from npu_proxy.engine.engine import Engine
from npu_proxy.errors import InputError, ModelNotFoundError
from npu_proxy.models.pull import pull
from npu_proxy.models.store import ModelStore
from npu_proxy.settings import Settings

_HARMLESS_DEVICES = (None, "", "auto")


def open_engine(
    model: str, *, device: str | None = None, settings: Settings | None = None, local_files_only: bool = False, **changes: Any
) -> Engine:
    """A started engine of a model, which is downloaded first if it is not in the store.

    device: as in the setting; None means automatic. Raises ModelNotFoundError if there is no such model, InputError for a device of
    torch's.
    """
    settings = replace(settings or Settings(), model=(model,), **changes)
    if device not in _HARMLESS_DEVICES:
        if device.split(":")[0] in ("cuda", "mps", "xpu", "hpu"):
            raise InputError(
                f"`{device}` is a device of torch's; npu-proxy computes on npu, gpu and cpu: leave device out", param="device"
            )
        settings = replace(settings, device=device)
    try:
        return Engine(settings=settings).start()
    except ModelNotFoundError:
        if local_files_only:
            raise
    store = ModelStore(settings.store)
    pull(store, model, mirrors=settings.mirrors, report=lambda line: print(line, file=sys.stderr))  # noqa: T201 (as the library does)
    return Engine(settings=settings).start()


class FrameworkClass:
    """What type checkers take for a class of a framework that an adapter extends, since most users do not have it."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Whatever the framework takes."""


def framework(module: str) -> Any:
    """A module of a framework whose classes an adapter extends. Raises ImportError with the framework's name."""
    try:
        return import_module(module)
    except ImportError as error:
        name = module.split(".", maxsplit=1)[0].replace("_", "-")
        raise ImportError(f"this adapter is for {name}, which is not installed") from error


def refuse(arguments: Mapping[str, Any], why: Mapping[str, str], neutral: tuple[Any, ...] = (None, False, {}, [])) -> None:
    """Raise InputError for an argument that would change numbers and is not obeyed. why: what to do instead, by argument."""
    for name, value in arguments.items():
        if value in neutral:
            continue
        if name in why:
            raise InputError(f"`{name}` is not supported here; {why[name]}", param=name)
        raise InputError(f"unknown argument `{name}`", param=name)


def as_tensor(array: Any) -> Any:
    """An array as a torch tensor. Raises InputError if torch is not installed."""
    try:
        import torch  # type: ignore[import-not-found]  # an optional package
    except ImportError:
        raise InputError(
            "tensors need torch, which is not installed; set convert_to_tensor=False", param="convert_to_tensor"
        ) from None
    return torch.as_tensor(array)


def has_torch() -> bool:
    """Whether torch is imported already, so that its users expect tensors."""
    return "torch" in sys.modules
