"""Reading a model's JSON files: what is missing or of the wrong kind is a ModelError that names the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from npu_proxy.errors import ModelError

Json = Mapping[str, Any]


def where(file: Path) -> str:
    """A file by its folder and name, enough to find it and no more."""
    return f"{file.parent.name}/{file.name}"


def existing(file: Path, hint: str = "") -> Path:
    """The file itself. Raises ModelError where it is missing."""
    if not file.is_file():
        raise ModelError(f"{where(file)} is missing" + (f"; {hint}" if hint else ""))
    return file


def read(file: Path) -> Any:
    """Whatever JSON is in the file. Raises ModelError."""
    try:
        return json.loads(existing(file).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{where(file)} is no valid JSON: {error}") from error


def read_object(file: Path, *, optional: bool = False) -> Json:
    """The JSON object in the file, an empty one where it may be missing and is. Raises ModelError."""
    if optional and not file.exists():
        return {}
    content = read(file)
    if not isinstance(content, dict):
        raise ModelError(f"{where(file)}: a JSON object is expected")
    return cast("Json", content)


def inside(folder: Path, path: str, *, by: str = "modules.json") -> Path:
    """A module's folder or file, which must lie in the model's own. Raises ModelError naming the file that says so.

    The path itself is looked at, not where links lead: the files of a Hugging Face cache are links to its blobs.
    """
    if ".." in Path(path).parts or Path(path).is_absolute():
        raise ModelError(f"{by}: path `{path}` leads out of the model's folder")
    return folder / path
