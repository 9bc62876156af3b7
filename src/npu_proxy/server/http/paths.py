"""Paths that stand for others: base paths of a model or of an API, and what clients make of a base URL. A pure function."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
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
    "/pipeline/feature-extraction": "",  # Hugging Face
}
"""Prefixes and what they are taken for."""
_DEEPEST = 4
"""Number of base paths that may follow each other."""

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

    `/models/NAME/...` is every route, for the model NAME: a model's name, percent-encoded or not, an alias, or a kind.
    """
    return _meant(method, re.sub("/{2,}", "/", raw_path) or "/", known, known_with_name, dialects, _DEEPEST)


def _meant(method: str, raw: str, known: Known, known_with_name: Known, dialects: Collection[str], depth: int) -> Meant | None:
    path = unquote(raw)
    if known(method, path):
        return Meant(path)
    if depth == 0:
        return None

    def below(rest: str) -> Meant | None:
        return _meant(method, rest or "/", known, known_with_name, dialects, depth - 1)

    first, _, rest = raw[1:].partition("/")
    if first in dialects and (found := below("/" + rest)) is not None:
        return Meant(found.path, found.model, found.dialect or first)
    for prefix, other in _SAME.items():
        if (raw == prefix or raw.startswith(prefix + "/")) and (found := below(other + raw[len(prefix) :])) is not None:
            return found
    for base in _MODEL_BASES:
        if raw.startswith(base) and (found := _below_model(method, raw[len(base) :], below)) is not None:
            return found
    return Meant(path) if known_with_name(method, path) else None


def _below_model(method: str, after: str, below: Callable[[str], Meant | None]) -> Meant | None:
    """Return what `NAME/...` stands for. A name may have slashes that are not encoded, so the shortest name is taken."""
    for match in re.finditer("/", after):
        name, rest = after[: match.start()], after[match.start() :]
        if name and rest != "/" and (found := below(rest)) is not None:
            return Meant(found.path, found.model or unquote(name), found.dialect)
    name = after.rstrip("/")
    if method != "POST" or not name or ":" in name.rpartition("/")[2]:
        return None
    return Meant("/", unquote(name))
