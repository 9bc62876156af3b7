"""The special tokens that a tokenizer puts around a text or a pair, and how a pair is truncated. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from npu_proxy.batch import Encoding
from npu_proxy.errors import InputError, ModelError
from npu_proxy.spec import ModelSpec, PairTemplate
from npu_proxy.types import OutputType


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens before and after every text."""

    before: list[int]
    after: list[int]

    def __len__(self) -> int:
        return len(self.before) + len(self.after)

    def add(self, ids: Sequence[int]) -> list[int]:
        """Token ids with the special tokens around them."""
        return [*self.before, *ids, *self.after]

    def strip(self, ids: list[int]) -> list[int]:
        """Token ids without the special tokens around them."""
        return ids[len(self.before) : len(ids) - len(self.after)]


@dataclass(frozen=True)
class PairSpecialTokens:
    """Ids and types of the special tokens before, between and after the texts of a pair, and the types of the two texts."""

    ids: tuple[list[int], list[int], list[int]]
    type_ids: tuple[list[int], list[int], list[int]]
    text_types: tuple[int, int]

    def __len__(self) -> int:
        return sum(map(len, self.ids))

    def join(self, first: list[int], second: list[int], *, truncated: bool, typed: bool) -> Encoding:
        """Join the token ids of two texts into one encoding. typed: whether tokens have types."""
        before, between, after = self.ids
        ids = np.array([*before, *first, *between, *second, *after], np.int32)
        if not typed:
            return Encoding(ids, truncated)
        first_type, second_type = self.text_types
        types = [*self.type_ids[0], *[first_type] * len(first), *self.type_ids[1], *[second_type] * len(second), *self.type_ids[2]]
        return Encoding(ids, truncated, type_ids=np.array(types, np.int32))


class UnusableTokens:
    """Tokens that may occur in a text, and for which a model has nothing to compute.

    Those beyond its table of vectors, which transformers refuses with an index error; and, for sparse models that give padding no
    position, padding written in a text.
    """

    def __init__(self, tokenizer: Tokenizer, spec: ModelSpec) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = spec.vocabulary
        self._may_be_outside = tokenizer.get_vocab_size(with_added_tokens=True) > spec.vocabulary
        unplaced = spec.batch_layout.unplaced
        self._padding = unplaced[0] if unplaced is not None and spec.output_type is OutputType.SPARSE else None

    def find(self, ids: Sequence[int]) -> InputError | None:
        """An error that names the first such token among ``ids``."""
        outside = self._may_be_outside and max(ids, default=0) >= self._vocabulary
        found = next(number for number in ids if number >= self._vocabulary) if outside else None
        if found is None and self._padding is not None and self._padding in ids:
            found = self._padding
        if found is None:
            return None
        token = self._tokenizer.id_to_token(found)
        return InputError(f"the text contains the token `{token}`, for which the model has no vector; remove it", param="input")


def template_end(tokenizer: Tokenizer, template: PairTemplate) -> list[int]:
    """The token ids that end every pair of a template, which stay when a pair is cut; none if they are cut, too."""
    if not template.keeps_end:
        return []
    one, other = (tokenizer.encode(template.join(text, text), add_special_tokens=False).ids for text in ("0", "1 2 3 4"))
    count = 0
    while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
        count += 1
    return one[len(one) - count :]


def find_special_tokens(tokenizer: Tokenizer, spec: ModelSpec) -> SpecialTokens:
    """Find the special tokens around every text, by encoding a text with and without them. Raises ModelError."""
    sample, plain = _sample(tokenizer, spec)
    encoding = tokenizer.encode(sample)
    ids = encoding.ids
    start = _find(ids, plain, 0, spec)
    if any(encoding.type_ids) and spec.tokenizer.types and spec.config.get("type_vocab_size", 2) > 1:
        raise ModelError(
            f"{spec.name}: tokenizer.json gives tokens of a single text a `type_id` other than 0; this is not supported"
        )
    if max(ids, default=0) >= spec.vocabulary:
        raise ModelError(f"{spec.name}: the tokenizer's special tokens {ids} have no vectors; config.json says {spec.vocabulary}")
    return SpecialTokens(ids[:start], ids[start + len(plain) :])


def find_pair_special_tokens(tokenizer: Tokenizer, spec: ModelSpec) -> PairSpecialTokens:
    """Find the special tokens around and between the texts of a pair, like ``find_special_tokens``."""
    sample, plain = _sample(tokenizer, spec)
    encoding = tokenizer.encode(sample, sample)
    first = _find(encoding.ids, plain, 0, spec)
    second = _find(encoding.ids, plain, first + len(plain), spec)
    parts = (slice(first), slice(first + len(plain), second), slice(second + len(plain), None))
    ids, types = ([values[part] for part in parts] for values in (encoding.ids, encoding.type_ids))
    text_types = (encoding.type_ids[first], encoding.type_ids[second])
    return PairSpecialTokens((ids[0], ids[1], ids[2]), (types[0], types[1], types[2]), text_types)


def unknown_token_ids(tokenizer: Tokenizer) -> list[int]:
    """The id of the unknown token; empty if there is none."""
    ids = (tokenizer.token_to_id(token) for token in ("[UNK]", "<unk>"))
    return [number for number in ids if number is not None]


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts are kept: the longer one is cut until they are equal, then both. Source: tokenizers."""
    short, long = sorted((first, second))
    long = max(short, room - short) if short <= room else short
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    return (short, long) if first <= second else (long, short)


def _sample(tokenizer: Tokenizer, spec: ModelSpec) -> tuple[str, list[int]]:
    sample = next((text for text in ("a", "the", "1", ".") if tokenizer.encode(text, add_special_tokens=False).ids), None)
    if sample is None:
        raise ModelError(f"{spec.name}: tokenizer.json produces no tokens for any text")
    return sample, tokenizer.encode(sample, add_special_tokens=False).ids


def _find(ids: Sequence[int], plain: Sequence[int], first: int, spec: ModelSpec) -> int:
    for start in range(first, len(ids) - len(plain) + 1):
        if list(ids[start : start + len(plain)]) == list(plain):
            return start
    raise ModelError(f"{spec.name}: tokenizer.json puts special tokens inside a text instead of around it")
