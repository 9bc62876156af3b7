"""Split texts that exceed the model's limit into chunks, and combine the results of the chunks. Pure functions."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from npu_proxy.batch import Encoding
from npu_proxy.engine.encode_options import EncodeOptions
from npu_proxy.engine.outputs import largest_entries, relevance, requested_output
from npu_proxy.engine.similarity import normalize
from npu_proxy.errors import EmptyInputError, InputError, NothingLeftError, NpuProxyError, TooLongError
from npu_proxy.spec import ModelSpec
from npu_proxy.types import Chunking, EmbedRequest, OutputType, Pooling, Span, TextChunk, TextResult

_OVERLAP = 32
"""Default for the maximum number of tokens that neighbouring chunks share."""
_LATE_SIZE = 256
"""Default tokens per late chunk."""
_MIN_LATE_SIZE, _MAX_LATE_CHUNKS = 32, 30
"""Minimum tokens per late chunk, and maximum late chunks per text: even if each chunk ends at half its size, all of them still
fit into a bin, which has one segment per eight positions, up to 64 (devices/shapes.py)."""
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[\u3002\uff01\uff1f]|\n+")

TokenNumbers = AbstractSet[int]
"""Indices of tokens in a text."""


@dataclass(frozen=True, slots=True)
class ChunkedText:
    """The chunks of a long text, and the range of characters that each covers."""

    encodings: Sequence[Encoding]
    spans: Sequence[Span]


@dataclass(frozen=True, kw_only=True)
class TokenizedText:
    """A text before it is chunked: token ids without special tokens, and the range of characters that each token covers.

    words, sentences: indices of the tokens that begin a word, and that follow the end of a sentence.
    lead: number of leading tokens that belong to the prompt and are repeated in every chunk. lead_characters: the prompt's
    length in characters.
    """

    ids: Sequence[int]
    offsets: Sequence[Span]
    words: TokenNumbers = frozenset()
    sentences: TokenNumbers = frozenset()
    lead: int = 0
    lead_characters: int = 0


def complete_chunking(chunking: Chunking, spec: ModelSpec, limit: int, special_tokens: int) -> Chunking:
    """Fill in the defaults of ``chunking``, for texts of ``limit`` tokens, of which ``special_tokens`` are special.

    Raises InputError if the overlap leaves no room in a chunk, or if the model or a batch does not support such late chunks.
    """
    if chunking.size is not None and chunking.size < 1:
        raise InputError(f"`size` must be at least 1 token, not {chunking.size}", param="size")
    if chunking.most is not None and chunking.most < 1:
        raise InputError(f"`most` must be at least 1 chunk, not {chunking.most}", param="most")
    if not chunking.late:
        room = min(limit, chunking.size or limit)
        overlap = min(_OVERLAP, room // 8) if chunking.overlap is None else chunking.overlap
        if not 0 <= overlap < room - special_tokens:
            raise InputError(f"an overlap of {overlap} tokens leaves no room for text in chunks of {room} tokens", param="overlap")
        return replace(chunking, overlap=overlap)
    _check_late(chunking, spec)
    if chunking.boundaries:
        return replace(chunking, size=limit, overlap=0)
    size, smallest = chunking.size or _LATE_SIZE, max(_MIN_LATE_SIZE, -(-limit // _MAX_LATE_CHUNKS))
    if chunking.size is None:
        size = max(size, smallest)
    if size < smallest:
        raise InputError(f"late chunks of {size} tokens are too small; {spec.name} needs at least {smallest} tokens", param="size")
    return replace(chunking, size=size, overlap=0)


def _check_late(chunking: Chunking, spec: ModelSpec) -> None:
    """Raise InputError if a model does not support late chunks, or if they should overlap."""
    if spec.output_type is not OutputType.DENSE or spec.pooling not in (Pooling.MEAN, Pooling.MAX):
        message = f"late chunking needs a dense model with mean or maximum pooling; {spec.name} has {spec.output_type} output"
        raise InputError(f"{message} and {spec.pooling} pooling", param="late")
    if spec.dropped_ids or spec.most_characters is not None:
        raise InputError(f"late chunking is not supported for {spec.name}, which leaves out tokens of its texts", param="late")
    if chunking.overlap:
        raise InputError("late chunks already see the text around them, so they cannot overlap; remove `overlap`", param="overlap")


# -- splitting -----------------------------------------------------------------------------------------------------------


def split_text(
    text: TokenizedText,
    options: EncodeOptions,
    room: int,
    special_tokens: tuple[int, int],
    wrap: Callable[[list[int]], Encoding],
) -> ChunkedText | NpuProxyError:
    """Split a text into chunks of at most ``room`` tokens, each including the prompt (one chunk if the text fits).

    wrap: makes an encoding of a chunk's ids. special_tokens: how many tokens ``wrap`` puts before and after the ids.
    Returns an error if the limit, the overlap and the prompt leave no room for text, or if the text has no tokens.
    """
    chunking, lead = options.chunking, text.lead
    overlap = chunking.overlap or 0
    if room - lead <= overlap:
        return NothingLeftError(f"a limit of {options.limit} tokens leaves no room for text in a chunk", param="max_tokens")
    if len(text.ids) <= lead:
        return EmptyInputError("the model's tokenizer produces no tokens for the text", param="input")
    if chunking.boundaries and len(text.ids) > room:
        return TooLongError(limit=options.limit, tokens=len(text.ids) + sum(special_tokens))
    ranges = chunk_ranges(lead, len(text.ids), room - lead, overlap, text.sentences, text.words)
    cut = chunking.most is not None and len(ranges) > chunking.most
    ranges = ranges[: chunking.most]
    encodings = [wrap([*text.ids[:lead], *text.ids[start:stop]]) for start, stop in ranges]
    if cut:
        encodings[-1] = replace(encodings[-1], truncated=True)
    if chunking.late:
        size, (before, after) = chunking.size or 0, special_tokens
        if before + lead + after >= size:
            return NothingLeftError(f"the prompt leaves no room for text in chunks of {size} tokens", param="size")
        if chunking.boundaries:
            return _bounded_chunks(text, encodings[0], chunking.boundaries, before)
        encodings, ranges = late_chunks(encodings, ranges, before + lead, after, size, text.sentences, text.words)
    shift = text.lead_characters
    spans: list[Span] = [(text.offsets[start][0] - shift, text.offsets[stop - 1][1] - shift) for start, stop in ranges]
    return ChunkedText(encodings=encodings, spans=spans)


def _bounded_chunks(text: TokenizedText, encoding: Encoding, boundaries: Sequence[int], before: int) -> ChunkedText | NpuProxyError:
    """Divide a text that is one encoding at its ``boundaries``; the special tokens count towards its first and last chunk."""
    # By where a token ends: some tokenizers count the space before a word as the word's.
    stops = [stop - text.lead_characters for _, stop in text.offsets]
    firsts = [text.lead, *(bisect_right(stops, boundary, lo=text.lead) for boundary in boundaries)]
    ranges = list(pairwise([*firsts, len(text.ids)]))
    empty = next((number for number, (start, stop) in enumerate(ranges) if start >= stop), None)
    if empty is not None:
        return EmptyInputError(f"the part {empty} of the text has no tokens", param="input")
    ends = [0, *(before + first for first in firsts[1:]), encoding.tokens]
    spans: list[Span] = [(text.offsets[start][0], text.offsets[stop - 1][1]) for start, stop in ranges]
    shifted = [(start - text.lead_characters, stop - text.lead_characters) for start, stop in spans]
    return ChunkedText(encodings=[replace(encoding, spans=tuple(pairwise(ends)))], spans=shifted)


def chunk_ranges(
    first: int, end: int, room: int, overlap: int, sentences: TokenNumbers = frozenset(), words: TokenNumbers = frozenset()
) -> list[Span]:
    """Split tokens ``first`` to ``end`` into ranges of at most ``room`` tokens; each starts ``overlap`` before the previous end.

    sentences: tokens that follow the end of a sentence; a range ends at the last of these in its second half, if there is one.
    words: tokens that begin a word; otherwise a range ends at the last of these. A range also starts at the beginning of a
    word if possible.
    """
    ranges: list[Span] = []
    start = first
    while True:
        stop = min(start + room, end)
        if stop < end:
            second_half = range(stop, start + max(room // 2, overlap), -1)
            stop = next((at for marks in (sentences, words) for at in second_half if at in marks), stop)
        ranges.append((start, stop))
        if stop >= end:
            return ranges
        start = next((at for at in range(stop - overlap, stop) if at in words), stop - overlap)


def late_chunks(
    windows: Sequence[Encoding],
    ranges: Sequence[Span],
    before: int,
    after: int,
    size: int,
    sentences: TokenNumbers,
    words: TokenNumbers,
) -> tuple[list[Encoding], list[Span]]:
    """Divide the windows of a text into spans of at most ``size`` tokens, which are pooled separately.

    ranges: the range of the text's tokens in each window. before, after: tokens that a window has before and after the text's
    own; they count towards its first and last chunk. Returns the windows with their spans, and each span's range in the text.
    """
    encodings: list[Encoding] = []
    chunks: list[Span] = []
    for window, (start, stop) in zip(windows, ranges, strict=True):
        shift = before - start
        marks = [frozenset(at + shift for at in range(start, stop) if at in starts) for starts in (sentences, words)]
        spans = chunk_ranges(0, window.tokens - after, size - after, 0, *marks)
        spans[-1] = (spans[-1][0], window.tokens)
        encodings.append(replace(window, spans=tuple(spans)))
        chunks += [(max(first - shift, start), min(last - shift, stop)) for first, last in spans]
    return encodings, chunks


def word_starts(words: Sequence[int | None]) -> frozenset[int]:
    """Indices of the tokens that begin a word. words: the index of the word that each token belongs to."""
    return frozenset(at for at, word in enumerate(words) if word is None or at == 0 or word != words[at - 1])


def sentence_starts(text: str, offsets: Sequence[Span]) -> frozenset[int]:
    """Indices of the tokens that follow the end of a sentence."""
    starts: set[int] = set()
    token = 0
    for match in _SENTENCE_END.finditer(text):
        while token < len(offsets) and offsets[token][0] < match.end():
            token += 1
        starts.add(token)
    return frozenset(starts)


# -- combining -----------------------------------------------------------------------------------------------------------


def split_result(result: TextResult, encoding: Encoding) -> Sequence[TextResult]:
    """Split a result into those of the encoding's spans, which were pooled separately; just the result if it has no spans."""
    if not encoding.spans:
        return [result]
    return [
        replace(result, vector=vector, tokens=stop - start)
        for vector, (start, stop) in zip(result.vector, encoding.spans, strict=True)
    ]


def combine_chunks(spec: ModelSpec, chunks: Sequence[TextResult], spans: Sequence[Span], *, pair: bool) -> TextResult:
    """Combine the results of a text's chunks.

    Dense: the mean of the chunks' unit vectors, weighted by tokens. Sparse: the largest weight per entry. Tokens: the vectors
    of all chunks. Scores: for a pair that is ranked, the best chunk's; otherwise the mean of the logits, weighted by tokens.
    """
    tokens = np.array([chunk.tokens for chunk in chunks], np.float32)
    share = (tokens / tokens.sum())[:, None]
    vectors = [chunk.vector for chunk in chunks]
    match spec.output_type:
        case OutputType.DENSE:
            vector = (normalize(np.stack(vectors)) * share).sum(axis=0, dtype=np.float32)
        case OutputType.SPARSE:
            vector = largest_entries(np.concatenate(vectors))
        case OutputType.TOKENS:
            vector = np.concatenate(vectors)
        case OutputType.SCORES if pair and len(spec.labels) <= 2:
            logits = np.stack(vectors)
            vector = vectors[int(np.argmax(relevance(logits)))]
        case OutputType.SCORES:
            vector = (np.stack(vectors) * share).sum(axis=0, dtype=np.float32)
        case OutputType.MULTI:
            first = np.stack([rows[0] for rows in vectors])
            dense = np.concatenate([first[0, :2], (normalize(first[:, 2:]) * share).sum(axis=0, dtype=np.float32)])
            vector = np.concatenate([dense[None], *[rows[1:] for rows in vectors]])
    return TextResult(
        vector,
        int(tokens.sum()),
        truncated=any(chunk.truncated for chunk in chunks),
        device=",".join(dict.fromkeys(chunk.device for chunk in chunks)),
        chunks=[TextChunk(*span, chunk.tokens, chunk.vector) for chunk, span in zip(chunks, spans, strict=True)],
    )


def requested_chunks(result: TextResult | None, request: EmbedRequest, spec: ModelSpec) -> Sequence[TextChunk]:
    """A text's chunks, with vectors truncated to the request's dimensions, and normalized if it asks for that."""
    chunks: list[TextChunk] = []
    for chunk in result.chunks if result else ():
        vector = requested_output(request.output_type, spec.output_type, chunk.vector)
        if request.output_type is OutputType.DENSE:
            vector = vector[: request.dimensions]
            vector = normalize(vector[None])[0] if request.normalize else vector
        chunks.append(replace(chunk, vector=vector))
    return chunks
