"""Texts before they are tokenized: cleaned, checked, bounded, with their prompt, and joined if a template makes one of a pair."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer

from npu_proxy.engine.encode_options import EncodeOptions
from npu_proxy.engine.special_tokens import SpecialTokens, UnusableTokens
from npu_proxy.engine.validation import PLACEHOLDER, OnEmpty, empty_text_error, text_error, token_ids_error
from npu_proxy.errors import NpuProxyError, UnsupportedError
from npu_proxy.spec import ModelSpec
from npu_proxy.types import OutputType, Pair, TextInput, Truncate

Sanitize = Literal["none", "basic", "nfkc"]

_MAX_CHARACTERS = 4_000_000
"""Maximum characters per text that are tokenized, after normalizing; a tokenizer needs some hundred bytes per character."""
_SAMPLED = 16
"""Number of characters that are looked at first to see whether a text has letters."""
_PART = 4096
"""Number of characters that are tokenized at once to see whether a text has tokens."""


@dataclass(frozen=True, slots=True)
class PreparedPair:
    """A pair whose second text is prepared; the first one is prepared once for all pairs that have it."""

    first: str
    second: Prepared


Prepared = str | list[int] | PreparedPair | NpuProxyError
"""A text that is ready for the tokenizer, token ids with special tokens, a pair, or what is wrong with it."""


class TextPreparer:
    """Prepares texts for a model's tokenizer. most: characters of a text that are tokenized."""

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: Tokenizer,
        special: SpecialTokens,
        unusable: UnusableTokens,
        *,
        sanitize: Sanitize,
        on_empty: OnEmpty,
        growth: float,
    ) -> None:
        """growth: how many characters the tokenizer may make of one."""
        self._spec = spec
        self._tokenizer = tokenizer
        self._special = special
        self._unusable = unusable
        self._sanitize: Sanitize = sanitize
        self._on_empty: OnEmpty = on_empty
        self.most: int = int(_MAX_CHARACTERS / growth)

    def _bounded(self, text: str, truncate: Truncate) -> str:
        """The part of an endless text that shows that it is too long, and that can be tokenized if its words are split."""
        if self._spec.most_characters is not None and truncate is not Truncate.ERROR:
            text = text[: self._spec.most_characters]
        most = self.most + 1
        return text if len(text) <= most else text[-most:] if truncate is Truncate.START else text[:most]

    def prepare(self, text: TextInput, options: EncodeOptions, *, side: bool = False) -> Prepared:
        """A text, token ids or a pair, ready for the tokenizer. side: whether it is the first text of a pair."""
        if isinstance(text, Pair) or self._spec.pair_template is not None:
            return self._prepare_pair(text, options)
        if not isinstance(text, str):
            return token_ids_error(text, self._spec.vocabulary) or self._unusable.find(text) or self._special.add(text)
        prepared = self._prepare_text(text, options, side=side)
        return options.prompt + prepared if isinstance(prepared, str) else prepared

    def _prepare_text(self, text: str, options: EncodeOptions, *, side: bool = False) -> str | NpuProxyError:
        """side: whether it is one text of a pair, which may be empty if the other is not."""
        truncate, on_empty = options.truncate, options.on_empty or self._on_empty
        text = sanitized(text, self._sanitize)
        if (error := text_error(text)) is not None:
            return error
        text = self._bounded(text, truncate)
        if on_empty != "embed" and not (side and on_empty == "error") and self._is_empty(text):
            if on_empty == "error":
                return empty_text_error(text)
            text = PLACEHOLDER
        return text

    def _prepare_pair(self, text: TextInput, options: EncodeOptions) -> Prepared:
        template = self._spec.pair_template
        if not isinstance(text, Pair):
            return UnsupportedError(f"{self._spec.name} takes pairs of texts, a query and a document", param="input")
        if (options.on_empty or self._on_empty) == "error" and all(map(self._is_empty, text)):
            return empty_text_error(text.second)
        if template is not None:
            first, second = (self._prepare_text(side, options, side=True) for side in text)
            if not isinstance(first, str) or not isinstance(second, str):
                return first if not isinstance(first, str) else second
            return self._bounded(template.join(first, second), options.truncate)
        if self._spec.output_type is not OutputType.SCORES:
            return UnsupportedError(f"{self._spec.name} takes single texts, not pairs", param="input")
        return PreparedPair(text.first, self._prepare_text(text.second, options, side=True))

    def _is_empty(self, text: str) -> bool:
        """Whether a text has no tokens but special ones. A letter or digit always gives one, so few texts are tokenized twice."""
        if not may_be_empty(text):
            return False
        text = sanitized(text, self._sanitize)
        if text_error(text) is not None:
            return False  # which is its error
        visible = text.strip()[: self.most] or text[:_SAMPLED]
        parts = (visible[start : start + _PART] for start in range(0, len(visible), _PART))
        return not any(self._tokenizer.encode(part, add_special_tokens=False).ids for part in parts)


def may_be_empty(text: TextInput) -> bool:
    """Whether a text may have no tokens but special ones: it does not begin with a letter or digit, or close to one."""
    return isinstance(text, str) and not any(map(str.isalnum, text[:_SAMPLED]))


def sanitized(text: str, how: Sanitize) -> str:
    """Remove NUL and lone surrogates ("basic"), and also normalize to NFKC ("nfkc")."""
    if how == "none":
        return text
    text = "".join(character for character in text if character != "\0" and not "\ud800" <= character <= "\udfff")
    return unicodedata.normalize("NFKC", text) if how == "nfkc" else text
