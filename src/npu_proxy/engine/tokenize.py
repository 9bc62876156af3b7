"""Texts to token ids, with exact counts, before anything is queued.

The limit is the model's own; truncation and padding that a tokenizer.json bakes in are switched off.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from npu_proxy.errors import (
    EmptyInputError,
    InputError,
    ModelError,
    NothingLeftError,
    NpuProxyError,
    TooLongError,
    UnsupportedError,
)
from npu_proxy.types import CHUNKING, Chunked, Chunking, EmbedRequest, Encoding, Kind, ModelSpec, Pair, Span, TextInput, Truncate

Sanitize = Literal["none", "basic", "nfkc"]
OnEmpty = Literal["error", "placeholder"]

PLACEHOLDER = "[EMPTY]"
"""What is embedded for an empty text when ``on_empty`` says so."""

_CHARACTERS_A_TOKEN = 16
"""How much of a long text is tokenized at first, for each token that can be kept; more only where that was too little."""
_WORD_TOKENS = 100
"""A word of more characters than that is one unknown token."""
_COUNTED = 200_000
"""Characters up to which a text that is refused for its length is counted to its end."""
_LONGEST = 4_000_000
"""Characters that are tokenized of one text at most: a tokenizer needs some hundred bytes for each."""
_OVERLAP = 32
"""Tokens that neighbouring chunks share at most, unless a request says how many."""
_OWN_IDS = 256
"""So many ids tell whose they are."""


class Token(NamedTuple):
    """A token and where it lies in its text, in characters."""

    id: int
    text: str
    special: bool
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How the texts of one request are read: all that decides which tokens a text becomes.

    prompt: stands before each text (before the first of a pair). prompted: its tokens, where they are not pooled, else 0.
    document: which side of a late-interaction model, None for the others. limit: tokens of a text, special ones included.
    """

    prompt: str = ""
    prompted: int = 0
    document: bool | None = None
    truncate: Truncate = Truncate.END
    limit: int
    chunking: Chunking = CHUNKING

    @property
    def key(self) -> tuple[object, ...]:
        """Different for manners that give different answers; as it always was for the plain ones, which caches hold."""
        special = [] if self.document is None else [self.document]
        if self.truncate is Truncate.CHUNK:
            special += [self.chunking.overlap, self.chunking.sentences]
        return (self.prompt, self.truncate, self.limit, *special)


_MEANINGS = {
    "query": ("query",),
    "document": ("document", "passage", "corpus"),
    "classification": ("classification",),
    "clustering": ("clustering",),
}
"""Prompt names by input type, in the words of sentence-transformers; the first that a model has."""
_CASES = {"classification": ("Classification",), "clustering": ("Clustering",)}
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[\u3002\uff01\uff1f]|\n+")


class TextEncoder:
    """A model's tokenizer and prompts. Thread-safe: it has no state that changes."""

    def __init__(self, spec: ModelSpec, *, sanitize: Sanitize = "none", on_empty: OnEmpty = "error") -> None:
        self._spec = spec
        self._sanitize: Sanitize = sanitize
        self._on_empty: OnEmpty = on_empty
        try:
            self._tokenizer = Tokenizer.from_file(str(spec.tokenizer_file))
        except Exception as error:  # the bindings raise bare Exception for whatever is wrong with the file
            raise ModelError(f"{spec.name}: tokenizer.json cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # The tokenizer's own lower-casing is in its normalizer; sentence-transformers adds this one where asked.
        self._lower_case = spec.lower_case
        self._frame = _frame(self._tokenizer, spec) if spec.special_tokens else ([], [])
        self.vocabulary = spec.vocabulary
        """Ids are below it."""
        self.special_tokens = len(self._frame[0]) + len(self._frame[1])
        """Tokens that are added to every text."""
        self.special_ids = frozenset([*self._frame[0], *self._frame[1], *_unknown(self._tokenizer)])
        """Ids that stand for no word: those, and that of the unknown."""
        self._pair = _pair_frame(self._tokenizer, spec) if spec.kind is Kind.SCORES else None
        # BertPreTokenizer splits into words, each tokenized alone, so a cut can change one word only.
        self._splits_words = type(self._tokenizer.pre_tokenizer).__name__ == "BertPreTokenizer"

    # -- how a request is read -----------------------------------------------------------------------------------

    def manner(self, request: EmbedRequest) -> Manner:
        """How a request's texts are read; raises InputError for a prompt or an instruction that the model does not have."""
        spec, prompt, document = self._spec, self.prompt(request), None
        limit = min(request.max_tokens or spec.max_length, spec.max_length)
        if spec.sides is not None:
            document = request.input_type != "query"
            limit = min(limit, spec.sides.document_length if document else spec.sides.query_length)
        skipped = 0 if spec.include_prompt or not prompt else self._prompt_tokens(prompt)
        chunking = request.chunking
        if chunking.overlap is None:
            chunking = replace(chunking, overlap=min(_OVERLAP, limit // 8))
        if request.truncate is Truncate.CHUNK and not 0 <= (chunking.overlap or 0) < limit - self.special_tokens:
            message = f"an overlap of {chunking.overlap} tokens leaves nothing of chunks of {limit}"
            raise InputError(message, param="overlap")
        return Manner(prompt=prompt, prompted=skipped, document=document, truncate=request.truncate, limit=limit, chunking=chunking)

    def prompt(self, request: EmbedRequest) -> str:
        """The text put before each text of a request; raises InputError for a prompt the model does not have."""
        prompts = self._spec.prompts
        given = [name for name in ("prompt", "prompt_name", "instruction") if getattr(request, name) is not None]
        if len(given) > 1:
            raise InputError(f"`{given[0]}` and `{given[1]}` both say what stands before a text; give one", param=given[1])
        if request.prompt is not None:
            return request.prompt
        if request.prompt_name is not None:
            if request.prompt_name not in prompts:
                known = ", ".join(sorted(prompts)) or "none"
                message = f"the model has no prompt `{request.prompt_name}`; its prompts: {known}"
                raise InputError(message, param="prompt_name")
            return prompts[request.prompt_name]
        if request.instruction is not None:
            if not self._spec.instruction:
                message = f"{self._spec.name} takes no instructions; give the whole prompt as `prompt` where it should have one"
                raise InputError(message, param="instruction")
            return self._spec.instruction.replace("{task}", request.instruction)
        if request.input_type is not None:
            names = _MEANINGS.get(request.input_type)
            if names is None:
                message = f"input_type must be one of {', '.join(_MEANINGS)}, not `{request.input_type}`"
                raise InputError(message, param="input_type")
            names = (*names, *_CASES.get(request.input_type, ()))
            return next((prompts[name] for name in names if name in prompts), "")
        return prompts.get(self._spec.default_prompt or "", "")

    def _prompt_tokens(self, prompt: str) -> int:
        """How many leading tokens are a prompt's, as sentence-transformers counts: with what stands before."""
        ids = self._tokenizer.encode(
            prompt.lower() if self._lower_case else prompt, add_special_tokens=self._spec.special_tokens
        ).ids
        behind = self._frame[1]
        return len(ids) - bool(behind and ids[-1] == behind[-1])

    # -- texts to ids --------------------------------------------------------------------------------------------

    def encode(self, texts: Sequence[TextInput], manner: Manner) -> list[Encoding | Chunked | NpuProxyError]:
        """Encode texts (str, token ids or pairs) in one batch; what is wrong with a text stands in its place."""
        prepared = [self._prepare(text, manner.prompt) for text in texts]
        if manner.truncate is Truncate.CHUNK:
            return [one if isinstance(one, NpuProxyError) else self._chunked(one, manner) for one in prepared]
        strings = [side for one in prepared for side in (one if isinstance(one, Pair) else (one,)) if isinstance(side, str)]
        encoded = iter(self._encode_strings(strings, manner.truncate, manner.limit))
        return [self._one(one, encoded, manner) for one in prepared]

    def plain(self, texts: Sequence[TextInput], truncate: Truncate = Truncate.END) -> list[Encoding]:
        """Encodings of those texts that have one, up to the model's limit and without a prompt."""
        side = None if self._spec.sides is None else True
        found = self.encode(texts, Manner(limit=self._spec.max_length, truncate=truncate, document=side))
        return [one for one in found if isinstance(one, Encoding)]

    def _one(
        self, text: str | list[int] | Pair | NpuProxyError, encoded: Iterator[list[int] | NpuProxyError], manner: Manner
    ) -> Encoding | NpuProxyError:
        if isinstance(text, NpuProxyError):
            return text
        if isinstance(text, Pair):
            first, second = next(encoded), next(encoded)
            if isinstance(first, NpuProxyError):
                return first
            return second if isinstance(second, NpuProxyError) else self._fit_pair(self._inner(first), self._inner(second), manner)
        ids = next(encoded) if isinstance(text, str) else text
        return ids if isinstance(ids, NpuProxyError) else self._fit(ids, manner)

    def _prepare(self, text: TextInput, prompt: str) -> str | list[int] | Pair | NpuProxyError:
        if isinstance(text, Pair):
            if self._pair is None:
                return UnsupportedError(f"{self._spec.name} reads one text at a time, no pairs", param="input")
            sides = (self._prepare(text.first, prompt), self._prepare(text.second, ""))
            wrong = next((side for side in sides if isinstance(side, NpuProxyError)), None)
            return wrong or Pair(*sides)  # type: ignore[arg-type]
        if not isinstance(text, str):
            return self._check_ids(text)
        if self._sanitize != "none":
            text = _sanitize(text, self._sanitize)
        try:
            text.encode()
        except UnicodeEncodeError:
            return InputError(
                "the text holds a lone surrogate, which is no Unicode character; sanitize=`basic` removes it",
                param="input",
            )
        if not text:
            if self._on_empty == "error":
                return EmptyInputError("the text is empty; on_empty=`placeholder` embeds `[EMPTY]` instead", param="input")
            text = PLACEHOLDER
        text = prompt + text
        return text.lower() if self._lower_case else text

    def _check_ids(self, ids: Sequence[int]) -> list[int] | NpuProxyError:
        if not ids:
            return EmptyInputError("the list of token ids is empty", param="input")
        worst = next((i for i in ids if not 0 <= i < self._spec.vocabulary), None)
        if worst is None:
            return [*self._frame[0], *ids, *self._frame[1]]
        message = (
            f"token id {worst} is outside this model's vocabulary of {self._spec.vocabulary}; ids of another tokenizer"
            " (langchain-openai sends cl100k ids unless check_embedding_ctx_length=False) mean nothing here: send text"
        )
        return InputError(message, param="input")

    def _inner(self, ids: list[int]) -> list[int]:
        """Without the special tokens around it."""
        return ids[len(self._frame[0]) : len(ids) - len(self._frame[1])]

    def _encode_strings(self, texts: list[str], truncate: Truncate, limit: int) -> list[list[int] | NpuProxyError]:
        """Ids with special tokens of each text; of a long one only of as much as tells which tokens are kept.

        Cutting a text changes its last word at most (its first, where the start is cut off), and a word has at most
        ``_WORD_TOKENS`` tokens. With so many more than are kept, those that are kept are what the whole text has.
        """
        least = _COUNTED if truncate is Truncate.ERROR else 0  # there the error says how long the text is
        sizes = [max(least, _CHARACTERS_A_TOKEN * (limit + _WORD_TOKENS))] * len(texts)
        parts = [self._part(text, size, truncate) for text, size in zip(texts, sizes, strict=True)]
        results: list[list[int] | NpuProxyError] = [
            encoding.ids for encoding in self._tokenizer.encode_batch_fast(parts, add_special_tokens=self._spec.special_tokens)
        ]
        for index, text in enumerate(texts):
            part, size, ids = parts[index], sizes[index], results[index]
            while len(part) < len(text) and isinstance(ids, list) and len(ids) <= limit + _WORD_TOKENS:
                size *= 8
                part = self._part(text, size, truncate)
                ids = (
                    _wasteful()
                    if len(part) > _LONGEST
                    else self._tokenizer.encode(part, add_special_tokens=self._spec.special_tokens).ids
                )
            if len(part) > _LONGEST:  # a tokenizer that does not split at words
                ids = _wasteful()
            elif truncate is Truncate.ERROR and len(part) < len(text) and isinstance(ids, list):
                ids = TooLongError(limit=limit, tokens=len(ids), more=True)
            results[index] = ids
        return results

    def _part(self, text: str, size: int, truncate: Truncate) -> str:
        """The end of a long text where its start is cut off, else its start; the text itself where parts are not exact."""
        if not self._splits_words or len(text) <= size:
            return text if len(text) <= _LONGEST or self._splits_words else text[: _LONGEST + 1]
        return text[-size:] if truncate is Truncate.START else text[:size]

    def tokens(self, texts: Sequence[str], prompt: str, *, special: bool) -> list[list[Token]]:
        """The tokens of whole texts, uncut. Raises InputError for a text that cannot be encoded."""
        prepared = [self._prepare(text, prompt) for text in texts]
        special = special and self._spec.special_tokens
        found: list[list[Token]] = []
        for text in prepared:
            if not isinstance(text, str):
                raise text if isinstance(text, NpuProxyError) else InputError("expected text", param="inputs")
            one = self._tokenizer.encode(text, add_special_tokens=special)
            parts = zip(one.ids, one.tokens, one.special_tokens_mask, one.offsets, strict=True)
            found.append([Token(number, piece, bool(mask), *span) for number, piece, mask, span in parts])
        return found

    def owns(self, ids: Sequence[int]) -> bool:
        """Whether token ids look like this model's own: all of its vocabulary, and what its tokenizer makes of their text.

        Ids of another tokenizer hardly ever come back the same; those of a single whole word may.
        """
        if not ids or not all(0 <= number < self._spec.vocabulary for number in ids):
            return not ids
        some = list(ids[:_OWN_IDS])
        again = self._tokenizer.encode(self._tokenizer.decode(some, skip_special_tokens=False), add_special_tokens=False).ids
        return again == some

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """The text of token ids. Raises InputError for ids outside the vocabulary."""
        if any(not 0 <= number < self._spec.vocabulary for number in ids):
            raise InputError(f"token ids must be below {self._spec.vocabulary}, this model's vocabulary", param="ids")
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def _fit(self, ids: list[int], manner: Manner) -> Encoding | NpuProxyError:
        limit = manner.limit
        if len(ids) <= limit:
            return self._made(ids, manner, truncated=False)
        if manner.truncate is Truncate.ERROR:
            return TooLongError(limit=limit, tokens=len(ids))
        before, after = self._frame
        inner, keep = self._inner(ids), limit - len(before) - len(after)
        if keep < 1:
            return NothingLeftError(f"a limit of {limit} tokens leaves nothing of a text", param="max_tokens")
        inner = inner[:keep] if manner.truncate is Truncate.END else inner[len(inner) - keep :]
        return self._made([*before, *inner, *after], manner, truncated=True)

    def _made(self, ids: list[int], manner: Manner, *, truncated: bool) -> Encoding:
        """With what the model's kind adds: a query's expansion, a prompt that is not pooled."""
        if not ids:  # a static model, and a text of nothing it knows
            ids = [0]
        sides, seen = self._spec.sides, -1
        if sides is not None and not manner.document and len(ids) < sides.expanded:
            seen = -1 if sides.attend else len(ids)
            ids = [*ids, *[sides.mask_id] * (sides.expanded - len(ids))]
        skipped = min(manner.prompted, len(ids) - 1)
        return Encoding(np.array(ids, np.int32), truncated, prompt=skipped, seen=seen, document=bool(manner.document))

    def _fit_pair(self, first: list[int], second: list[int], manner: Manner) -> Encoding | NpuProxyError:
        """Two texts in one, cut to the limit as tokenizers' `longest_first` does. Raises nothing, as ``encode``."""
        assert self._pair is not None
        room = manner.limit - self._pair.special
        truncated = len(first) + len(second) > room
        if truncated:
            if manner.truncate is Truncate.ERROR:
                return TooLongError(limit=manner.limit, tokens=len(first) + len(second) + self._pair.special)
            if room < 2:
                return NothingLeftError(f"a limit of {manner.limit} tokens leaves nothing of a pair", param="max_tokens")
            counts = longest_first(len(first), len(second), room)
            if manner.truncate is Truncate.START:
                first, second = first[len(first) - counts[0] :], second[len(second) - counts[1] :]
            else:
                first, second = first[: counts[0]], second[: counts[1]]
        return self._joined(first, second, truncated=truncated)

    def _joined(self, first: list[int], second: list[int], *, truncated: bool) -> Encoding:
        assert self._pair is not None
        before, between, after = self._pair.ids
        ids = [*before, *first, *between, *second, *after]
        if not self._spec.types:
            return Encoding(np.array(ids, np.int32), truncated)
        types = [*self._pair.types[0], *[self._pair.of[0]] * len(first), *self._pair.types[1]]
        types += [*[self._pair.of[1]] * len(second), *self._pair.types[2]]
        return Encoding(np.array(ids, np.int32), truncated, types=np.array(types, np.int32))

    # -- long texts ----------------------------------------------------------------------------------------------

    def _chunked(self, text: str | list[int] | Pair, manner: Manner) -> Encoding | Chunked | NpuProxyError:
        """A text that is too long as chunks that overlap, each with the prompt (or the first of a pair) before it."""
        query: list[int] = []
        if isinstance(text, Pair):
            assert self._pair is not None
            query = self._tokenizer.encode(text.first, add_special_tokens=False).ids
            room = manner.limit - self._pair.special
            query = query[: room // 2]
            room -= len(query)
        else:
            room = manner.limit - self.special_tokens
        body = text.second if isinstance(text, Pair) else text
        if isinstance(body, str):
            if len(body) > _LONGEST:
                return _wasteful()
            one = self._tokenizer.encode(body, add_special_tokens=False)
            ids, offsets = one.ids, one.offsets
        else:
            ids, offsets = self._inner(body), [(0, 0)] * (len(body) - self.special_tokens)
        lead = 0
        if not isinstance(text, Pair) and isinstance(body, str):
            lead = sum(1 for start, _ in offsets if start < len(manner.prompt))
        whole = len(ids) <= room
        overlap = manner.chunking.overlap or 0
        if room - lead <= overlap:
            return NothingLeftError(f"a limit of {manner.limit} tokens leaves nothing of a text in chunks", param="max_tokens")
        ends = _sentence_ends(body, offsets) if manner.chunking.sentences and isinstance(body, str) else frozenset[int]()
        parts = [(lead, len(ids))] if whole else chunks(lead, len(ids), room - lead, overlap, ends)
        encodings: list[Encoding] = []
        for start, stop in parts:
            inner = [*ids[:lead], *ids[start:stop]]
            if isinstance(text, Pair):
                encodings.append(self._joined(query, inner, truncated=False))
            else:
                encodings.append(self._made([*self._frame[0], *inner, *self._frame[1]], manner, truncated=False))
        shift = 0 if isinstance(text, Pair) else len(manner.prompt)
        spans: list[Span] = [
            (offsets[start][0] - shift, offsets[stop - 1][1] - shift) if stop > start else (0, 0) for start, stop in parts
        ]
        return Chunked(encodings=encodings, spans=spans)


def chunks(first: int, end: int, room: int, overlap: int, ends: frozenset[int] | set[int]) -> list[tuple[int, int]]:
    """Parts of tokens ``first`` to ``end`` of at most ``room``, each beginning ``overlap`` before the end of the one before.

    ends: tokens before which a sentence ends; a part ends at the last of them in its second half, where there is one.
    """
    parts: list[tuple[int, int]] = []
    start = first
    while True:
        stop = min(start + room, end)
        if stop < end:
            stop = next((at for at in range(stop, start + max(room // 2, overlap), -1) if at in ends), stop)
        parts.append((start, stop))
        if stop >= end:
            return parts
        start = stop - overlap


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens stay of two texts: the longer one is cut, both once they are equal. Source: tokenizers' truncation."""
    short, long = sorted((first, second))
    long = max(short, room - short) if short <= room else short
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    return (short, long) if first <= second else (long, short)


def _sentence_ends(text: str, offsets: Sequence[Span]) -> frozenset[int]:
    """Numbers of the tokens that begin behind the end of a sentence."""
    marks = [match.end() for match in _SENTENCE_END.finditer(text)]
    found: set[int] = set()
    token = 0
    for mark in marks:
        while token < len(offsets) and offsets[token][0] < mark:
            token += 1
        found.add(token)
    return frozenset(found)


@dataclass(frozen=True)
class _PairFrame:
    """Special tokens before, between and behind the texts of a pair, their types, and those of the two texts."""

    ids: tuple[list[int], list[int], list[int]]
    types: tuple[list[int], list[int], list[int]]
    of: tuple[int, int]

    @property
    def special(self) -> int:
        return sum(map(len, self.ids))


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


def _frame(tokenizer: Tokenizer, spec: ModelSpec) -> tuple[list[int], list[int]]:
    """The special tokens that stand before and behind every text, seen by encoding a text with and without them."""
    sample, plain = _sample(tokenizer, spec)
    whole = tokenizer.encode(sample).ids
    start = _find(whole, plain, 0, spec)
    return whole[:start], whole[start + len(plain) :]


def _pair_frame(tokenizer: Tokenizer, spec: ModelSpec) -> _PairFrame:
    """As ``_frame`` for two texts."""
    sample, plain = _sample(tokenizer, spec)
    whole = tokenizer.encode(sample, sample)
    one = _find(whole.ids, plain, 0, spec)
    two = _find(whole.ids, plain, one + len(plain), spec)
    cuts = (slice(one), slice(one + len(plain), two), slice(two + len(plain), None))
    ids, types = ([values[cut] for cut in cuts] for values in (whole.ids, whole.type_ids))
    return _PairFrame((ids[0], ids[1], ids[2]), (types[0], types[1], types[2]), (whole.type_ids[one], whole.type_ids[two]))


def _unknown(tokenizer: Tokenizer) -> list[int]:
    ids = (tokenizer.token_to_id(token) for token in ("[UNK]", "<unk>"))
    return [number for number in ids if number is not None]


def _wasteful() -> InputError:
    words = f"the text is longer than {_LONGEST} characters, and still they say too little; shorten it"
    return InputError(words, param="input")


def _sanitize(text: str, how: Sanitize) -> str:
    """Remove NUL and lone surrogates ("basic"), and normalize to NFKC besides ("nfkc")."""
    text = "".join(character for character in text if character != "\0" and not "\ud800" <= character <= "\udfff")
    return unicodedata.normalize("NFKC", text) if how == "nfkc" else text
