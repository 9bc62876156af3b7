"""What a device receives and returns: a batch, its shape and layout, and its output. Plain values, no OpenVINO.

A batch has ``bins`` bins of ``positions`` positions. Several texts may share a bin, one after another. Attention never leaves
a bin, and within it segment numbers separate the texts, so a text's vector cannot depend on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from npu_proxy.types import OutputType, Pooling, Span, TokenIds

Array = npt.NDArray[np.float32]

UNATTENDED = 1 << 14
"""Added to the segment number of tokens that attend to their text but that no token attends to (a query's expansion)."""
BLOCK = 8
"""For SPLADE, which takes the maximum over a text, texts begin at multiples of this many positions (see graph/heads.py)."""


# -- shapes and graphs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """The shape of one inference: ``bins`` x ``positions`` tokens and up to ``segments`` texts per bin.

    work: the cost of one inference, in any unit that all shapes of a device share (devices/shapes.py); defaults to the number
    of tokens. Not part of equality.
    """

    bins: int
    positions: int
    segments: int
    work: float = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        if not self.work:
            object.__setattr__(self, "work", float(self.tokens))

    @property
    def tokens(self) -> int:
        """Number of positions that one inference computes."""
        return self.bins * self.positions

    def __str__(self) -> str:
        return f"{self.bins}x{self.positions}"


@dataclass(frozen=True, kw_only=True)
class BatchLayout:
    """The input arrays and the output of a model's batches. They are defined only here.

    type_ids: whether tokens have a type. unattended: whether there may be tokens that no other token attends to.
    per_token: whether the output has one vector per token. width: numbers per output vector. unplaced: the id of a token that
    takes no position (RoBERTa's padding, even inside a text), and the position that stands for none.
    """

    pooling: Pooling
    type_ids: bool = False
    unattended: bool = False
    per_token: bool = False
    width: int = 1
    unplaced: tuple[int, int] | None = None

    @property
    def align(self) -> int:
        """Texts begin at multiples of this number of positions."""
        return BLOCK if self.pooling is Pooling.SPLADE else 1

    def inputs(self, bins: int, positions: int, segments: int) -> dict[str, tuple[tuple[int, ...], type]]:
        """Dimensions and type of each input array, by its name in the graph."""
        arrays: dict[str, tuple[tuple[int, ...], type]] = dict.fromkeys(
            ("input_ids", "position_ids", "segment_ids"), ((bins, positions), np.int32)
        )
        if self.type_ids:
            arrays["type_ids"] = ((bins, positions), np.int32)
        if self.pooling.prunes or self.pooling is Pooling.SPLADE:
            arrays["pool"] = ((bins, segments), np.int32)
        elif self.pooling is not Pooling.NONE:
            arrays["pool"] = ((bins, segments, positions), np.float32)
        return arrays

    def output(self, bins: int, positions: int, segments: int) -> tuple[int, int, int]:
        """Dimensions of the float32 output."""
        return (bins, positions if self.per_token else segments, self.width)


@dataclass(frozen=True, kw_only=True)
class GraphShape:
    """Which batches a graph accepts: one shape, every shape with a number of tokens, or every shape; -1 means dynamic.

    If ``tokens`` is fixed and the bins are dynamic, everything except attention still has static shapes.
    """

    bins: int = -1
    positions: int = -1
    segments: int = -1
    tokens: int = -1

    @classmethod
    def static(cls, shape: BatchShape) -> GraphShape:
        """A single, fully static shape, as an NPU requires."""
        return cls(bins=shape.bins, positions=shape.positions, segments=shape.segments, tokens=shape.tokens)


@dataclass(frozen=True, kw_only=True)
class GraphStyle:
    """How to express operations that devices compute at different speeds; the results are equal up to float32 rounding.

    rational_gelu: erf as a rational function in basic arithmetic, which the CPU plugin fuses into one vectorized loop
    (its own GELU takes a tenth of the time of the whole model). open_attention: two matrix products and a softmax
    instead of one attention operation.
    """

    rational_gelu: bool = False
    open_attention: bool = False


NATIVE_STYLE = GraphStyle()
"""The operations of OpenVINO's operation set, for accelerators, whose compilers recognize them."""
CPU_STYLE = GraphStyle(rational_gelu=True, open_attention=True)


# -- texts in a batch ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Encoding:
    """A tokenized text: token ids [n] int32 with special tokens, within the model's limit.

    truncated: whether tokens were cut off. type_ids: token types [n] int32 of a pair, None if all are 0.
    prompt_tokens: leading tokens that are not pooled. attended: how many leading tokens others attend to, -1 for all;
    the rest are a query's expansion. document: whether it is the document side of a late-interaction model.
    spans: ranges of tokens that are pooled separately, one vector each; empty for one vector over the whole text.
    """

    ids: TokenIds
    truncated: bool
    type_ids: TokenIds | None = None
    prompt_tokens: int = 0
    attended: int = -1
    document: bool = False
    spans: tuple[Span, ...] = ()

    @property
    def tokens(self) -> int:
        """Number of tokens that are embedded."""
        return len(self.ids)

    @property
    def vectors(self) -> int:
        """Number of vectors that are pooled from it."""
        return len(self.spans) or 1

    @property
    def key(self) -> bytes:
        """A key that is equal only for texts whose vectors are equal."""
        plain = self.ids.tobytes()
        if self.type_ids is None and not self.prompt_tokens and self.attended < 0 and not self.document and not self.spans:
            return plain
        type_ids = b"" if self.type_ids is None else self.type_ids.tobytes()
        head = b"%d %d %d %d " % (len(plain), self.prompt_tokens, self.attended, self.document)
        return head + plain + type_ids + repr(self.spans).encode() if self.spans else head + plain + type_ids


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a text in a batch: its bin, its segment number in the bin, and the position of its first token."""

    bin: int
    segment: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class Canary:
    """A short golden text in the free room of a batch: its index among the canaries (devices/canary.py), and its place."""

    number: int
    encoding: Encoding
    slot: Slot


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One inference: its texts, the slot of each, and the input arrays by their names in the graph.

    output_type: what the model computes. deadline: the earliest deadline of its texts, in time.monotonic() seconds.
    canaries: golden texts beside them, which show whether the device computes right vectors. echoes: free segments that pool a text
    again, as (bin, segment of the text, free segment); their outputs must be equal.
    """

    encodings: Sequence[Encoding]
    slots: Sequence[Slot]
    shape: BatchShape
    inputs: Mapping[str, npt.NDArray[Any]]
    output_type: OutputType = OutputType.DENSE
    deadline: float = math.inf
    canaries: Sequence[Canary] = ()
    echoes: Sequence[tuple[int, int, int]] = ()

    @property
    def tokens(self) -> int:
        """Number of tokens of its texts; the rest of bins x positions is padding and canaries."""
        return sum(encoding.tokens for encoding in self.encodings)


@dataclass(frozen=True, slots=True)
class Output:
    """What a device computed for a batch.

    vectors: [bins, segments, width] float32, or [bins, positions, width] if every token has a vector. device: its name.
    seconds: computing time. fallback: why the first device of the chain did not compute it, "" if it did.
    """

    vectors: Array
    device: str
    seconds: float
    fallback: str = ""
    retries: int = 0
    """How often the whole chain failed before."""
    origin: int = 0
    """Which start of the device computed it (devices/fallback.py); 0 if that is unknown."""
    repaired: bool = False
    """Whether the device found itself wrong while it computed the batch, and computed it again."""


def output_for(batch: Batch, index: int, vectors: Array) -> Array:
    """The part of a batch's output that belongs to one text: [vectors, width], or [tokens, width] with one vector per token."""
    return output_at(batch.output_type, batch.encodings[index], batch.slots[index], vectors)


def output_at(kind: OutputType, encoding: Encoding, slot: Slot, vectors: Array) -> Array:
    """The part of an output that belongs to a text in a slot: [vectors, width], or [tokens, width] with one vector per token."""
    first, count = (slot.start, encoding.tokens) if kind.per_token else (slot.segment, encoding.vectors)
    return vectors[slot.bin, first : first + count]


def text_outputs(batch: Batch, vectors: Array) -> Array:
    """The vectors [texts, width] of a batch's texts in the order of its slots, excluding empty segments.

    With one vector per token: the vectors of all tokens, [tokens, width].
    """
    return np.concatenate([output_for(batch, index, vectors) for index in range(len(batch.slots))])


def token_positions(ids: npt.NDArray[np.int32], unplaced: tuple[int, int] | None) -> npt.NDArray[np.integer]:
    """The position of each token of a text. unplaced: see BatchLayout."""
    if unplaced is None or not (without := ids == unplaced[0]).any():
        return np.arange(len(ids))
    return np.where(without, unplaced[1], np.cumsum(~without) - 1)


def fill_pooling(pooling: Pooling, pool: npt.NDArray[np.generic], segment: int, start: int, count: int, skip: int = 0) -> None:
    """Write the pooling input of one text that occupies positions ``start`` to ``start + count`` of a bin.

    The graph pools with one gather (CLS, last token) or one product with this matrix (the mean family).

    pool: the bin's part of the input, [segments] int32 positions or [segments, positions] float32 weights.
    skip: leading tokens that are not pooled (a prompt); last-token pooling ignores it.
    """
    end = start + count
    match pooling:
        case Pooling.CLS:
            pool[segment] = start + skip
        case Pooling.SPLADE:
            pool[segment] = start
        case Pooling.LAST_TOKEN:
            pool[segment] = end - 1
        case Pooling.MEAN:
            pool[segment, start + skip : end] = 1 / (count - skip)
        case Pooling.MEAN_SQRT_LENGTH:
            pool[segment, start + skip : end] = (count - skip) ** -0.5
        case Pooling.WEIGHTED_MEAN:
            weights = np.arange(1, count + 1)[skip:]
            pool[segment, start + skip : end] = weights / weights.sum()
        case Pooling.MAX:
            pool[segment, start + skip : end] = 1
        case Pooling.NONE:
            pass
