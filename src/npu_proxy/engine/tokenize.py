"""Texts to token ids, with exact counts, before anything is queued.

The limit is the model's own; truncation and padding that a tokenizer.json bakes in are switched off.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from npu_proxy.errors import EmptyInputError, InputError, ModelError, NothingLeftError, NpuProxyError, TooLongError
from npu_proxy.types import EmbedRequest, Encoding, ModelSpec, TextInput, Truncate

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
        empty = self._tokenizer.encode("")
        self._frame = _frame(self._tokenizer, spec)
        self.vocabulary = spec.vocabulary
        """Ids are below it."""
        self.special_tokens = len(empty.ids)
        """Tokens that are added to every text."""
        # BertPreTokenizer splits into words, each tokenized alone, so a cut can change one word only.
        self._splits_words = type(self._tokenizer.pre_tokenizer).__name__ == "BertPreTokenizer"

    def prompt(self, request: EmbedRequest) -> str:
        """The text put before each text of a request; raises InputError for a prompt the model does not have."""
        prompts = self._spec.prompts
        if request.prompt_name is not None:
            if request.prompt_name not in prompts:
                known = ", ".join(sorted(prompts)) or "none"
                message = f"the model has no prompt `{request.prompt_name}`; its prompts: {known}"
                raise InputError(message, param="prompt_name")
            return prompts[request.prompt_name]
        if request.input_type is not None:
            names = {"query": ("query",), "document": ("document", "passage", "corpus")}.get(request.input_type)
            if names is None:
                message = f"input_type must be `query` or `document`, not `{request.input_type}`"
                raise InputError(message, param="input_type")
            return next((prompts[name] for name in names if name in prompts), "")
        return prompts.get(self._spec.default_prompt or "", "")

    def encode(
        self, texts: Sequence[TextInput], prompt: str, truncate: Truncate, max_tokens: int | None = None
    ) -> list[Encoding | NpuProxyError]:
        """Encode texts (str or token ids) in one batch; what is wrong with a text stands in its place.

        max_tokens: of a text, special tokens included, where that is less than the model's limit.
        """
        limit = min(max_tokens or self._spec.max_length, self._spec.max_length)
        prepared = [self._prepare(text, prompt) for text in texts]
        strings = [text for text in prepared if isinstance(text, str)]
        encoded = iter(self._encode_strings(strings, truncate, limit))
        results: list[Encoding | NpuProxyError] = []
        for text in prepared:
            if isinstance(text, NpuProxyError):
                results.append(text)
                continue
            ids = next(encoded) if isinstance(text, str) else text
            results.append(ids if isinstance(ids, NpuProxyError) else self._fit(ids, truncate, limit))
        return results

    def _prepare(self, text: TextInput, prompt: str) -> str | list[int] | NpuProxyError:
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

    def _encode_strings(self, texts: list[str], truncate: Truncate, limit: int) -> list[list[int] | NpuProxyError]:
        """Ids with special tokens of each text; of a long one only of as much as tells which tokens are kept.

        Cutting a text changes its last word at most (its first, where the start is cut off), and a word has at most
        ``_WORD_TOKENS`` tokens. With so many more than are kept, those that are kept are what the whole text has.
        """
        least = _COUNTED if truncate is Truncate.ERROR else 0  # there the error says how long the text is
        sizes = [max(least, _CHARACTERS_A_TOKEN * (limit + _WORD_TOKENS))] * len(texts)
        parts = [self._part(text, size, truncate) for text, size in zip(texts, sizes, strict=True)]
        results: list[list[int] | NpuProxyError] = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(parts)]
        for index, text in enumerate(texts):
            part, size, ids = parts[index], sizes[index], results[index]
            while len(part) < len(text) and isinstance(ids, list) and len(ids) <= limit + _WORD_TOKENS:
                size *= 8
                part = self._part(text, size, truncate)
                ids = _wasteful() if len(part) > _LONGEST else self._tokenizer.encode(part).ids
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

    def _fit(self, ids: list[int], truncate: Truncate, limit: int) -> Encoding | NpuProxyError:
        if len(ids) <= limit:
            return Encoding(np.array(ids, np.int32), truncated=False)
        if truncate is Truncate.ERROR:
            return TooLongError(limit=limit, tokens=len(ids))
        before, after = self._frame
        inner = ids[len(before) : len(ids) - len(after)]
        keep = limit - len(before) - len(after)
        if keep < 1:
            return NothingLeftError(f"a limit of {limit} tokens leaves nothing of a text", param="max_tokens")
        inner = inner[:keep] if truncate is Truncate.END else inner[len(inner) - keep :]
        return Encoding(np.array([*before, *inner, *after], np.int32), truncated=True)


def _frame(tokenizer: Tokenizer, spec: ModelSpec) -> tuple[list[int], list[int]]:
    """The special tokens that stand before and behind every text, seen by encoding a text with and without them."""
    sample = next((text for text in ("a", "the", "1", ".") if tokenizer.encode(text, add_special_tokens=False).ids), None)
    if sample is None:
        raise ModelError(f"{spec.name}: tokenizer.json turns every text into nothing")
    plain = tokenizer.encode(sample, add_special_tokens=False).ids
    whole = tokenizer.encode(sample).ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise ModelError(f"{spec.name}: tokenizer.json does not put special tokens around a text, but inside it")


def _wasteful() -> InputError:
    words = f"the text is longer than {_LONGEST} characters, and still they say too little; shorten it"
    return InputError(words, param="input")


def _sanitize(text: str, how: Sanitize) -> str:
    """Remove NUL and lone surrogates ("basic"), and normalize to NFKC besides ("nfkc")."""
    text = "".join(character for character in text if character != "\0" and not "\ud800" <= character <= "\udfff")
    return unicodedata.normalize("NFKC", text) if how == "nfkc" else text
