"""From rows to texts: a field or a template, ids, and what is wrong with a row's own text."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import pyarrow as pa

from npu_proxy.bulk.arrow import are_json_texts, is_json, json_as_texts, json_values
from npu_proxy.bulk.files import InputFile
from npu_proxy.bulk.readers import Block, Inputs, ReadOptions
from npu_proxy.errors import InputError
from npu_proxy.types import Pair

_decode = msgspec.json.decode
_MISSING = object()
_KINDS = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object", bytes: "bytes"}


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """What of a row is its text: a field, or several in a template such as `{title}: {text}`.

    query: the field of a query, with which the text becomes a Pair, for rerankers.
    """

    field: str = "text"
    template: str | None = None
    query: str | None = None

    def fields(self) -> Sequence[str]:
        """The fields it needs. Raises InputError for a template that is wrong."""
        own = self._fields_of_text()
        return own if self.query is None else list(dict.fromkeys((*own, self.query)))

    def _fields_of_text(self) -> Sequence[str]:
        if self.template is None:
            return [self.field]
        names = list(dict.fromkeys(name for _, name in self._parts() if name is not None))
        if not names:
            raise InputError(f"the template {self.template!r} names no field; write it in braces: {{title}}", param="template")
        return names

    def _parts(self) -> Sequence[tuple[str, str | None]]:
        """The template as text and the field that follows it. The two characters backslash and n stand for a new line."""
        assert self.template is not None
        template = self.template.replace("\\n", "\n").replace("\\t", "\t")
        try:
            parsed = list(string.Formatter().parse(template))
        except ValueError as error:
            raise InputError(
                f"the template {self.template!r} is wrong: {error}; write {{{{ for a brace", param="template"
            ) from error
        if any(name == "" or kind or conversion for _, name, kind, conversion in parsed):
            raise InputError(f"the template {self.template!r} needs names of fields in braces, such as {{title}}", param="template")
        return [(text, name) for text, name, _, _ in parsed]

    def texts(self, block: Block) -> list[str | Pair | InputError]:
        """The text of each row, or what is wrong with it."""
        texts = self._texts(block)
        if self.query is None:
            return list(texts)
        queries = TextSource(field=self.query).texts(block)
        pairs: list[str | Pair | InputError] = []
        for query, text in zip(queries, texts, strict=True):
            pairs.append(Pair(query, text) if isinstance(query, str) and isinstance(text, str) else _first_error(query, text))
        return pairs

    def _texts(self, block: Block) -> list[str | InputError]:
        values = [list(column_values(block.table, name)) for name in self._fields_of_text()]
        make = self._of_field if self.template is None else self._of_template
        texts: list[str | InputError] = []
        for row, fields in enumerate(zip(*values, strict=True)):
            error = block.errors.get(row)
            texts.append(make(fields) if error is None else _wrong(error))
        return texts

    def _of_field(self, values: Sequence[Any]) -> str | InputError:
        (value,) = values
        if isinstance(value, str):
            return value
        if value is _MISSING:
            return _wrong(f"has no field `{self.field}`; set --text-field")
        if value is None:
            return _wrong(f"has null in field `{self.field}`")
        what = _KINDS.get(type(value), type(value).__name__)
        return _wrong(f"has {what} in field `{self.field}`, not a text; --template {{{self.field}}} writes it as one")

    def _of_template(self, values: Sequence[Any]) -> str | InputError:
        if all(value is None or value is _MISSING for value in values):
            return _wrong(f"has none of the fields of the template {self.template!r}")
        written = dict(zip(self._fields_of_text(), map(_written, values), strict=True))
        return "".join(text + (written[name] if name else "") for text, name in self._parts())


def _first_error(*values: object) -> InputError:
    return next(value for value in values if isinstance(value, InputError))


def _wrong(what: str) -> InputError:
    return InputError(f"the row {what}", param="input")


def _written(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None or value is _MISSING:
        return ""
    return msgspec.json.encode(value, enc_hook=str).decode()


def read_texts(files: Sequence[InputFile], source: TextSource, delimiter: str | None = None) -> Iterator[str]:
    """The texts of files, in order. Raises InputError with the place of the first row that has none."""
    for block in Inputs(files, ReadOptions(columns=source.fields(), delimiter=delimiter)):
        for row, text in enumerate(source.texts(block)):
            if isinstance(text, InputError):
                raise InputError(f"{block.place(row)}: {text}", param="input")
            assert isinstance(text, str)  # there is no query
            yield text


def read_fields(files: Sequence[InputFile], names: Sequence[str], hint: str = "") -> Iterator[tuple[str, Sequence[Any]]]:
    """The place of each row, and its values in some fields. Raises InputError for a row that cannot be read or lacks a field.

    hint: what to do in the latter case.
    """
    for block in Inputs(files, ReadOptions(columns=names)):
        columns = [column_values(block.table, name) for name in names]
        for row, values in enumerate(zip(*columns, strict=True)):
            missing = next((name for name, value in zip(names, values, strict=True) if value is _MISSING), None)
            if row in block.errors or missing is not None:
                what = block.errors.get(row, f"has no field `{missing}`{hint}")
                raise InputError(f"{block.place(row)}: the row {what}", param="input")
            yield block.place(row), values


def column_values(table: pa.Table, name: str) -> Iterator[Any]:
    """The values of a column as Python values, or of a struct's field by a dotted name. JSON null and missing fields differ."""
    names = table.column_names
    if name in names:
        yield from _values(table, name)
        return
    root, *path = name.split(".")
    if root not in names or not path:
        yield from (_MISSING for _ in range(table.num_rows))
        return
    for value in _values(table, root):
        found = value
        for key in path:
            found = found.get(key, _MISSING) if isinstance(found, Mapping) else None if found is None else _MISSING
        yield found


def _values(table: pa.Table, name: str) -> Iterator[Any]:
    column = table.column(name)
    if not is_json(table.schema.field(name)):
        return iter(column.to_pylist())
    values = json_as_texts(column).to_pylist() if are_json_texts(column) else json_values(column)
    if not column.null_count:
        return iter(values)
    return (value if is_there else _MISSING for value, is_there in zip(values, column.is_valid().to_pylist(), strict=True))
