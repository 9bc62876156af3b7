"""Texts to token ids, with exact counts, before anything is queued.

The limit is the model's own; truncation and padding that a tokenizer.json bakes in are switched off.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from npu_proxy.engine.frames import apart, chunks, frame_of, longest_first, pair_frame_of, sentence_ends, word_starts
from npu_proxy.engine.manner import Manner, check_chunking, prompt_of
from npu_proxy.errors import (
    EmptyInputError,
    InputError,
    ModelError,
    NothingLeftError,
    NpuProxyError,
    TooLongError,
    UnsupportedError,
)
from npu_proxy.types import Chunked, EmbedRequest, Encoding, Kind, ModelSpec, Pair, Pooling, Span, TextInput, Truncate

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
_OWN_IDS = 256
"""So many ids tell whose they are."""


class Token(NamedTuple):
    """A token and where it lies in its text, in characters."""

    id: int
    text: str
    special: bool
    start: int
    stop: int


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
        self._frame = frame_of(self._tokenizer, spec) if spec.special_tokens else ([], [])
        self.vocabulary = spec.vocabulary
        """Ids are below it."""
        self.special_tokens = len(self._frame[0]) + len(self._frame[1])
        """Tokens that are added to every text."""
        self.special_ids = frozenset([*self._frame[0], *self._frame[1], *_unknown(self._tokenizer)])
        """Ids that stand for no word: those, and that of the unknown."""
        self._pair = pair_frame_of(self._tokenizer, spec) if spec.kind is Kind.SCORES else None
        # Decoders are scored at the last token that is not padding; where theirs end texts with that very token, it goes.
        padding = spec.config.get("pad_token_id") if spec.kind is Kind.SCORES and spec.pooling is Pooling.LAST_TOKEN else None
        self._padding = padding if isinstance(padding, int) else None
        # BertPreTokenizer splits into words, each tokenized alone, so a cut can change one word only.
        self._splits_words = type(self._tokenizer.pre_tokenizer).__name__ == "BertPreTokenizer"

    # -- how a request is read -----------------------------------------------------------------------------------

    def manner(self, request: EmbedRequest) -> Manner:
        """How a request's texts are read; raises InputError for a prompt or an instruction that the model does not have."""
        spec, prompt, document = self._spec, prompt_of(self._spec, request), None
        limit = min(request.max_tokens or spec.max_length, spec.max_length)
        if spec.sides is not None:
            document = request.input_type != "query"
            limit = min(limit, spec.sides.document_length if document else spec.sides.query_length)
        skipped = 0 if spec.include_prompt or not prompt else self._prompt_tokens(prompt)
        chunking = request.chunking
        if request.truncate is Truncate.CHUNK:
            chunking = check_chunking(chunking, spec, limit, self.special_tokens)
            limit = limit if chunking.late else min(limit, chunking.size or limit)
        return Manner(prompt=prompt, prompted=skipped, document=document, truncate=request.truncate, limit=limit, chunking=chunking)

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

    def plain(self, texts: Sequence[TextInput]) -> list[Encoding]:
        """Encodings of those texts that have one, up to the model's limit and without a prompt."""
        side = None if self._spec.sides is None else True
        found = self.encode(texts, Manner(limit=self._spec.max_length, document=side))
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
                return EmptyInputError(
                    "the text is empty; leave it out (or set `on_empty` to `placeholder`, which embeds `[EMPTY]`)",
                    param="input",
                )
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
        if not ids:  # a tokenizer without special tokens, and a text of spaces
            return _nothing()
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

    def _scored(self, encoding: Encoding) -> Encoding:
        """Without padding at its end, of a decoder that scores."""
        ids = encoding.ids
        if self._padding is None or ids[-1] != self._padding or (ids == self._padding).all():
            return encoding
        last = int(np.nonzero(ids != self._padding)[0][-1]) + 1
        return replace(encoding, ids=ids[:last], types=None if encoding.types is None else encoding.types[:last])

    def _made(self, ids: list[int], manner: Manner, *, truncated: bool) -> Encoding:
        """With what the model's kind adds: a query's expansion, a prompt that is not pooled."""
        sides, seen = self._spec.sides, -1
        if sides is not None and not manner.document and len(ids) < sides.expanded:
            seen = -1 if sides.attend else len(ids)
            ids = [*ids, *[sides.mask_id] * (sides.expanded - len(ids))]
        skipped = min(manner.prompted, len(ids) - 1)
        made = Encoding(np.array(ids, np.int32), truncated, prompt=skipped, seen=seen, document=bool(manner.document))
        return self._scored(made)

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
        return self._scored(self._pair.join(first, second, truncated=truncated, typed=self._spec.types))

    # -- long texts ----------------------------------------------------------------------------------------------

    def _chunked(self, text: str | list[int] | Pair, manner: Manner) -> Chunked | NpuProxyError:
        """A text as chunks that overlap (one, where it fits), each with the prompt, or the first of a pair, before it."""
        query: list[int] | None = None
        cut = False
        if isinstance(text, Pair):
            assert self._pair is not None
            room = manner.limit - self._pair.special
            query = self._tokenizer.encode(text.first, add_special_tokens=False).ids
            cut = len(query) > room // 2
            query = query[: room // 2]
            room -= len(query)
        else:
            room = manner.limit - self.special_tokens
        body = text.second if isinstance(text, Pair) else text
        if isinstance(body, str):
            if len(body) > _LONGEST:
                return _wasteful()
            one = self._tokenizer.encode(body, add_special_tokens=False)
            ids, offsets, words = one.ids, one.offsets, word_starts(one.word_ids)
            ends = sentence_ends(body, offsets) if manner.chunking.sentences else frozenset[int]()
        else:
            ids, ends, words = self._inner(body), frozenset[int](), frozenset[int]()
            offsets = [(0, 0)] * len(ids)  # token ids lie nowhere
        # The prompt is in front of the text, so its tokens are the first; they lead every chunk.
        before = len(manner.prompt) if query is None and isinstance(body, str) else 0
        lead = sum(1 for start, _ in offsets if start < before)
        overlap = manner.chunking.overlap or 0
        if room - lead <= overlap:
            return NothingLeftError(f"a limit of {manner.limit} tokens leaves nothing of a text in chunks", param="max_tokens")
        if len(ids) <= lead:
            return _nothing()
        parts = chunks(lead, len(ids), room - lead, overlap, ends, words)
        encodings: list[Encoding] = []
        for start, stop in parts:
            inner = [*ids[:lead], *ids[start:stop]]
            if query is None:
                encodings.append(self._made([*self._frame[0], *inner, *self._frame[1]], manner, truncated=False))
            else:
                assert self._pair is not None
                encodings.append(self._scored(self._pair.join(query, inner, truncated=cut, typed=self._spec.types)))
        if manner.chunking.late:
            size, front, behind = manner.chunking.size or 0, len(self._frame[0]) + lead, len(self._frame[1])
            if front + behind >= size:
                return NothingLeftError(f"the prompt leaves nothing of chunks of {size} tokens", param="size")
            encodings, parts = apart(encodings, parts, front, behind, size, ends, words)
        spans: list[Span] = [(offsets[start][0] - before, offsets[stop - 1][1] - before) for start, stop in parts]
        return Chunked(encodings=encodings, spans=spans)


def _unknown(tokenizer: Tokenizer) -> list[int]:
    ids = (tokenizer.token_to_id(token) for token in ("[UNK]", "<unk>"))
    return [number for number in ids if number is not None]


def _nothing() -> EmptyInputError:
    return EmptyInputError("the model's tokenizer makes nothing of the text", param="input")


def _wasteful() -> InputError:
    words = f"the text is longer than {_LONGEST} characters, and still they say too little; shorten it"
    return InputError(words, param="input")


def _sanitize(text: str, how: Sanitize) -> str:
    """Remove NUL and lone surrogates ("basic"), and normalize to NFKC besides ("nfkc")."""
    text = "".join(character for character in text if character != "\0" and not "\ud800" <= character <= "\udfff")
    return unicodedata.normalize("NFKC", text) if how == "nfkc" else text
