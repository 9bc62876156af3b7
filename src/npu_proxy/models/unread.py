"""Nothing of a model folder is passed over: a key that nothing reads is harmless (harmless.py), accepted by the user, or refused.

The same holds for tensors: those that no graph reads are in graph/unread_tensors.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from npu_proxy.errors import unread_error
from npu_proxy.models.harmless import is_harmless
from npu_proxy.models.json_files import Json, JsonObject, read_object, short_path


@dataclass(kw_only=True)
class FolderReader:
    """Reads the JSON files of a model folder, and records which keys were read.

    accept: the setting `accept_unread`. accepted: those of its patterns that were needed, for the fingerprint.
    """

    accept: Sequence[str] = ()
    accepted: set[str] = field(default_factory=set[str])
    _files: list[tuple[str, str, JsonObject]] = field(default_factory=list[tuple[str, str, JsonObject]])

    def object(self, file: Path, *, kind: str = "", optional: bool = False) -> JsonObject:
        """The object in a file; empty if an ``optional`` file is missing. kind: its list in HARMLESS, if not the file's name."""
        return self.track(read_object(file, optional=optional), file, kind=kind)

    def track(self, content: Json, file: Path, *, kind: str = "") -> JsonObject:
        """An object whose keys must be read."""
        tracked = JsonObject(content)
        self._files.append((kind or file.name, short_path(file), tracked))
        return tracked

    def replace(self, tracked: JsonObject, values: Json) -> JsonObject:
        """The object with other values, tracked in its place."""
        if not values:
            return tracked
        changed = JsonObject({**tracked.content, **values})
        self._files = [(kind, shown, changed if old is tracked else old) for kind, shown, old in self._files]
        return changed

    def refuse_unread(self, *, ignored: Sequence[str] = (), only: str = "") -> None:
        """Raise ModelError for a key that was not read, is not harmless, and is not accepted.

        ignored: files that do not count, such as those that the libraries of static models do not open. only: the file that counts.
        """
        for kind, shown, tracked in self._files:
            if kind in ignored or only not in ("", kind):
                continue
            kinds = (kind, f"{kind} {tracked.content.get('model_type')}")
            for key, value in tracked.unread():
                if not any(is_harmless(each, key, value) for each in kinds) and not self.accepts(key):
                    raise unread_error(f"{shown}: `{key}` is `{str(value)[:60]}`, which npu-proxy does not know", key)

    def accepts(self, key: str) -> bool:
        """Whether the user accepts that a key or tensor is not read."""
        matching = [pattern for pattern in self.accept if fnmatchcase(key, pattern)]
        self.accepted.update(matching)
        return bool(matching)
