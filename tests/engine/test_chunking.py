"""Chunks of long texts, as values: where they are cut, what belongs to each, and what their results become together."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import GOLDEN
from npu_proxy import EmptyInputError, InputError
from npu_proxy.batch import Encoding
from npu_proxy.devices.shapes import ROW_TOKENS, dynamic_shapes
from npu_proxy.engine.chunking import (
    ChunkedText,
    TokenizedText,
    chunk_ranges,
    combine_chunks,
    complete_chunking,
    late_chunks,
    requested_chunks,
    sentence_starts,
    split_result,
    split_text,
    word_starts,
)
from npu_proxy.engine.encode_options import EncodeOptions
from npu_proxy.errors import NothingLeftError
from npu_proxy.models.layout import read_spec
from npu_proxy.types import Chunking, EmbedRequest, OutputType, Pooling, TextChunk, TextResult, Truncate

SPEC = read_spec(GOLDEN / "mean")
BEFORE, AFTER = [-1], [-2, -3]
"""Stand for special tokens; two of them at the end, so that nothing can mix up the sides."""
marks_of = st.sets(st.integers(0, 200))


def wrap(ids: list[int]) -> Encoding:
    return Encoding(np.array([*BEFORE, *ids, *AFTER], np.int32), truncated=False)


def tokenized(tokens: int, *, words: set[int] | None = None, sentences: set[int] | None = None, lead: int = 0) -> TokenizedText:
    """A text of tokens 0, 1, 2, ... of ten characters each, the first ``lead`` of which are the prompt's."""
    return TokenizedText(
        ids=range(tokens),
        offsets=[(10 * number, 10 * number + 9) for number in range(tokens)],
        words=frozenset(words or ()),
        sentences=frozenset(sentences or ()),
        lead=lead,
        lead_characters=10 * lead,
    )


def options(chunking: Chunking) -> EncodeOptions:
    return EncodeOptions(truncate=Truncate.CHUNK, limit=SPEC.max_length, chunking=chunking)


def split(text: TokenizedText, room: int, chunking: Chunking) -> ChunkedText:
    found = split_text(text, options(chunking), room, (len(BEFORE), len(AFTER)), wrap)
    assert isinstance(found, ChunkedText)
    return found


# -- ranges --------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(2, 60), marks_of, marks_of, st.data())
def test_ranges_end_at_the_best_mark_and_go_on_at_a_word(
    tokens: int, room: int, sentences: set[int], words: set[int], data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(0, room - 1))
    ranges = chunk_ranges(0, tokens, room, overlap, sentences, words)
    assert (ranges[0][0], ranges[-1][1]) == (0, tokens)
    for (start, stop), (following, _) in itertools.pairwise(ranges):
        allowed = range(start + max(room // 2, overlap) + 1, start + room + 1)
        ends = [at for at in allowed if at in sentences] or [at for at in allowed if at in words] or [start + room]
        assert stop == ends[-1]
        begins = [at for at in range(stop - overlap, stop) if at in words] or [stop - overlap]
        assert following == begins[0]
        assert start < following <= stop
    start, stop = ranges[-1]
    assert 0 < stop - start <= room


def test_a_sentence_is_worth_more_than_a_word() -> None:
    assert chunk_ranges(0, 15, 10, 0, sentences={7}, words={7, 9}) == [(0, 7), (7, 15)]
    assert chunk_ranges(0, 15, 10, 0, sentences={5}, words={7, 9}) == [(0, 9), (9, 15)]  # too early to end there
    assert chunk_ranges(3, 15, 10, 0) == [(3, 13), (13, 15)]


@given(st.lists(st.none() | st.integers(0, 5), max_size=30))
def test_a_word_starts_where_the_number_changes(words: list[int | None]) -> None:
    starts = word_starts(words)
    for at, word in enumerate(words):
        assert (at in starts) == (at == 0 or word is None or word != words[at - 1])
    assert starts <= set(range(len(words)))


@pytest.mark.parametrize(
    ("text", "first_words"),
    [
        ("One two. Three! Four? Five", ["Three!", "Four?", "Five"]),
        ("a 3.14 b", []),  # no end without a space behind it
        ("one\n\ntwo", ["two"]),
    ],
)
def test_sentences_start_behind_their_marks(text: str, first_words: list[str]) -> None:
    words = text.split()
    begins = [text.index(word) for word in words]
    offsets = [(begin, begin + len(word)) for begin, word in zip(begins, words, strict=True)]
    starts = sentence_starts(text, offsets)
    assert [words[at] for at in sorted(starts) if at < len(words)] == first_words


def test_sentences_of_scripts_without_spaces_end_too() -> None:
    text = "海。月！星"
    offsets = [(at, at + 1) for at in range(len(text))]
    assert sentence_starts(text, offsets) == {2, 4}


# -- splitting -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 5), st.integers(1, 150), st.integers(6, 40), marks_of, marks_of, st.data())
def test_every_chunk_has_the_prompt_and_its_part_of_the_text(
    lead: int, tokens: int, room: int, words: set[int], sentences: set[int], data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(0, room - lead - 1))
    found = split(tokenized(lead + tokens, words=words, sentences=sentences, lead=lead), room, Chunking(overlap=overlap))
    seen: list[int] = []
    for encoding, (start, stop) in zip(found.encodings, found.spans, strict=True):
        ids = encoding.ids.tolist()
        assert ids[:1] + ids[-2:] == BEFORE + AFTER
        inner = ids[1:-2]
        assert len(inner) <= room
        assert inner[:lead] == list(range(lead))
        own = inner[lead:]
        assert own == list(range(own[0], own[-1] + 1))
        assert (start, stop) == (10 * (own[0] - lead), 10 * (own[-1] - lead) + 9)  # characters behind the prompt
        assert not seen or seen[-1] - overlap < own[0] <= seen[-1] + 1
        seen += own
    assert set(seen) == set(range(lead, lead + tokens))


def test_a_text_that_fits_is_one_chunk() -> None:
    found = split(tokenized(7), 7, Chunking(overlap=3))
    assert [encoding.ids.tolist() for encoding in found.encodings] == [[*BEFORE, *range(7), *AFTER]]
    assert found.spans == [(0, 69)]


@pytest.mark.parametrize(
    ("text", "room", "chunking", "error", "param"),
    [
        (tokenized(9, lead=4), 7, Chunking(overlap=3), NothingLeftError, "max_tokens"),
        (tokenized(4, lead=4), 20, Chunking(overlap=3), EmptyInputError, "input"),
        (tokenized(99, lead=29), 40, Chunking(overlap=0, size=32, late=True), NothingLeftError, "size"),
    ],
)
def test_a_text_of_which_nothing_is_left_is_an_error(
    text: TokenizedText, room: int, chunking: Chunking, error: type[InputError], param: str
) -> None:
    found = split_text(text, options(chunking), room, (len(BEFORE), len(AFTER)), wrap)
    assert isinstance(found, InputError)
    assert type(found) is error
    assert found.param == param


# -- late chunks ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 4), st.integers(1, 300), st.integers(40, 90), marks_of, marks_of)
def test_late_chunks_share_out_every_token(lead: int, tokens: int, room: int, words: set[int], sentences: set[int]) -> None:
    text = tokenized(lead + tokens, words=words, sentences=sentences, lead=lead)
    found = split(text, room, Chunking(overlap=0, size=32, late=True))
    covered: list[int] = []
    spans = iter(found.spans)
    for encoding in found.encodings:
        # Every token of a window, special ones too, is pooled into exactly one chunk.
        assert (encoding.spans[0][0], encoding.spans[-1][1]) == (0, encoding.tokens)
        assert all(before[1] == after[0] for before, after in itertools.pairwise(encoding.spans))
        for start, stop in encoding.spans:
            assert 0 < stop - start <= 32
            own = [number for number in encoding.ids[start:stop].tolist() if number >= lead]
            assert next(spans) == (10 * (own[0] - lead), 10 * (own[-1] - lead) + 9)
            covered += own
    assert next(spans, None) is None
    assert covered == list(range(lead, lead + tokens))


@given(st.sampled_from([32, 48, 64, 100, 128, 512, 1024, 2048, 8192]), st.data())
def test_all_late_chunks_of_a_text_fit_into_its_bin(limit: int, data: st.DataObject) -> None:
    chunking = complete_chunking(Chunking(late=True), replace(SPEC, max_length=limit), limit, 2)
    assert chunking.size is not None
    marks = frozenset(data.draw(st.sets(st.integers(0, limit), max_size=200)))
    window = Encoding(np.zeros(limit, np.int32), truncated=False)
    (encoding,), chunks = late_chunks([window], [(0, limit - 2)], 1, 1, chunking.size, marks, marks)
    assert len(chunks) == encoding.vectors
    shapes = [shape for shape in dynamic_shapes(limit, ROW_TOKENS, packed=True) if shape.positions >= limit]
    assert shapes
    assert all(encoding.vectors <= shape.segments for shape in shapes)


# -- options -------------------------------------------------------------------------------------------------------------


@given(st.integers(3, 600), st.none() | st.integers(3, 700), st.none() | st.integers(0, 50), st.booleans())
def test_defaults_leave_room_for_a_text(limit: int, size: int | None, overlap: int | None, sentences: bool) -> None:
    given_chunking = Chunking(size=size, overlap=overlap, sentences=sentences)
    room = min(limit, size or limit)
    if overlap is not None and overlap >= room - 2:
        with pytest.raises(InputError) as caught:
            complete_chunking(given_chunking, SPEC, limit, 2)
        assert caught.value.param == "overlap"
        return
    chunking = complete_chunking(given_chunking, SPEC, limit, 2)
    assert chunking.overlap is not None
    assert chunking.overlap == (min(32, room // 8) if overlap is None else overlap)
    assert chunking.overlap < room - 2
    assert (chunking.size, chunking.sentences) == (size, sentences)


@pytest.mark.parametrize(("limit", "size"), [(48, 256), (512, 256), (8192, 274)])
def test_late_chunks_have_a_size_and_no_overlap(limit: int, size: int) -> None:
    chunking = complete_chunking(Chunking(late=True), SPEC, limit, 2)
    assert (chunking.size, chunking.overlap) == (size, 0)
    assert complete_chunking(Chunking(late=True, size=300), SPEC, limit, 2).size == 300


@pytest.mark.parametrize(
    ("chunking", "changes", "param"),
    [
        (Chunking(size=0), {}, "size"),
        (Chunking(size=-4, late=True), {}, "size"),
        (Chunking(overlap=-1), {}, "overlap"),
        (Chunking(late=True, overlap=1), {}, "overlap"),
        (Chunking(late=True, size=31), {}, "size"),
        (Chunking(late=True), {"pooling": Pooling.CLS}, "late"),
        (Chunking(late=True), {"output_type": OutputType.SPARSE}, "late"),
        (Chunking(late=True), {"output_type": OutputType.TOKENS}, "late"),
    ],
)
def test_what_cannot_be_chunked_so_is_refused(chunking: Chunking, changes: dict[str, object], param: str) -> None:
    with pytest.raises(InputError) as caught:
        complete_chunking(chunking, replace(SPEC, **changes), 48, 2)
    assert caught.value.param == param


# -- combining -----------------------------------------------------------------------------------------------------------


def chunk(vector: object, tokens: int = 1, *, truncated: bool = False, device: str = "cpu") -> TextResult:
    return TextResult(np.array(vector, np.float32), tokens, truncated, device)


def combine(output_type: OutputType, *chunks: TextResult, pair: bool = False, labels: tuple[str, ...] = ()) -> TextResult:
    spans = [(5 * number, 5 * number + 4) for number in range(len(chunks))]
    return combine_chunks(replace(SPEC, output_type=output_type, labels=labels), chunks, spans, pair=pair)


def test_a_dense_vector_is_the_mean_of_directions_by_tokens() -> None:
    found = combine(OutputType.DENSE, chunk([300.0, 0.0], 3), chunk([0.0, 0.5], 1))
    np.testing.assert_allclose(found.vector, [0.75, 0.25], rtol=1e-6)  # lengths do not matter, tokens do
    assert (found.tokens, found.vector.dtype) == (4, np.float32)


def test_what_is_said_about_a_text_is_that_of_all_its_chunks() -> None:
    parts = [chunk([1.0], 2, device="npu"), chunk([2.0], 3, truncated=True), chunk([3.0], 4, device="npu")]
    found = combine(OutputType.DENSE, *parts)
    assert (found.tokens, found.truncated, found.device) == (9, True, "npu,cpu")
    assert [(part.start, part.stop, part.tokens) for part in found.chunks] == [(0, 4, 2), (5, 9, 3), (10, 14, 4)]
    assert [part.vector.tolist() for part in found.chunks] == [[1.0], [2.0], [3.0]]
    assert not combine(OutputType.DENSE, *parts[::2]).truncated


def test_sparse_weights_are_the_largest_of_all_chunks() -> None:
    found = combine(OutputType.SPARSE, chunk([[7, 0.5], [9, 2.0]]), chunk([[3, 1.0], [7, 0.75]]), chunk(np.zeros([0, 2])))
    assert found.vector.tolist() == [[3, 1.0], [7, 0.75], [9, 2.0]]


def test_token_vectors_follow_each_other() -> None:
    found = combine(OutputType.TOKENS, chunk([[1, 2], [3, 4]], 2), chunk([[5, 6]], 1))
    assert found.vector.tolist() == [[1, 2], [3, 4], [5, 6]]


def test_scores_are_those_of_the_best_chunk_or_the_mean_of_all() -> None:
    single = [chunk([1.0], 1), chunk([5.0], 3)]
    assert combine(OutputType.SCORES, *single, pair=True, labels=("a",)).vector.tolist() == [5.0]
    assert combine(OutputType.SCORES, *single, labels=("a",)).vector.tolist() == [4.0]
    double = [chunk([0.0, 3.0], 1), chunk([9.0, 10.0], 3)]  # of two labels it is the distance that ranks
    assert combine(OutputType.SCORES, *double, pair=True, labels=("a", "b")).vector.tolist() == [0.0, 3.0]
    triple = [chunk([1.0, 0.0, 3.0], 1), chunk([5.0, 4.0, 3.0], 3)]
    assert combine(OutputType.SCORES, *triple, pair=True, labels=("a", "b", "c")).vector.tolist() == [4.0, 3.0, 3.0]


def test_of_several_outputs_the_dense_one_is_averaged_and_the_tokens_stay() -> None:
    first = [[101, 0.1, 2.0, 0.0], [5, 0.5, 1.0, 1.0]]
    second = [[101, 0.1, 0.0, 4.0], [6, 0.6, 2.0, 2.0], [7, 0.7, 3.0, 3.0]]
    found = combine(OutputType.MULTI, chunk(first, 1), chunk(second, 3)).vector
    np.testing.assert_allclose(found[0], [101, 0.1, 0.25, 0.75], rtol=1e-6)
    np.testing.assert_allclose(found[1:], [*first[1:], *second[1:]], rtol=1e-6)


def test_spans_pooled_together_come_apart_again() -> None:
    encoding = replace(wrap([4, 5, 6]), spans=((0, 2), (2, 6)))
    pooled = chunk([[1, 2], [3, 4]], 6, device="npu")
    parts = split_result(pooled, encoding)
    assert [(part.vector.tolist(), part.tokens, part.device) for part in parts] == [([1, 2], 2, "npu"), ([3, 4], 4, "npu")]
    whole = chunk([1, 2], 6)
    assert list(split_result(whole, wrap([4, 5, 6]))) == [whole]


def test_chunks_are_as_narrow_and_as_long_as_requested() -> None:
    result = replace(chunk([0.0]), chunks=[TextChunk(0, 4, 2, np.array([3.0, 4.0, 12.0], np.float32))])

    def vectors(output_type: OutputType = OutputType.DENSE, **wanted: Any) -> list[list[float]]:
        request = EmbedRequest(texts=["x"], output_type=output_type, **wanted)
        return [found.vector.tolist() for found in requested_chunks(result, request, replace(SPEC, output_type=output_type))]

    assert vectors(dimensions=2) == [pytest.approx([0.6, 0.8])]
    assert vectors(dimensions=2, normalize=False) == [[3.0, 4.0]]
    assert vectors(OutputType.SCORES) == [[3.0, 4.0, 12.0]]  # logits stay as they are
    assert list(requested_chunks(None, EmbedRequest(texts=["x"]), SPEC)) == []


@pytest.mark.parametrize(
    ("text", "offsets"),
    [
        ("cat dog red fox", [(0, 3), (4, 7), (8, 11), (12, 15)]),  # words alone, as BERT's tokenizers have them
        ("cat dog red fox", [(0, 3), (3, 7), (7, 11), (11, 15)]),  # with the space before them, as byte-level tokenizers do
    ],
)
def test_a_chunk_begins_with_the_word_at_its_boundary_wherever_the_space_belongs(text: str, offsets: list[tuple[int, int]]) -> None:
    chunking = Chunking(late=True, size=64, overlap=0, boundaries=(text.index("dog"), text.index("fox")))
    tokenized = TokenizedText(ids=[5, 6, 7, 8], offsets=offsets)
    options = EncodeOptions(limit=64, truncate=Truncate.CHUNK, chunking=chunking)
    found = split_text(tokenized, options, 62, (1, 1), lambda ids: Encoding(np.array([2, *ids, 3], np.int32), False))
    assert isinstance(found, ChunkedText)
    assert found.encodings[0].spans == ((0, 2), (2, 4), (4, 6))  # [CLS] cat | dog red | fox [SEP]
    assert [text[start:stop].strip() for start, stop in found.spans] == ["cat", "dog red", "fox"]
