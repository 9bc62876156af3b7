"""Tokenizing: exact counts, truncation at both ends, sanitizing, and the shortcut for very long texts."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from conftest import GOLDEN, golden
from npu_proxy.batch import Encoding
from npu_proxy.engine.chunking import ChunkedText, chunk_ranges
from npu_proxy.engine.encode_options import EncodeOptions
from npu_proxy.engine.preparer import Sanitize
from npu_proxy.engine.special_tokens import longest_first
from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.errors import EmptyInputError, InputError, NpuProxyError, TooLongError
from npu_proxy.models.layout import read_spec
from npu_proxy.types import Chunking, TextInput, Truncate

SPEC = read_spec(GOLDEN / "mean")
TOKENIZER = RequestTokenizer(SPEC)
LENIENT = RequestTokenizer(SPEC, on_empty="embed")
PLAIN = Tokenizer.from_file(str(GOLDEN / "mean" / "tokenizer.json"))
PLAIN.no_padding()
PLAIN.no_truncation()
PLAIN.add_special_tokens(sorted(set(SPEC.tokenizer.tokens.values())))  # as transformers does; a text may contain them


def encode(
    text: TextInput, truncate: Truncate = Truncate.END, tokenizer: RequestTokenizer = TOKENIZER, prompt: str = ""
) -> Encoding | ChunkedText | NpuProxyError:
    """What becomes of a single text."""
    (encoding,) = tokenizer.encode([text], EncodeOptions(prompt=prompt, truncate=truncate, limit=SPEC.max_length))
    return encoding


def encoded(
    text: TextInput, truncate: Truncate = Truncate.END, tokenizer: RequestTokenizer = TOKENIZER, prompt: str = ""
) -> Encoding:
    """The encoding of a single text that can be encoded."""
    encoding = encode(text, truncate, tokenizer, prompt)
    assert isinstance(encoding, Encoding)
    return encoding


def test_a_text_is_bounded_only_after_it_was_sanitized() -> None:
    tokenizer = RequestTokenizer(SPEC, sanitize="basic")
    for truncate, text in (
        (Truncate.ERROR, "\0" * 3_999_990 + "hello world and more text"),
        (Truncate.START, "hello world and " + "\0" * 3_999_998 + "hi"),
    ):
        expected = encoded(text.replace("\0", ""))
        assert encoded(text, truncate, tokenizer).ids.tolist() == expected.ids.tolist()


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300), st.integers(1, 40))
def test_ids_are_the_tokenizers_own_cut_to_the_limit(text: str, times: int) -> None:
    text = (text + " ") * times  # long ones go through the shortcut
    whole = PLAIN.encode(text).ids
    inner = whole[1:-1]
    end, start = encoded(text, tokenizer=LENIENT), encoded(text, Truncate.START, LENIENT)
    keep = SPEC.max_length - 2
    assert end.ids.tolist() == [whole[0], *inner[:keep], whole[-1]]
    assert start.ids.tolist() == [whole[0], *inner[len(inner) - min(keep, len(inner)) :], whole[-1]]
    assert end.truncated == start.truncated == (len(whole) > SPEC.max_length)


def test_too_long_says_how_long() -> None:
    error = encode("cat " * 2000, Truncate.ERROR)
    assert isinstance(error, TooLongError)
    assert (error.limit, error.tokens) == (48, 2002)


def test_token_ids_get_the_special_tokens() -> None:
    ids = PLAIN.encode("the cat", add_special_tokens=False).ids
    np.testing.assert_array_equal(encoded(ids).ids, encoded("the cat").ids)
    assert isinstance(encode([SPEC.vocabulary]), InputError)
    assert isinstance(encode([-1]), InputError)


@pytest.mark.parametrize(("how", "text", "same"), [("basic", "c\0at\ud800", "cat"), ("nfkc", "ｃａｔ", "cat")])
def test_sanitizing(how: Sanitize, text: str, same: str) -> None:
    sanitizing = RequestTokenizer(SPEC, sanitize=how)
    np.testing.assert_array_equal(encoded(text, tokenizer=sanitizing).ids, encoded(same).ids)


@pytest.mark.parametrize("text", ["", " ", " " * 5000, "\n\t\r", "\u00a0\u3000", "\u200b\u2060", "\0", "\x07 \x1b"])
@pytest.mark.parametrize("prompt", ["", "query: "])
def test_a_text_is_empty_if_it_has_no_tokens_whatever_its_prompt(text: str, prompt: str) -> None:
    options = EncodeOptions(limit=SPEC.max_length, prompt=prompt)
    assert not PLAIN.encode(text, add_special_tokens=False).ids
    (error,) = RequestTokenizer(SPEC).encode([text], options)
    assert isinstance(error, EmptyInputError)
    assert "on_empty" in str(error)
    placeholder = RequestTokenizer(SPEC, on_empty="placeholder")
    for found, same in zip(placeholder.encode([text], options), placeholder.encode(["[EMPTY]"], options), strict=True):
        assert isinstance(found, Encoding)
        assert isinstance(same, Encoding)
        np.testing.assert_array_equal(found.ids, same.ids)
    (alone,) = RequestTokenizer(SPEC, on_empty="embed").encode([text], options)
    assert isinstance(alone, Encoding)
    assert alone.ids.tolist() == PLAIN.encode(prompt + text).ids


@pytest.mark.parametrize("text", ["-", "!", "\u2603", "\U0001f600", " . ", "\u4e2d", " " * 50 + "a", "\u0301"])
def test_a_text_with_a_token_is_not_empty(text: str) -> None:
    assert isinstance(encode(text), Encoding if PLAIN.encode(text, add_special_tokens=False).ids else EmptyInputError)


def test_prompts_come_first() -> None:
    np.testing.assert_array_equal(encoded("cat", prompt="one two ").ids, encoded("one two cat").ids)


WORDS = ["a", "sea", "the cat", "unbelievably", ",", "x" * 150, "é", "海", "\u200b", "ab\u0301c", "-", "don't"]


@given(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=12),
    st.sampled_from(["", " ", "\n", ","]),
    st.integers(1, 40),
    st.sampled_from([Truncate.END, Truncate.START]),
)
def test_a_long_text_is_cut_as_if_all_of_it_were_tokenized(words: list[str], between: str, times: int, truncate: Truncate) -> None:
    text = between.join(words * times * 30)
    found = encoded(text, truncate, LENIENT)
    whole = RequestTokenizer(SPEC, on_empty="embed")
    whole._splits_words = False
    expected = encoded(text, truncate, whole)
    np.testing.assert_array_equal(found.ids, expected.ids)
    assert found.truncated == expected.truncated


@pytest.mark.parametrize(
    "text",
    ["a," * 5_000_000, "海" * 5_000_000, "x" * 10_000_000, "a " * 5_000_000, "," * 9_000_000],
    ids=["comma", "cjk", "one", "space", "no letters"],
)
@pytest.mark.parametrize("truncate", [Truncate.ERROR, Truncate.END, Truncate.START])
def test_however_long_a_text_is_little_of_it_is_tokenized(text: str, truncate: Truncate) -> None:
    tokenizer = RequestTokenizer(read_spec(golden("mean")[0]))
    sizes: list[int] = []

    class Counting:
        def __init__(self, inner: Tokenizer) -> None:
            self.inner = inner

        def encode(self, part: str, **options: bool) -> object:
            sizes.append(len(part))
            return self.inner.encode(part, **options)

        def encode_batch(self, parts: list[str], **options: bool) -> object:
            sizes.extend(map(len, parts))
            return self.inner.encode_batch(parts, **options)

        def encode_batch_fast(self, parts: list[str], **options: bool) -> object:
            sizes.extend(map(len, parts))
            return self.inner.encode_batch_fast(parts, **options)

    tokenizer._tokenizer = Counting(tokenizer._tokenizer)  # type: ignore[assignment]  # it has what is called of it
    found = encode(text, truncate, tokenizer)
    assert sum(sizes) <= (210_000 if text[0] != "x" else 8_000_000)
    if text[0] == "x":  # one word: a single unknown token, or more than is worth looking at
        assert isinstance(found, Encoding | InputError)
    elif truncate is Truncate.ERROR:
        assert isinstance(found, TooLongError)
        assert "over" in str(found)
    else:
        assert isinstance(found, Encoding)
        assert found.truncated


@given(st.integers(1, 500), st.integers(2, 60), st.data())
def test_chunks_cover_a_text_and_overlap(tokens: int, room: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, room - 1))
    ends = data.draw(st.sets(st.integers(0, tokens)))
    parts = chunk_ranges(0, tokens, room, overlap, ends)
    assert parts[0][0] == 0
    assert parts[-1][1] == tokens
    assert all(0 < stop - start <= room for start, stop in parts)
    assert all(after[0] == before[1] - overlap for before, after in itertools.pairwise(parts))


PAIR_TOKENIZER = Tokenizer.from_file(str(GOLDEN / "bert_rerank" / "tokenizer.json"))
PAIR_TOKENIZER.no_padding()


@pytest.mark.slow
@given(st.integers(1, 300), st.integers(1, 300), st.integers(2, 200))
def test_a_pair_is_cut_as_the_tokenizer_cuts_it(first: int, second: int, room: int) -> None:
    PAIR_TOKENIZER.enable_truncation(room + 3)
    types = np.array(PAIR_TOKENIZER.encode("cat " * first, "dog " * second).type_ids)
    if first + second <= room:
        return
    assert longest_first(first, second, room) == (len(types) - types.sum() - 2, types.sum() - 1)


def test_chunks_of_a_text_say_where_they_are() -> None:
    text = "the cat sleeps. " * 40
    options = EncodeOptions(truncate=Truncate.CHUNK, limit=SPEC.max_length, chunking=Chunking(overlap=4, sentences=True))
    (found,) = TOKENIZER.encode([text], options)
    assert isinstance(found, ChunkedText)
    assert found.spans[0][0] == 0
    assert found.spans[-1][1] == len(text.rstrip())
    for encoding, (start, stop) in zip(found.encodings, found.spans, strict=True):
        np.testing.assert_array_equal(encoding.ids, encoded(text[start:stop]).ids)
        assert text[:stop].rstrip().endswith(".")
