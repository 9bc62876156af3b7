"""The one named type a hop, in the order in which a text meets them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from npu_proxy.errors import NpuProxyError

Vector = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]
TextInput = str | Sequence[int]
"""A text, or the token ids of one in the model's own vocabulary, without special tokens."""


class Truncate(StrEnum):
    """What happens to a text beyond the model's limit: an error, or its end or its start is cut off."""

    ERROR = "error"
    END = "end"
    START = "start"


class DType(StrEnum):
    """What the vectors of a result are made of; see engine/finish.py for the arithmetic."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"
    UINT8 = "uint8"
    BINARY = "binary"
    UBINARY = "ubinary"
    BASE64 = "base64"


class Pooling(StrEnum):
    """How the token vectors of a text become one vector; the arithmetic is in graph/heads.py."""

    CLS = "cls"
    LAST_TOKEN = "lasttoken"
    MEAN = "mean"
    MEAN_SQRT_LENGTH = "mean_sqrt_len_tokens"
    WEIGHTED_MEAN = "weightedmean"
    MAX = "max"

    @property
    def by_index(self) -> bool:
        """Whether one position a text is enough, so that the last layer is computed for that position only."""
        return self in (Pooling.CLS, Pooling.LAST_TOKEN)


class Lane(StrEnum):
    """Interactive jobs go first; bulk jobs age, so that they cannot starve."""

    INTERACTIVE = "interactive"
    BULK = "bulk"


# -- models ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A Dense module: weight [out, in] float32, bias [out] or None, activation by its stored (torch) name."""

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32] | None
    activation: str


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All that a model's own files say about how it embeds; made by models/layout.py, never guessed."""

    name: str
    folder: Path
    family: str
    """``model_type`` of config.json, the key of graph.build.FAMILIES."""
    config: Mapping[str, Any]
    """config.json as it stands."""
    weight_files: Sequence[Path]
    tokenizer_file: Path
    pooling: Pooling
    dense: Sequence[Dense]
    width: int
    """Numbers in a vector."""
    max_length: int
    """Tokens of a text, special tokens included."""
    vocabulary: int
    normalizes: bool
    """Whether the model ends in a Normalize module (information: what a caller gets is the request's `normalize`)."""
    lower_case: bool
    prompts: Mapping[str, str]
    default_prompt: str | None
    fingerprint: str
    precision: str = "fp32"
    """fp32; fp16: the same weights, computed in half precision where a device can; int8: ``graph``."""
    graph: Path | None = None
    """For int8, the file of its graph (models/quantized.py)."""


# -- the way of one text ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EmbedRequest:
    """Texts to embed and how. ``deadline`` is a time.monotonic() second; None takes the engine's default."""

    texts: Sequence[TextInput]
    input_type: str | None = None
    """`query` or `document`: picks the model's prompt of that meaning, none where the model has none."""
    prompt_name: str | None = None
    """A prompt of the model by name; an unknown name is an error."""
    dimensions: int | None = None
    """Matryoshka: the first so many numbers, renormalized."""
    normalize: bool = True
    truncate: Truncate = Truncate.END
    max_tokens: int | None = None
    """Tokens of a text, special tokens included, where that is less than the model's limit."""
    dtype: DType = DType.FLOAT32
    lane: Lane | None = None
    """None: interactive for up to ``Settings.interactive_texts`` texts, else bulk."""
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Encoding:
    """Token ids [n] int32 with special tokens, within the model's limit, and whether something was cut off."""

    ids: Ids
    truncated: bool

    @property
    def tokens(self) -> int:
        """How many tokens are embedded."""
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Embedded:
    """A text's vector [width] float32 as the model gives it, its tokens, whether it was cut, and which device computed it."""

    vector: Vector
    tokens: int
    truncated: bool
    device: str


@dataclass(slots=True)
class Ticket:
    """One request under way: collects an answer for each of its texts, then calls ``done`` exactly once.

    Any thread may answer; an answer to a text that has one is ignored.
    """

    request: EmbedRequest
    deadline: float
    submitted_at: float
    done: Callable[[Ticket], None]
    abandoned: Callable[[], bool]
    """Whether the caller has gone; jobs of such a ticket are dropped before they cost inference."""
    keys: Sequence[bytes] = ()
    """Under which each text is cached; empty without a cache."""
    answers: list[Embedded | None] = field(init=False)
    errors: list[NpuProxyError | None] = field(init=False)
    encodings: list[Encoding | None] = field(init=False)
    cached: int = 0
    """Texts answered from the cache."""
    fallbacks: set[str] = field(init=False, default_factory=set[str])
    """Why it was not the first device of the chain, each reason once."""
    tokenize_seconds: float = 0.0
    queued_seconds: float = 0.0
    infer_seconds: float = 0.0
    number: int = -1
    """By which the pipeline knows it."""
    queued: int = 0
    """Texts that were handed to the pipeline."""
    _open: int = field(init=False)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        count = len(self.request.texts)
        self.answers = [None] * count
        self.errors = [None] * count
        self.encodings = [None] * count
        self._open = count

    @property
    def open(self) -> int:
        """How many texts have no answer yet."""
        return self._open

    def answer(self, index: int, answer: Embedded) -> None:
        """Give text ``index`` its vector."""
        self._settle(index, answer, None)

    def recall(self, entries: Iterable[tuple[int, Embedded | None]]) -> None:
        """Answer the texts that the cache knows."""
        known = [(index, entry) for index, entry in entries if entry is not None]
        self.cached += len(known)
        for index, entry in known:
            self._settle(index, entry, None)

    def fail(self, index: int, error: NpuProxyError) -> None:
        """Give text ``index`` its error."""
        self._settle(index, None, error)

    def fail_all(self, error: NpuProxyError) -> None:
        """Give every text that has no answer this error."""
        for index in range(len(self.answers)):
            self._settle(index, None, error)

    def _settle(self, index: int, answer: Embedded | None, error: NpuProxyError | None) -> None:
        with self._lock:
            if self.answers[index] is not None or self.errors[index] is not None:
                return
            self.answers[index], self.errors[index] = answer, error
            self._open -= 1
            last = self._open == 0
        if last:
            self.done(self)


@dataclass(slots=True, eq=False)
class Job:
    """One distinct text in the queue and everybody who waits for it (equal texts in flight are merged)."""

    encoding: Encoding
    lane: Lane
    queued_at: float
    waiters: list[tuple[Ticket, int]]
    started: bool = False

    @property
    def deadline(self) -> float:
        """The latest deadline of those who wait."""
        return max(ticket.deadline for ticket, _ in self.waiters)

    def wanted(self, now: float) -> bool:
        """Whether anybody still waits for it."""
        return any(ticket.deadline > now and not ticket.abandoned() for ticket, _ in self.waiters)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a job's vector stands in a row's output."""

    bin: int
    segment: int


class Shaped(Protocol):
    """What packing must know of a row's shape (graph.packed.RowShape is one).

    work: what one inference costs, in any unit that is the same for all shapes of a device.
    """

    @property
    def bins(self) -> int: ...
    @property
    def positions(self) -> int: ...
    @property
    def segments(self) -> int: ...
    @property
    def work(self) -> float: ...


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """The jobs in one row, where each lies, and the row's input arrays by graph input name."""

    jobs: Sequence[Job]
    slots: Sequence[Slot]
    shape: Shaped
    inputs: Mapping[str, npt.NDArray[Any]]

    @property
    def tokens(self) -> int:
        """Useful tokens; the rest of bins x positions is padding."""
        return sum(job.encoding.tokens for job in self.jobs)


@dataclass(frozen=True, slots=True)
class Output:
    """What a device made of a row: vectors [bins, segments, width] float32, which device, seconds on it.

    fallback: why it was not the first device of the chain; "" when it was.
    """

    vectors: npt.NDArray[np.float32]
    device: str
    seconds: float
    fallback: str = ""


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds from submit to answer, in the tokenizer, spent waiting (slowest text) and in inference (sum over rows)."""

    total: float
    tokenized: float
    queued: float
    infer: float


@dataclass(frozen=True, kw_only=True)
class EmbedResult:
    """The answer to an EmbedRequest, in its order.

    embeddings: array [n, width] of the dtype asked for ([n, width / 8] for binary and ubinary), or n strings for base64.
    errors: None or what went wrong, a text; the vector of a failed text is NaN (0 for integers, "" for base64).
    devices: which device computed it, a text, "" where none did. cached: texts whose vector was there already.
    fallback: why that was not the first of the chain, or "".
    """

    embeddings: npt.NDArray[Any] | list[str]
    tokens: Sequence[int]
    truncated: Sequence[bool]
    errors: Sequence[NpuProxyError | None]
    devices: Sequence[str]
    cached: int
    fallback: str
    fingerprint: str
    timings: Timings

    @property
    def device(self) -> str:
        """The devices that computed it, each once, separated by commas."""
        return ",".join(dict.fromkeys(filter(None, self.devices)))

    def raise_first(self) -> EmbedResult:
        """Raise the first text's error, if any; else return self."""
        for error in self.errors:
            if error is not None:
                raise error
        return self
