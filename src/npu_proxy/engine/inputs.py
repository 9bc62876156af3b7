"""What callers pass as texts: lists, arrays, columns, sets, any iterable. Anything else gets an error that says what to pass."""

from __future__ import annotations

import math
from collections.abc import AsyncIterable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np

from npu_proxy.errors import InputError
from npu_proxy.types import Pair, TextInput

_TABLES = ("DataFrame", "LazyFrame", "Table", "RecordBatch", "Dataset", "DatasetDict")
"""Class names of tables in pandas, polars, pyarrow and datasets, whose iterators give column names or rows."""
_TO_LIST = ("to_pylist", "to_list", "tolist")
"""Methods by which columns of pyarrow, polars, pandas and numpy become lists of Python values."""


def text_list(texts: object) -> list[TextInput]:
    """The texts as a list. Raises InputError if they are not texts."""
    return list(text_stream(texts))


def text_stream(texts: object) -> Iterator[TextInput]:
    """The texts one after another. Raises InputError at once if ``texts`` is no collection of texts, and later for a wrong item."""
    check_container(texts)
    if not isinstance(texts, list | tuple):
        texts = _as_list(texts)
    return (as_text(item, index) for index, item in enumerate(cast("Iterable[Any]", texts)))


def check_container(texts: object) -> None:
    """Raise InputError if ``texts`` is not a collection of texts."""
    name = type(texts).__name__
    if isinstance(texts, str | Pair):
        what = "a pair" if isinstance(texts, Pair) else "a string"
        message = f"texts is {what}; put a single text in a list: [text] (or call embed_query)"
    elif isinstance(texts, bytes | bytearray | memoryview):
        message = "texts is a bytes object; decode it, and put it in a list"
    elif name in _TABLES:
        message = f'texts is a {name}; pass one of its columns, such as table["text"]'
    elif isinstance(texts, Mapping):
        message = "texts is a dict; pass list(texts.values()) or list(texts)"
    elif isinstance(texts, np.ndarray) and (texts.ndim == 0 or texts.dtype.kind not in "USTOiu"):
        shape = f"{texts.dtype} array of shape {texts.shape}"
        message = f"texts is a {shape}; pass an array of strings, or a list of lists of token ids"
    elif isinstance(texts, AsyncIterable):
        message = "texts is an asynchronous iterable; AsyncEngine.stream takes those"
    elif not isinstance(texts, Iterable):
        message = f"texts is a {name}; pass a list of texts"
    else:
        return
    raise InputError(message, param="texts")


def _as_list(texts: Any) -> Iterable[Any]:
    if isinstance(texts, np.ndarray) and texts.ndim > 1:
        return texts  # rows of token ids
    convert = next((getattr(texts, name) for name in _TO_LIST if hasattr(texts, name)), None)
    return convert() if convert is not None else texts


def as_text(item: object, index: int) -> TextInput:
    """An item as a text, a pair or token ids. Raises InputError with its index."""
    if isinstance(item, str):
        return item
    if isinstance(item, Pair):
        sides = cast("tuple[object, object]", item)
        if not all(isinstance(side, str) for side in sides):
            raise InputError(f"pair {index} must consist of two strings", param="input")
        return item
    if hasattr(item, "as_py"):
        return as_text(cast("Any", item).as_py(), index)
    if isinstance(item, list | tuple | np.ndarray):
        return _token_ids(cast("Sequence[Any]", item), index)
    if item is None or type(item).__name__ in ("NAType", "NaTType") or (isinstance(item, float) and math.isnan(item)):
        raise InputError(f"text {index} is missing ({item}); remove it, or replace it by a text", param="input")
    hint = "; decode it" if isinstance(item, bytes) else "; to embed numbers as texts, convert them with str"
    raise InputError(
        f"text {index} is of type {type(item).__name__}; expected a string or a list of token ids{hint}", param="input"
    )


def _token_ids(ids: Sequence[Any], index: int) -> TextInput:
    if isinstance(ids, np.ndarray):
        if ids.ndim == 1 and ids.dtype.kind in "iu":
            return cast("TextInput", ids)
        raise InputError(f"text {index} is a {ids.dtype} array of shape {ids.shape}; {_NO_VECTOR}", param="input")
    if all(type(number) is int for number in ids):
        return ids
    if all(isinstance(number, int | np.integer) and not isinstance(number, bool) for number in ids):
        return [int(number) for number in ids]
    if isinstance(ids, tuple) and len(ids) == 2 and all(isinstance(side, str) for side in ids):
        raise InputError(f"text {index} is a tuple of two strings; use Pair(first, second)", param="input")
    kind = next(type(number).__name__ for number in ids if type(number) is not int)
    raise InputError(f"text {index} is a {type(ids).__name__} of {kind}; {_NO_VECTOR}", param="input")


_NO_VECTOR = "expected a string, or integers, which are token ids (vectors cannot be embedded)"
