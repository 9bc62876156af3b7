"""Special tokens around a text or a pair, and how long texts are cut: into one that fits, or into chunks. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import numpy as np
from tokenizers import Tokenizer

from npu_proxy.errors import ModelError
from npu_proxy.types import Encoding, ModelSpec, Span

Marks = AbstractSet[int]
"""Numbers of tokens."""

_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[\u3002\uff01\uff1f]|\n+")


@dataclass(frozen=True)
class PairFrame:
    """Special tokens before, between and behind the texts of a pair, their types, and those of the two texts."""

    ids: tuple[list[int], list[int], list[int]]
    types: tuple[list[int], list[int], list[int]]
    of: tuple[int, int]

    @property
    def special(self) -> int:
        """How many they are."""
        return sum(map(len, self.ids))

    def join(self, first: list[int], second: list[int], *, truncated: bool, typed: bool) -> Encoding:
        """The two texts in one. typed: whether tokens have types."""
        before, between, after = self.ids
        ids = np.array([*before, *first, *between, *second, *after], np.int32)
        if not typed:
            return Encoding(ids, truncated)
        types = [*self.types[0], *[self.of[0]] * len(first), *self.types[1], *[self.of[1]] * len(second), *self.types[2]]
        return Encoding(ids, truncated, types=np.array(types, np.int32))


def _sample(tokenizer: Tokenizer, spec: ModelSpec) -> tuple[str, list[int]]:
    sample = next((text for text in ("a", "the", "1", ".") if tokenizer.encode(text, add_special_tokens=False).ids), None)
    if sample is None:
        raise ModelError(f"{spec.name}: tokenizer.json turns every text into nothing")
    return sample, tokenizer.encode(sample, add_special_tokens=False).ids


def _find(whole: Sequence[int], plain: Sequence[int], first: int, spec: ModelSpec) -> int:
    for start in range(first, len(whole) - len(plain) + 1):
        if list(whole[start : start + len(plain)]) == list(plain):
            return start
    raise ModelError(f"{spec.name}: tokenizer.json does not put special tokens around a text, but inside it")


def frame_of(tokenizer: Tokenizer, spec: ModelSpec) -> tuple[list[int], list[int]]:
    """The special tokens that stand before and behind every text, seen by encoding a text with and without them."""
    sample, plain = _sample(tokenizer, spec)
    whole = tokenizer.encode(sample).ids
    start = _find(whole, plain, 0, spec)
    return whole[:start], whole[start + len(plain) :]


def pair_frame_of(tokenizer: Tokenizer, spec: ModelSpec) -> PairFrame:
    """As ``frame_of`` for two texts."""
    sample, plain = _sample(tokenizer, spec)
    whole = tokenizer.encode(sample, sample)
    one = _find(whole.ids, plain, 0, spec)
    two = _find(whole.ids, plain, one + len(plain), spec)
    cuts = (slice(one), slice(one + len(plain), two), slice(two + len(plain), None))
    ids, types = ([values[cut] for cut in cuts] for values in (whole.ids, whole.type_ids))
    return PairFrame((ids[0], ids[1], ids[2]), (types[0], types[1], types[2]), (whole.type_ids[one], whole.type_ids[two]))


def chunks(
    first: int, end: int, room: int, overlap: int, ends: Marks = frozenset(), words: Marks = frozenset()
) -> list[tuple[int, int]]:
    """Parts of tokens ``first`` to ``end`` of at most ``room``, each beginning ``overlap`` before the end of the one before.

    ends: tokens before which a sentence ends; a part ends at the last of them in its second half, where there is one. words:
    tokens that begin a word; else it ends at the last of these, and the next one begins at one.
    """
    parts: list[tuple[int, int]] = []
    start = first
    while True:
        stop = min(start + room, end)
        if stop < end:
            late = range(stop, start + max(room // 2, overlap), -1)
            stop = next((at for marks in (ends, words) for at in late if at in marks), stop)
        parts.append((start, stop))
        if stop >= end:
            return parts
        start = next((at for at in range(stop - overlap, stop) if at in words), stop - overlap)


def apart(
    windows: Sequence[Encoding],
    places: Sequence[Span],
    front: int,
    behind: int,
    size: int,
    ends: Marks,
    words: Marks,
) -> tuple[list[Encoding], list[Span]]:
    """Windows of a text with their chunks of at most ``size`` tokens to be pooled apart, and where the chunks lie in the text.

    places: the windows in the text's tokens. front, behind: tokens of a window before and behind the text's; they belong to
    its first and its last chunk.
    """
    found: list[Encoding] = []
    chunked: list[Span] = []
    for window, (start, stop) in zip(windows, places, strict=True):
        shift = front - start
        own = [frozenset(at + shift for at in range(start, stop) if at in marks) for marks in (ends, words)]
        cuts = chunks(0, window.tokens - behind, size - behind, 0, *own)
        cuts[-1] = (cuts[-1][0], window.tokens)
        found.append(replace(window, parts=tuple(cuts)))
        chunked += [(max(first - shift, start), min(last - shift, stop)) for first, last in cuts]
    return found, chunked


def word_starts(words: Sequence[int | None]) -> frozenset[int]:
    """Numbers of the tokens that begin a word, of the word that each token belongs to."""
    return frozenset(at for at, word in enumerate(words) if word is None or at == 0 or word != words[at - 1])


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens stay of two texts: the longer one is cut, both once they are equal. Source: tokenizers' truncation."""
    short, long = sorted((first, second))
    long = max(short, room - short) if short <= room else short
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    return (short, long) if first <= second else (long, short)


def sentence_ends(text: str, offsets: Sequence[Span]) -> frozenset[int]:
    """Numbers of the tokens that begin behind the end of a sentence."""
    marks = [match.end() for match in _SENTENCE_END.finditer(text)]
    found: set[int] = set()
    token = 0
    for mark in marks:
        while token < len(offsets) and offsets[token][0] < mark:
            token += 1
        found.add(token)
    return frozenset(found)
