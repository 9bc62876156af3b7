"""An index of digests in bounded memory: which row had a text first, and how often an id has occurred."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

DIGEST_BYTES = 16
_SLOT_BYTES = 25
_SMALLEST = 1 << 14
_LOAD = 0.7
"""Share of slots that may be taken before the table doubles."""

Digests = npt.NDArray[np.uint64]
"""[n, 2]: 128 bits each."""
Numbers = npt.NDArray[np.int64]


def digests(texts: Iterable[str]) -> Digests:
    """A digest per text (BLAKE2b)."""
    hashed = hashlib.blake2b
    parts = [hashed(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest() for text in texts]
    return np.frombuffer(bytearray(b"".join(parts)), np.uint64).reshape(-1, 2)


def first_of_each(keys: Digests) -> Numbers:
    """For each digest the number of the first that equals it."""
    first: dict[bytes, int] = {}
    names: list[bytes] = np.ascontiguousarray(keys).view(f"V{DIGEST_BYTES}").ravel().tolist()
    return np.fromiter(map(first.setdefault, names, itertools.count()), np.int64, len(names))


def first_of(keys: Digests, among: npt.NDArray[np.bool_]) -> Numbers:
    """For each digest the number of the first that equals it; of those ``among`` only, and otherwise its own number."""
    first = np.arange(len(keys))
    first[among] = first[among][first_of_each(keys[among])]
    return first


class DigestIndex:
    """Digests and a number for each, in a hash table with linear probing. Once it is full, it takes no more.

    most_bytes: how large it may become.
    """

    def __init__(self, most_bytes: int) -> None:
        most_slots = 1 << max(1, (most_bytes // _SLOT_BYTES).bit_length() - 1)
        self._most = int(most_slots * _LOAD)
        self._count = 0
        self._allocate(min(_SMALLEST, most_slots))

    def __len__(self) -> int:
        return self._count

    @property
    def is_full(self) -> bool:
        """Whether no more digests fit."""
        return self._count >= self._most

    def find(self, keys: Digests) -> Numbers:
        """The number of each digest [n], -1 if it is not known."""
        found = np.full(len(keys), -1, np.int64)
        open_ = np.arange(len(keys))
        slots = self._slots_of(keys)
        while len(open_):
            at = slots[open_]
            equal = (self._keys[at] == keys[open_]).all(axis=1) & self._used[at]
            found[open_[equal]] = self._numbers[at[equal]]
            open_ = open_[self._used[at] & ~equal]
            slots[open_] = (slots[open_] + 1) & self._mask
        return found

    def put(self, keys: Digests, numbers: Numbers) -> bool:
        """Store distinct digests, or replace their numbers. Returns False if not all of them fit; then none is stored."""
        if self._count + len(keys) > self._most:
            return False
        while self._count + len(keys) > len(self._used) * _LOAD:
            self._grow()
        self._store(keys, numbers)
        return True

    def _store(self, keys: Digests, numbers: Numbers) -> None:
        open_ = np.arange(len(keys))
        slots = self._slots_of(keys)
        while len(open_):
            at = slots[open_]
            free = ~self._used[at]
            self._keys[at[free]] = keys[open_[free]]  # of several digests that take the same free slot, the last one has it
            self._used[at[free]] = True
            equal = (self._keys[at] == keys[open_]).all(axis=1)
            self._numbers[at[equal]] = numbers[open_[equal]]
            self._count += int((equal & free).sum())
            open_ = open_[~equal]
            slots[open_] = (slots[open_] + 1) & self._mask

    def _slots_of(self, keys: Digests) -> npt.NDArray[np.int64]:
        return (keys[:, 0] & np.uint64(self._mask)).astype(np.int64)

    def _allocate(self, slots: int) -> None:
        self._mask = slots - 1
        self._keys = np.zeros([slots, 2], np.uint64)
        self._numbers = np.zeros(slots, np.int64)
        self._used = np.zeros(slots, np.bool_)

    def _grow(self) -> None:
        keys, numbers = self._keys[self._used], self._numbers[self._used]
        self._allocate(2 * len(self._used))
        self._count = 0
        self._store(keys, numbers)


def occurrences(counts: DigestIndex, keys: Digests, least: Numbers) -> Numbers | None:
    """How often each digest has occurred before, in ``counts`` and earlier in ``keys``; adds them. None if ``counts`` is full.

    least: [n], how often it has occurred at least, for digests that ``counts`` does not have.
    """
    first = first_of_each(keys)
    distinct = np.unique(first)
    stored = counts.find(keys)
    before = np.where(stored < 0, least[first], stored)
    totals = before[distinct] + np.bincount(first, minlength=len(keys))[distinct]
    if not counts.put(keys[distinct], totals):
        return None
    return before + _running_count(first)


def _running_count(groups: Numbers) -> Numbers:
    """How many earlier entries are equal, for each entry."""
    seen: dict[int, int] = {}
    counted: list[int] = []
    for group in groups.tolist():
        counted.append(seen.get(group, 0))
        seen[group] = counted[-1] + 1
    return np.array(counted, np.int64)


def hexadecimal(keys: Digests) -> Sequence[str]:
    """Digests as 32 hexadecimal digits each."""
    flat: Any = np.ascontiguousarray(keys).tobytes().hex()
    return [flat[start : start + 2 * DIGEST_BYTES] for start in range(0, len(flat), 2 * DIGEST_BYTES)]


def from_hexadecimal(names: Sequence[str]) -> Digests:
    """Digests of which ``hexadecimal`` made these names."""
    return np.frombuffer(bytearray.fromhex("".join(names)), np.uint64).reshape(-1, 2)
