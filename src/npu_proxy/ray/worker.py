"""What runs on the machines of a cluster: an actor with an engine of its own, on the devices of its node."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from npu_proxy.bulk.columns import joined
from npu_proxy.engine.engine import Engine
from npu_proxy.engine.options import RequestOptions
from npu_proxy.errors import InputError
from npu_proxy.settings import Settings, default_store
from npu_proxy.types import EmbedResult, OutputType, TextInput

_UNIT_CHARACTERS = 200_000
_UNIT_TEXTS = 1024
"""Texts are handed out in units of so many characters, which is about 50,000 tokens, or so many texts."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What each worker does: the settings of its engine, and the options of every request.

    own_store: whether the store is where each machine has its own by default.
    """

    settings: Settings
    output_type: OutputType
    options: RequestOptions
    own_store: bool

    def engine(self) -> Engine:
        """An engine for this machine, not started."""
        settings = replace(self.settings, store=default_store()) if self.own_store else self.settings
        return Engine(settings=settings)


class Worker:
    """An engine in an actor. Loads the model when it is made, and certifies its devices, as everywhere."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._engine = work.engine().start()

    def describe(self) -> dict[str, str]:
        """Where it runs and what it computes with; answers once the model is loaded."""
        return {
            "host": socket.gethostname(),
            "process": str(os.getpid()),
            "device": self._engine.device.name,
            "fingerprint": self._engine.spec.fingerprint,
        }

    def embed(self, texts: Sequence[TextInput]) -> EmbedResult:
        """The results of a unit of work."""
        work = self._work
        return joined(list(self._engine.results(texts, output_type=work.output_type, **work.options)))


def make_work(settings: Settings, output_type: OutputType, options: RequestOptions, threads: int) -> Work:
    """The work of actors with so many threads each. Raises InputError if Ray is not installed."""
    if find_spec("ray") is None:
        raise InputError("Ray is not installed: pip install npu-proxy[ray]", param="ray")
    own_store = settings.store == default_store()
    return Work(
        settings=replace(settings, threads=settings.threads or threads, cache_mb=0),
        output_type=output_type,
        options=options,
        own_store=own_store,
    )


def units(texts: Iterable[TextInput]) -> Iterator[Sequence[TextInput]]:
    """Texts in units of about equal work."""
    unit: list[TextInput] = []
    size = 0
    for text in texts:
        unit.append(text)
        size += _length(text)
        if size >= _UNIT_CHARACTERS or len(unit) >= _UNIT_TEXTS:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def _length(text: Any) -> int:
    return sum(map(len, text)) if isinstance(text, tuple) else len(text)
