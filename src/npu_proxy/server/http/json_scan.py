"""Count what decoding a JSON body would create, before it is decoded: a few bytes can become a large object each."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from npu_proxy.errors import InputError

MOST_VALUES = 1 << 20
"""Values in a body, such as token ids; decoding that many takes some 40 ms, in which nothing else runs."""
LISTS_PER_TEXT = 4
"""Lists and objects per text that a request may have (`max_client_batch`)."""
_FURTHER_LISTS = 1000
_BLOCK = 1 << 20
_QUOTE, _BACKSLASH, _COMMA, _LIST, _OBJECT = map(ord, '"\\,[{')


def check_values(body: bytes, texts: int) -> None:
    """Raise InputError if a body has too many values, or lists and objects, for a request of up to ``texts`` texts.

    Strings are told apart by their quotes. A body that is not valid JSON may be counted wrongly after its first error, where
    decoding stops.
    """
    values, lists, most_lists = 0, 0, LISTS_PER_TEXT * texts + _FURTHER_LISTS
    inside, backslashes = 0, 0
    for start in range(0, len(body), _BLOCK):
        block = np.frombuffer(body, np.uint8, min(_BLOCK, len(body) - start), start)
        quotes, backslashes = _string_ends(block, backslashes)
        for kind in (_COMMA, _LIST, _OBJECT):
            places = np.flatnonzero(block == kind)
            count = int(((np.searchsorted(quotes, places) + inside) % 2 == 0).sum())
            values += count
            lists += count if kind != _COMMA else 0
        inside = (inside + len(quotes)) % 2
        if values > MOST_VALUES:
            raise InputError(f"the body has more than {MOST_VALUES} values; send fewer token ids or texts at once")
        if lists > most_lists:
            allowed = f"at most {texts} texts are allowed (`max_client_batch`)"
            raise InputError(f"the body has more than {most_lists} lists and objects; {allowed}")


def _string_ends(block: npt.NDArray[np.uint8], before: int) -> tuple[npt.NDArray[np.intp], int]:
    """Where strings begin or end in a block, and the number of backslashes at its end. before: those before the block."""
    quotes = np.flatnonzero(block == _QUOTE)
    other = block != _BACKSLASH
    if other.all() and not before:
        return quotes, 0
    last = np.maximum.accumulate(np.where(other, np.arange(len(block)), -1))  # the last byte that is no backslash
    previous = np.where(quotes > 0, last[quotes - 1], -1)
    runs = quotes - 1 - previous + np.where(previous < 0, before, 0)
    end = int(len(block) - 1 - last[-1]) if len(block) else 0
    return quotes[runs % 2 == 0], end + (before if len(block) and last[-1] < 0 else 0)
