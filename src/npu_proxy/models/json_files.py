"""Reading a model's JSON files. A missing or malformed file raises a ModelError that names it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from npu_proxy.errors import ModelError

Json = Mapping[str, Any]

MOST_TOKENS = 1 << 17
"""Largest limit of tokens per text, whatever a model states: position tables of this length already have 100 MB."""
OWN_PATHS = ("sentence_transformers.", "pylate.")
"""Where the classes come from that are computed here; a class of the same name from elsewhere is the model's own code."""
_LARGEST = 16 << 20
"""Bytes of a configuration file; those of large label sets and indexes of shards have up to a few MB."""


def short_path(file: Path) -> str:
    """A file's name and folder, without the rest of the path, for error messages."""
    return f"{file.parent.name}/{file.name}"


def existing(file: Path, hint: str = "") -> Path:
    """Return ``file``. Raises ModelError if it is missing."""
    if not file.is_file():
        raise ModelError(f"{short_path(file)} is missing" + (f"; {hint}" if hint else ""))
    return file


def read_json(file: Path) -> Any:
    """The content of a JSON file. Raises ModelError if it is missing, malformed or large."""
    try:
        size = existing(file).stat().st_size
        if size > _LARGEST:
            raise ModelError(f"{short_path(file)} has {size} bytes; at most {_LARGEST} are allowed")
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # malformed, not UTF-8, a number of many digits, or too deep
        raise ModelError(f"{short_path(file)} is not valid JSON: {error}") from error
    except OSError as error:
        raise ModelError(f"{short_path(file)} cannot be read: {error.strerror or error}") from error


class JsonObject(Mapping[str, Any]):
    """A JSON object that knows which of its keys were read. Objects in it are of this class, too.

    ``in`` and comparing do not count as reading; iterating over values or items reads all of them.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content: Mapping[str, Any] = content
        self._read: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._read:
            value = self.content[key]
            self._read[key] = JsonObject(value) if isinstance(value, dict) else value
        return self._read[key]

    def __contains__(self, key: object) -> bool:
        return key in self.content

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)

    def __eq__(self, other: object) -> bool:
        return self.content == (other.content if isinstance(other, JsonObject) else other)

    __hash__ = None  # type: ignore[assignment] - like any mapping that compares by content

    def unread(self) -> Iterator[tuple[str, Any]]:
        """The keys that were not read, and their values. Keys of inner objects are ``outer.inner``."""
        for key, value in self.content.items():
            if key not in self._read:
                yield key, value
            elif isinstance(inner := self._read[key], JsonObject):
                yield from ((f"{key}.{name}", value) for name, value in inner.unread())


def read_object(file: Path, *, optional: bool = False) -> Json:
    """The JSON object in a file; empty if an ``optional`` file is missing. Raises ModelError if there is anything else in it."""
    if optional and not file.exists():
        return {}
    content = read_json(file)
    if not isinstance(content, dict):
        raise ModelError(f"{short_path(file)}: expected a JSON object")
    return cast("Json", content)


def read_flag(content: Json, key: str, file: str, *, default: bool = False) -> bool:
    """A switch in a file, ``default`` if it is missing. Raises ModelError if it is not true or false."""
    value: Any = content.get(key, default)
    if not isinstance(value, bool):
        raise ModelError(f"{file}: `{key}` is `{json.dumps(value, default=str)[:40]}`, not true or false")
    return value


def inside(folder: Path, path: str, *, by: str = "modules.json") -> Path:
    """A path in the model's folder. Raises ModelError if it leads out of the folder, naming the file (``by``) that contains it.

    Only the path itself is checked, not the targets of links: the files of a Hugging Face cache are links to its blobs.
    """
    if ".." in Path(path).parts or Path(path).is_absolute():
        raise ModelError(f"{by}: path `{path}` leads out of the model's folder")
    return folder / path
