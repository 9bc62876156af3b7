"""Paths that stand for others: base paths of a model or of an API, and what clients make of a base URL. A pure function."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from urllib.parse import unquote

MODEL = "npu_proxy.model"
"""Key in a scope of the model that the path names."""
DIALECT = "npu_proxy.dialect"
"""Key in a scope of the API whose form the path asks for, on paths that several share."""

_MODEL_BASES = ("/openai/deployments/", "/v1/engines/", "/pipeline/feature-extraction/", "/models/")
"""What a model's name follows: Azure's deployments, OpenAI's former engines, Hugging Face's pipelines, and our own."""
_SAME = {
    "/openai/v1": "/v1",  # Azure
    "/v3/v1": "/v1",  # OpenVINO Model Server
    "/v1/v1": "/v1",  # a base URL that ends in what the client adds
    "/v2/v2": "/v2",
    "/v1/v2": "/v2",
    "/v1/api": "/api",
    "/api/v1": "/v1",
}
"""Prefixes and what they are taken for."""
_MOST_PREFIXES = 4
"""Number of prefixes that may follow each other."""

Known = Callable[[str, str], bool]
"""Whether there is a route for a method and a path."""


@dataclass(frozen=True)
class Meant:
    """The path that is meant, and the model and the API that the given one names."""

    path: str
    model: str | None = None
    dialect: str | None = None


def meant(method: str, raw_path: str, known: Known, known_with_name: Known, dialects: Collection[str]) -> Meant | None:
    """Return what a path that is no route stands for; None if it stands for no route.

    raw_path: percent-encoded, since the name of a model may contain an encoded slash. known: whether a route has exactly that path;
    known_with_name: or one that contains a model's name. dialects: the base paths of the APIs, without slashes.

    `/models/NAME/...` is every route, for the model NAME: a model's name, percent-encoded or not, an alias, or a kind. Takes a
    few steps for any path, since it runs for every request before its key is looked at.
    """
    whole = re.sub("/{2,}", "/", raw_path) or "/"
    shorter, dialect = _without_prefixes(whole, dialects)
    readings = [(whole, None), (shorter, dialect)]
    for raw, outer in readings:
        for name, rest in _splits(method, raw):
            path, inner = _without_prefixes(rest, dialects)
            if known(method, unquote(path)):
                return Meant(unquote(path), name, outer or inner)
    for raw, outer in readings:
        if known_with_name(method, unquote(raw)):
            return Meant(unquote(raw), None, outer)
    return None


def _without_prefixes(raw: str, dialects: Collection[str]) -> tuple[str, str | None]:
    """Return a path without an API's base path and with its prefix as it is meant, and the API."""
    dialect = None
    for _ in range(_MOST_PREFIXES):
        first, _, rest = raw[1:].partition("/")
        prefix = next((prefix for prefix in _SAME if raw == prefix or raw.startswith(prefix + "/")), None)
        if first in dialects and (dialect is None) and prefix is None:
            raw, dialect = "/" + rest, first
        elif prefix is not None:
            raw = _SAME[prefix] + raw[len(prefix) :] or "/"
        else:
            break
    return raw, dialect


def _splits(method: str, raw: str) -> Iterator[tuple[str | None, str]]:
    """Yield the ways to read a path: as it is, or as the base path of a model and the rest. A name has one slash at most."""
    yield None, raw
    for base in _MODEL_BASES:
        if raw.startswith(base):
            parts = raw[len(base) :].split("/", 2)
            for count in (1, 2):
                name, rest = "/".join(parts[:count]), "/".join(parts[count:])
                if len(parts) > count and parts[0] and rest:
                    yield unquote(name), "/" + rest
            name = "/".join(parts[:2]).rstrip("/")
            if method == "POST" and name and not any(parts[2:]) and ":" not in parts[-1]:
                yield unquote(name), "/"
