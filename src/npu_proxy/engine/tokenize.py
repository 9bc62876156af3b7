"""Convert texts to token ids, with exact counts, before they are queued.

The limit is the model's; truncation and padding defined in tokenizer.json are disabled. Longer than most files here: texts,
pairs and token ids, whole, cut and in chunks, must agree to the token, so they are read together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding as Tokens

from npu_proxy.batch import Encoding
from npu_proxy.engine.chunking import ChunkedText, TokenizedText, complete_chunking, sentence_starts, split_text, word_starts
from npu_proxy.engine.encode_options import EncodeOptions, find_prompt
from npu_proxy.engine.preparer import Prepared, PreparedPair, Sanitize, TextPreparer, may_be_empty
from npu_proxy.engine.special_tokens import (
    SpecialTokens,
    UnusableTokens,
    find_pair_special_tokens,
    find_special_tokens,
    longest_first,
    template_end,
    unknown_token_ids,
)
from npu_proxy.engine.validation import OnEmpty, text_error
from npu_proxy.errors import (
    EmptyInputError,
    InputError,
    ModelError,
    NothingLeftError,
    NpuProxyError,
    TooLongError,
    UnsupportedError,
)
from npu_proxy.models.json_files import MOST_TOKENS
from npu_proxy.models.tokenizer_file import LONGEST_WORD, open_tokenizer
from npu_proxy.spec import ModelSpec
from npu_proxy.types import DEFAULT_CHUNKING, EmbedRequest, OutputType, Pair, Pooling, TextInput, Truncate

_CHARACTERS_PER_TOKEN = 16
"""Characters of a long text that are tokenized at first per token that may be kept; more if that is not enough."""
_WORD_TOKENS = LONGEST_WORD
"""A word with more characters than this is one unknown token."""
_COUNTED_CHARACTERS = 200_000
"""Texts up to this many characters are tokenized completely if an error must state their length."""
_MAX_CHUNKED = 1_000_000
"""Maximum characters of a text that is chunked; each of its tokens becomes several Python objects."""
_DECODED_AT_ONCE = 1000
"""Token ids that are decoded without looking at how long their tokens are."""
_COMPARED_IDS = 256
"""Number of token ids that are compared to tell whether they belong to this model."""


class TextToken(NamedTuple):
    """A token, and the range of characters that it covers in the text."""

    id: int
    text: str
    special: bool
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _FirstText:
    """The first text of pairs, such as a query, tokenized once for all of them.

    ids: without special tokens, only those that may be kept. count: number of all ids.
    """

    ids: Sequence[int]
    count: int


class RequestTokenizer:
    """Turns the texts of requests into encodings, with a model's tokenizer and prompts. Thread-safe."""

    def __init__(self, spec: ModelSpec, *, sanitize: Sanitize = "none", on_empty: OnEmpty = "error") -> None:
        self._spec = spec
        self._tokenizer, growth = open_tokenizer(spec.tokenizer)
        self._unusable = UnusableTokens(self._tokenizer, spec)
        self._named_ids = {self._tokenizer.token_to_id(token) for token in spec.tokenizer.tokens.values()}
        self._special = find_special_tokens(self._tokenizer, spec) if spec.special_tokens else SpecialTokens([], [])
        if spec.max_length <= len(self._special):
            raise ModelError(f"{spec.name}: a limit of {spec.max_length} tokens leaves no room for text (`max_length`)")
        separated = spec.output_type is OutputType.SCORES and spec.pair_template is None
        self._pair = find_pair_special_tokens(self._tokenizer, spec) if separated else None
        preparer = TextPreparer(
            spec, self._tokenizer, self._special, self._unusable, sanitize=sanitize, on_empty=on_empty, growth=growth
        )
        self._prepare = preparer.prepare
        self._max_characters = preparer.most
        self._end = template_end(self._tokenizer, spec.pair_template) if spec.pair_template else []
        self.vocabulary: int = spec.vocabulary
        """Number of token ids."""
        self.special_tokens: int = len(self._special)
        """Number of special tokens added to every text."""
        self.special_ids: frozenset[int] = frozenset(
            [*self._special.before, *self._special.after, *unknown_token_ids(self._tokenizer)]
        )
        """Ids of the special tokens and the unknown token, which do not represent a word."""
        # Decoders are scored at the last token that is not padding; padding that their tokenizer puts at the end is removed.
        scored_at_end = spec.output_type is OutputType.SCORES and spec.pooling is Pooling.LAST_TOKEN
        self._padding_id = spec.padding_id if scored_at_end else None
        self._first: tuple[tuple[str, EncodeOptions], _FirstText | NpuProxyError] | None = None
        # BertPreTokenizer splits texts into words that are tokenized independently, so a cut changes only one word.
        self._splits_words = type(self._tokenizer.pre_tokenizer).__name__ == "BertPreTokenizer"

    def _tokens(self, text: str, *, special: bool) -> Tokens:
        """The tokens of a text of any length. A batch, even of one text, is tokenized without holding Python's lock."""
        return self._tokenizer.encode_batch([text], add_special_tokens=special)[0]

    # -- options -------------------------------------------------------------------------------------------------

    def options(self, request: EmbedRequest) -> EncodeOptions:
        """How to tokenize a request. Raises InputError if the model does not support its prompt, instruction or chunking."""
        spec, prompt, document = self._spec, find_prompt(self._spec, request), None
        limit = min(request.max_tokens or spec.max_length, spec.max_length)
        if spec.late_interaction is not None:
            document = request.input_type != "query"
            config = spec.late_interaction
            limit = min(limit, config.document_length if document else config.query_length)
        if spec.query_weights is not None:
            document = not spec.query_weights.is_query(request.input_type)
            if not document:
                limit = min(request.max_tokens or MOST_TOKENS, spec.query_weights.limit) + len(self._special)
        document_limit = request.max_document_tokens
        if document_limit is not None and spec.output_type is not OutputType.SCORES:
            limit, document_limit = min(limit, document_limit + self.special_tokens), None
        query = spec.query_weights is not None and document is False
        if request.truncate is Truncate.CHUNK and (query or spec.pair_template is not None):
            request = replace(request, truncate=Truncate.END, chunking=DEFAULT_CHUNKING)  # one text, or without chunks: it is cut
        if spec.pair_template is not None:
            _check_template_options(spec, request)
        chunking = request.chunking
        if request.truncate is Truncate.CHUNK:
            chunking = complete_chunking(chunking, spec, limit, self.special_tokens)
            limit = limit if chunking.late else min(limit, chunking.size or limit)
        cut = Truncate.START if request.truncate is Truncate.END and spec.tokenizer.cuts_start else request.truncate
        return EncodeOptions(
            prompt=prompt,
            unpooled_prompt=0 if spec.include_prompt or not prompt else self._count_prompt(prompt),
            document=document,
            truncate=cut,
            limit=limit,
            document_limit=document_limit,
            on_empty=request.on_empty if request.on_empty is not None and any(map(may_be_empty, request.texts)) else None,
            chunking=chunking,
        )

    def _count_prompt(self, prompt: str) -> int:
        """Number of leading tokens in a prompt, including special tokens before it, as counted by sentence-transformers."""
        ids = self._tokenizer.encode(prompt, add_special_tokens=self._spec.special_tokens).ids
        return len(ids) - (bool(ids) and ids[-1] in self._named_ids)

    # -- texts to encodings --------------------------------------------------------------------------------------

    def encode(self, texts: Sequence[TextInput], options: EncodeOptions) -> list[Encoding | ChunkedText | NpuProxyError]:
        """Encode texts (str, token ids or pairs) in one call; a text that cannot be encoded is replaced by its error."""
        try:
            return self._encode(texts, options)
        except BaseException as error:  # a Rust panic is not an Exception
            if type(error) is not Exception and type(error).__name__ != "PanicException":
                raise
            if len(texts) > 1:
                return [result for text in texts for result in self.encode([text], options)]
            message = f"the model's tokenizer cannot process this text ({str(error)[:100]}); shorten or change it"
            return [InputError(message, param="input")]

    def _encode(self, texts: Sequence[TextInput], options: EncodeOptions) -> list[Encoding | ChunkedText | NpuProxyError]:
        if options.document_limit is not None and self._spec.pair_template is not None:
            return self._encode_short(texts, options, options.document_limit)
        prepared = [self._prepare(text, options) for text in texts]
        if options.truncate is Truncate.CHUNK:
            return [text if isinstance(text, NpuProxyError) else self._chunk(text, options) for text in prepared]
        sides = (text.second if isinstance(text, PreparedPair) else text for text in prepared)
        strings = [side for side in sides if isinstance(side, str)]
        encoded = iter(self._encode_strings(strings, options.truncate, options.limit))
        return [self._fit_prepared(text, encoded, options) for text in prepared]

    def plain(self, texts: Sequence[TextInput]) -> list[Encoding]:
        """Encode texts without a prompt, cut to the model's limit; texts that cannot be encoded are left out."""
        document = True if self._spec.has_sides else None
        if self._spec.pair_template is not None:
            texts = [Pair("the", text) if isinstance(text, str) else text for text in texts]
        encodings = self.encode(texts, EncodeOptions(limit=self._spec.max_length, document=document))
        return [encoding for encoding in encodings if isinstance(encoding, Encoding)]

    def _fit_prepared(
        self, text: Prepared, encoded: Iterator[list[int] | NpuProxyError], options: EncodeOptions
    ) -> Encoding | NpuProxyError:
        if isinstance(text, NpuProxyError):
            return text
        if isinstance(text, PreparedPair):
            first, second = self._first_text(text.first, options), text.second
            second = next(encoded) if isinstance(second, str) else second
            if isinstance(first, NpuProxyError):
                return first
            if not isinstance(second, list):
                return second if isinstance(second, NpuProxyError) else InputError("expected text", param="input")
            return self._fit_pair(first, self._special.strip(second), options)
        ids = next(encoded) if isinstance(text, str) else text
        return ids if isinstance(ids, NpuProxyError) else self._fit(ids, options)

    def _encode_short(
        self, texts: Sequence[TextInput], options: EncodeOptions, most: int
    ) -> list[Encoding | ChunkedText | NpuProxyError]:
        """Encode pairs that a template joins, after their documents have been cut."""
        most = min(most, options.limit)
        short = [self._short_document(text, most) for text in texts]
        encoded = self._encode(short, replace(options, document_limit=None))
        for index, (whole, cut) in enumerate(zip(texts, short, strict=True)):
            encoding = encoded[index]
            if cut is whole or not isinstance(encoding, Encoding) or not isinstance(whole, Pair):
                continue
            if options.truncate is Truncate.ERROR:
                encoded[index] = TooLongError(limit=most, tokens=most, more=True)
            else:
                encoded[index] = replace(encoding, truncated=True)
        return encoded

    def _short_document(self, text: TextInput, most: int) -> TextInput:
        """Cut the document of a pair that a template joins after so many tokens of its own."""
        if not isinstance(text, Pair) or len(text.second) <= most or text_error(text.second) is not None:
            return text
        offsets = self._tokens(text.second[: _CHARACTERS_PER_TOKEN * (most + _WORD_TOKENS)], special=False).offsets
        return Pair(text.first, text.second[: offsets[most - 1][1]]) if len(offsets) > most else text

    def _encode_strings(self, texts: list[str], truncate: Truncate, limit: int) -> list[list[int] | NpuProxyError]:
        """Token ids of each text with special tokens. Of a long text, only the part that decides which tokens are kept is encoded.

        Cutting a text changes at most its last word (its first, if the start is cut off), and a word has at most
        ``_WORD_TOKENS`` tokens. If that many more tokens than needed are encoded, the kept ones equal those of the whole text.
        """
        min_size = _COUNTED_CHARACTERS if truncate is Truncate.ERROR else 0  # the error states the text's length
        sizes = [max(min_size, _CHARACTERS_PER_TOKEN * (limit + _WORD_TOKENS))] * len(texts)
        parts = [self._part(text, size, truncate) for text, size in zip(texts, sizes, strict=True)]
        encodings = self._tokenizer.encode_batch_fast(parts, add_special_tokens=self._spec.special_tokens)
        results: list[list[int] | NpuProxyError] = [encoding.ids for encoding in encodings]
        for index, text in enumerate(texts):
            part, size, ids = parts[index], sizes[index], results[index]
            while len(part) < len(text) and isinstance(ids, list) and len(ids) <= limit + _WORD_TOKENS:
                size *= 8
                part = self._part(text, size, truncate)
                if len(part) > self._max_characters:
                    ids = self._too_many_characters()
                else:
                    ids = self._tokens(part, special=self._spec.special_tokens).ids
            if len(part) > self._max_characters:  # the tokenizer does not split at words
                ids = self._too_many_characters()
            elif isinstance(ids, list) and (error := self._unusable.find(ids)) is not None:
                ids = error
            elif truncate is Truncate.ERROR and len(part) < len(text) and isinstance(ids, list):
                ids = TooLongError(limit=limit, tokens=len(ids), more=True)
            results[index] = ids
        return results

    def _part(self, text: str, size: int, truncate: Truncate) -> str:
        """The start of a long text (its end if the start is cut off); the whole text if encoding a part would not be exact."""
        if not self._splits_words or len(text) <= size:
            return text if len(text) <= self._max_characters or self._splits_words else text[: self._max_characters + 1]
        return text[-size:] if truncate is Truncate.START else text[:size]

    def _fit(self, ids: list[int], options: EncodeOptions) -> Encoding | NpuProxyError:
        """Make an encoding that does not exceed the limit, or an error."""
        if self._spec.query_weights is not None and options.document is False:
            return self._fit_query(self._special.strip(ids), options)
        return self._fit_text(ids, options)

    def _fit_text(self, ids: list[int], options: EncodeOptions) -> Encoding | NpuProxyError:
        limit = options.limit
        if not ids:  # the tokenizer has no special tokens, and the text is only spaces
            return EmptyInputError("the model's tokenizer produces no tokens for the text", param="input")
        if len(ids) <= limit:
            return self._known(ids) or self._encoding(ids, options, truncated=False)
        if options.truncate is Truncate.ERROR:
            return TooLongError(limit=limit, tokens=len(ids))
        inner, keep = self._special.strip(ids), limit - len(self._special)
        if keep < 1:
            return NothingLeftError(f"a limit of {limit} tokens leaves no room for text", param="max_tokens")
        inner = inner[:keep] if options.truncate is Truncate.END else inner[len(inner) - keep :]
        if self._end and keep > len(self._end):
            inner = [*inner[: keep - len(self._end)], *self._end]
        if (error := self._known(inner)) is not None:
            return error
        return self._encoding(self._special.add(inner), options, truncated=True)

    def _fit_query(self, ids: list[int], options: EncodeOptions) -> Encoding | NpuProxyError:
        """Make an encoding of a query that is not computed: only its different tokens count. ids: without special tokens."""
        most = options.limit - len(self._special)
        truncated = len(ids) > most
        if truncated and options.truncate is Truncate.ERROR:
            return TooLongError(limit=most, tokens=len(ids))
        ids = ids[len(ids) - most :] if truncated and options.truncate is Truncate.START else ids[:most]
        if len(ids) > self._spec.max_length:
            ids = list(dict.fromkeys(ids))
        if not ids:
            return EmptyInputError("the query has no tokens", param="input")
        if len(ids) > self._spec.max_length:
            return InputError(f"a query may have up to {self._spec.max_length} different tokens, not {len(ids)}", param="input")
        return self._encoding(ids, options, truncated=truncated)

    def _known(self, ids: list[int]) -> EmptyInputError | None:
        """An error if every token would be left out, as model2vec leaves out the unknown token."""
        if self._spec.dropped_ids and self._spec.dropped_ids.issuperset(ids):
            return EmptyInputError("the model knows none of the words of the text", param="input")
        return None

    def _first_text(self, text: str, options: EncodeOptions) -> _FirstText | NpuProxyError:
        """The first text of a pair, with the prompt; that of the previous pair is usually the same, and is not tokenized again."""
        key, known = (text, options), self._first
        if known is not None and known[0] == key:
            return known[1]
        prepared = self._prepare(text, options, side=True)
        if isinstance(prepared, str):
            (prepared,) = self._encode_strings([prepared], options.truncate, options.limit)
        first: _FirstText | NpuProxyError
        if isinstance(prepared, list):
            ids, limit = self._special.strip(prepared), options.limit
            first = _FirstText(ids[-limit:] if options.truncate is Truncate.START else ids[:limit], len(ids))
        else:
            first = prepared if isinstance(prepared, NpuProxyError) else InputError("expected text", param="input")
        self._first = (key, first)
        return first

    def _fit_pair(self, given: _FirstText, second: list[int], options: EncodeOptions) -> Encoding | NpuProxyError:
        """Encode two texts together, cut to the limit like the `longest_first` truncation of tokenizers."""
        assert self._pair is not None
        room, most = options.limit - len(self._pair), options.document_limit
        long_document = False
        if most is not None and len(second) > most:
            long_document = True
            if options.truncate is Truncate.ERROR:
                return TooLongError(limit=most, tokens=len(second))
            second = second[-most:] if options.truncate is Truncate.START else second[:most]
        first, tokens = list(given.ids), given.count + len(second)
        truncated = long_document or tokens > room
        if tokens > room:
            if options.truncate is Truncate.ERROR:
                return TooLongError(limit=options.limit, tokens=tokens + len(self._pair))
            if room < 2:
                return NothingLeftError(f"a limit of {options.limit} tokens leaves no room for a pair of texts", param="max_tokens")
            counts = longest_first(given.count, len(second), room)
            if options.truncate is Truncate.START:
                first, second = first[len(first) - counts[0] :], second[len(second) - counts[1] :]
            else:
                first, second = first[: counts[0]], second[: counts[1]]
        return self._without_padding(self._pair.join(first, second, truncated=truncated, typed=self._spec.type_ids))

    def _encoding(self, ids: list[int], options: EncodeOptions, *, truncated: bool) -> Encoding:
        """Make an encoding of ids, with a query's expansion and the number of prompt tokens that are not pooled."""
        config, attended, dropped = self._spec.late_interaction, -1, self._spec.dropped_ids
        if dropped:
            ids = [number for number in ids if number not in dropped]
        if config is not None and not options.document and len(ids) < config.expanded_length:
            attended = -1 if config.attend_to_expansion else len(ids)
            ids = [*ids, *[config.mask_id] * (config.expanded_length - len(ids))]
        prompt_tokens = min(options.unpooled_prompt, len(ids) - 1)
        document = bool(options.document)
        encoding = Encoding(np.array(ids, np.int32), truncated, prompt_tokens=prompt_tokens, attended=attended, document=document)
        return self._without_padding(encoding)

    def _without_padding(self, encoding: Encoding) -> Encoding:
        """Remove the padding at the end, for decoders that score."""
        ids = encoding.ids
        if self._padding_id is None or ids[-1] != self._padding_id or (ids == self._padding_id).all():
            return encoding
        last = int(np.nonzero(ids != self._padding_id)[0][-1]) + 1
        return replace(encoding, ids=ids[:last], type_ids=None if encoding.type_ids is None else encoding.type_ids[:last])

    def _chunk(self, text: str | list[int] | PreparedPair, options: EncodeOptions) -> ChunkedText | NpuProxyError:
        """Split a text into chunks; each chunk of a pair begins with the pair's first text."""
        if isinstance(text, PreparedPair):
            return self._chunk_pair(text, options)
        tokenized = self._tokenize(text, options, prompted=isinstance(text, str))
        if isinstance(tokenized, NpuProxyError):
            return tokenized
        special = self._special
        return split_text(
            tokenized,
            options,
            options.limit - len(special),
            (len(special.before), len(special.after)),
            lambda ids: self._encoding(special.add(ids), options, truncated=False),
        )

    def _chunk_pair(self, text: PreparedPair, options: EncodeOptions) -> ChunkedText | NpuProxyError:
        assert self._pair is not None
        pair, typed = self._pair, self._spec.type_ids
        given = self._first_text(text.first, replace(options, truncate=Truncate.END))
        if isinstance(given, NpuProxyError):
            return given
        if not isinstance(text.second, str):
            return text.second if isinstance(text.second, NpuProxyError) else InputError("expected text", param="input")
        tokenized = self._tokenize(text.second, options, prompted=False)
        if isinstance(tokenized, NpuProxyError):
            return tokenized
        room = options.limit - len(pair)
        truncated = given.count > room // 2
        first = list(given.ids[: room // 2])
        return split_text(
            tokenized,
            options,
            room - len(first),
            (0, 0),
            lambda ids: self._without_padding(pair.join(first, ids, truncated=truncated, typed=typed)),
        )

    def _tokenize(self, text: str | list[int], options: EncodeOptions, *, prompted: bool) -> TokenizedText | NpuProxyError:
        """Tokenize a text for chunking. prompted: whether it begins with the prompt."""
        if not isinstance(text, str):
            ids = self._special.strip(text)
            return TokenizedText(ids=ids, offsets=[(0, 0)] * len(ids))  # token ids have no characters
        most = min(self._max_characters, _MAX_CHUNKED)
        if len(text) > most:
            return InputError(f"a text to be chunked may have up to {most:,} characters; split it", param="input")
        encoding = self._tokens(text, special=False)
        if (error := self._unusable.find(encoding.ids)) is not None:
            return error
        lead_characters = len(options.prompt) if prompted else 0
        return TokenizedText(
            ids=encoding.ids,
            offsets=encoding.offsets,
            words=word_starts(encoding.word_ids),
            sentences=sentence_starts(text, encoding.offsets) if options.chunking.sentences else frozenset(),
            lead=sum(1 for start, _ in encoding.offsets if start < lead_characters),
            lead_characters=lead_characters,
        )

    def _too_many_characters(self) -> InputError:
        message = f"the text exceeds the limit of {self._max_characters:,} characters; shorten or split it"
        return InputError(message, param="input")

    # -- for token endpoints -------------------------------------------------------------------------------------

    def tokens(self, texts: Sequence[str], prompt: str, *, special: bool) -> list[list[TextToken]]:
        """The tokens of whole texts, without truncation. Raises InputError if a text cannot be encoded."""
        if self._spec.pair_template is None:
            options = EncodeOptions(prompt=prompt, limit=self._spec.max_length, on_empty="embed")
            prepared = [self._prepare(text, options) for text in texts]
        else:
            prepared = [text_error(text) or text for text in texts]
        special = special and self._spec.special_tokens
        results: list[list[TextToken]] = []
        for text in prepared:
            if not isinstance(text, str):
                raise text if isinstance(text, NpuProxyError) else InputError("expected text", param="inputs")
            encoding = self._tokens(text, special=special)
            parts = zip(encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets, strict=True)
            results.append([TextToken(number, piece, bool(mask), *span) for number, piece, mask, span in parts])
        return results

    def owns(self, ids: Sequence[int]) -> bool:
        """Whether token ids look like this model's own: all in its vocabulary, and unchanged by decoding and encoding them.

        Ids of another tokenizer rarely pass this test; those of a single whole word may.
        """
        if not ids or not all(0 <= number < self._spec.vocabulary for number in ids):
            return not ids
        sample = list(ids[:_COMPARED_IDS])
        text = self._tokenizer.decode(sample, skip_special_tokens=False)
        return self._tokens(text, special=False).ids == sample

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """Decode token ids to text. Raises InputError if an id is outside the vocabulary."""
        if any(not 0 <= number < self._spec.vocabulary for number in ids):
            raise InputError(f"token ids must be at least 0 and below {self._spec.vocabulary}, the vocabulary size", param="ids")
        if len(ids) > _DECODED_AT_ONCE:
            characters = sum(len(self._tokenizer.id_to_token(number) or "") for number in ids)
            if characters > self._max_characters:
                raise self._too_many_characters()
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)


def _check_template_options(spec: ModelSpec, request: EmbedRequest) -> None:
    """Raise UnsupportedError for what a model with a chat template cannot do."""
    if request.truncate is Truncate.START:
        raise UnsupportedError(f"{spec.name} reads a query and a document as one text, whose start cannot be cut", param="truncate")
    given = next((name for name in ("prompt", "prompt_name", "instruction") if getattr(request, name) is not None), None)
    if given is not None:
        raise UnsupportedError(f"{spec.name} has its instruction in its chat template; `{given}` is not supported", param=given)
