"""The one named type a hop, in the order in which a text meets them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from npu_proxy.errors import InputError, NpuProxyError

Vector = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]


class Pair(NamedTuple):
    """Two texts that a cross-encoder reads together, such as a query and a document."""

    first: str
    second: str


TextInput = str | Sequence[int] | Pair
"""A text, the token ids of one in the model's own vocabulary without special tokens, or two texts for a cross-encoder."""


class Truncate(StrEnum):
    """What happens to a text beyond the model's limit: an error, its end or its start is cut off, or it is read in chunks."""

    ERROR = "error"
    END = "end"
    START = "start"
    CHUNK = "chunk"


class DType(StrEnum):
    """What the vectors of a result are made of; see engine/finish.py for the arithmetic."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"
    UINT8 = "uint8"
    BINARY = "binary"
    UBINARY = "ubinary"
    BASE64 = "base64"


class Kind(StrEnum):
    """What a model makes of a text, and what a request may want of it.

    dense: a vector. sparse: weights of entries of the vocabulary. tokens: a vector a token (late interaction). scores: one
    number a label (cross-encoders that rank, classifiers). multi: the first three in one pass (bge-m3).
    """

    DENSE = "dense"
    SPARSE = "sparse"
    TOKENS = "tokens"
    SCORES = "scores"
    MULTI = "multi"

    @property
    def gives(self) -> Sequence[Kind]:
        """What requests may want of such a model, its main answer first."""
        return (Kind.DENSE, Kind.SPARSE, Kind.TOKENS) if self is Kind.MULTI else (self,)

    @property
    def per_token(self) -> bool:
        """Whether a device answers every token of a text, not the text."""
        return self in (Kind.TOKENS, Kind.MULTI)


class Pooling(StrEnum):
    """How the token vectors of a text become one vector; the arithmetic is in graph/heads.py."""

    CLS = "cls"
    LAST_TOKEN = "lasttoken"
    MEAN = "mean"
    MEAN_SQRT_LENGTH = "mean_sqrt_len_tokens"
    WEIGHTED_MEAN = "weightedmean"
    MAX = "max"
    SPLADE = "splade"
    """The maximum over a text of each vocabulary entry's log(1 + relu(logit))."""
    NONE = "none"
    """Every token keeps its vector."""

    @property
    def prunes(self) -> bool:
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


Activation = Literal["sigmoid", "softmax", "identity"]
"""What turns the logits of a text into its scores."""
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
"""How alike two vectors are, in the words of sentence-transformers; engine/similarity.py has the arithmetic."""


@dataclass(frozen=True, kw_only=True)
class Sides:
    """How a late-interaction model treats queries and documents differently. Lengths are tokens, special tokens included.

    expanded: a query is filled up to so many tokens with mask tokens, which see the query; attend: and are seen.
    skip, query_skip: ids of a document's and of a query's tokens that get no vector, such as punctuation.
    """

    query_length: int
    document_length: int
    expanded: int = 0
    attend: bool = False
    mask_id: int = 0
    skip: frozenset[int] = frozenset()
    query_skip: frozenset[int] = frozenset()

    @property
    def expand(self) -> bool:
        """Whether queries are filled up with tokens that nobody sees."""
        return bool(self.expanded) and not self.attend


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
    """Numbers in a vector: of a text, of a token, or of the vocabulary; labels for scores."""
    max_length: int
    """Tokens of a text, special tokens included."""
    vocabulary: int
    normalizes: bool
    """Whether the model ends in a Normalize module (information: what a caller gets is the request's `normalize`)."""
    lower_case: bool
    prompts: Mapping[str, str]
    default_prompt: str | None
    fingerprint: str
    kind: Kind = Kind.DENSE
    labels: Sequence[str] = ()
    """Names of the scores, in order."""
    activation: Activation = "identity"
    similarity: Similarity = "cosine"
    include_prompt: bool = True
    """Whether the tokens of a prompt are pooled like those of the text."""
    instruction: str = ""
    """How a task becomes a prompt, with `{task}` in its place; empty where the model knows no instructions."""
    types: bool = False
    """Whether tokens of the second text of a pair have a type of their own."""
    special_tokens: bool = True
    """Whether the tokenizer's special tokens are put around a text (static models have none)."""
    sides: Sides | None = None
    precision: str = "fp32"
    """fp32; fp16: the same weights, computed in half precision where a device can; int8: ``graph``."""
    graph: Path | None = None
    """For int8, the file of its graph (models/quantized.py)."""
    refused: str = ""
    """Why no graph is built from its weights: it is served from a graph file of its repository only (devices/exported.py)."""


# -- the way of one text ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Chunking:
    """How a text that is too long is read in chunks. overlap: tokens that neighbours share; None is 32, or an eighth of a chunk.

    size: tokens of a chunk at most; None is what the model takes, or 256 for late chunks. sentences: end chunks at ends of
    sentences where there is one in their second half. spans: say in the result where each chunk lies, and give its own vector
    (such texts are computed anew, whatever the cache knows). late: the model reads as much of the text at once as it takes, and
    the tokens of each chunk are pooled apart, so that a chunk knows what stands around it; for models that pool by mean or
    maximum. Late chunks do not overlap. Source: Guenther et al. 2024 (late chunking).
    """

    overlap: int | None = None
    size: int | None = None
    sentences: bool = False
    spans: bool = False
    late: bool = False


CHUNKING = Chunking()
"""Chunks as they are unless a request says otherwise."""


_WORDS: Mapping[str, type[StrEnum]] = {"want": Kind, "truncate": Truncate, "dtype": DType, "lane": Lane}


@dataclass(frozen=True, kw_only=True)
class EmbedRequest:
    """Texts to embed and how. ``deadline`` is a time.monotonic() second; None takes the engine's default."""

    texts: Sequence[TextInput]
    want: Kind = Kind.DENSE
    """What is wanted: one of what the model gives (``Kind.gives``)."""
    input_type: str | None = None
    """`query`, `document`, `classification` or `clustering`: picks the model's prompt of that meaning, none where it has none."""
    prompt_name: str | None = None
    """A prompt of the model by name; an unknown name is an error."""
    prompt: str | None = None
    """A prompt as it stands, in place of the model's own."""
    instruction: str | None = None
    """A task in words, for models that take instructions."""
    dimensions: int | None = None
    """Matryoshka: the first so many numbers, renormalized."""
    normalize: bool = True
    truncate: Truncate = Truncate.END
    chunking: Chunking = CHUNKING
    """For truncate=chunk."""
    max_tokens: int | None = None
    """Tokens of a text, special tokens included, where that is less than the model's limit."""
    dtype: DType = DType.FLOAT32
    lane: Lane | None = None
    """None: interactive for up to ``Settings.interactive_texts`` texts, else bulk."""
    deadline: float | None = None

    def __post_init__(self) -> None:
        """Words become members of their enumerations. Raises InputError for what is none, and for what would be ignored."""
        for name, known in _WORDS.items():
            value = getattr(self, name)
            if type(value) is known or (value is None and name == "lane"):
                continue
            try:
                object.__setattr__(self, name, known(value))
            except ValueError:
                raise InputError(f"`{name}` is {value!r}; it is one of {', '.join(known)}", param=name) from None
        if isinstance(self.texts, str):
            raise InputError("texts must be a list of texts; put a single one in a list", param="texts")
        for name, least in (("dimensions", -math.inf), ("max_tokens", 1)):  # how many dimensions there may be depends on the model
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | np.integer) and value >= least):
                raise InputError(f"`{name}` is {value!r}; it must be a whole number of at least 1", param=name)
        if not isinstance(self.chunking, Chunking):  # pyright: ignore[reportUnnecessaryIsInstance] - callers give what they like
            raise InputError(f"`chunking` is {self.chunking!r}; it must be a Chunking(...)", param="chunking")
        if self.truncate is not Truncate.CHUNK and self.chunking != CHUNKING:
            raise InputError("`chunking` says how long texts are chunked, which needs truncate=`chunk`", param="chunking")


Span = tuple[int, int]
"""From one character (or token) of a text to before another."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """Token ids [n] int32 with special tokens, within the model's limit, and whether something was cut off.

    types: token types [n] int32 of a pair, None where all are 0. prompt: leading tokens that are not pooled.
    seen: leading tokens that others attend to, -1 for all of them; those behind are a query's expansion.
    document: whether it is the document side of a late-interaction model. parts: tokens that are pooled apart, as ranges; then
    there is a vector for each.
    """

    ids: Ids
    truncated: bool
    types: Ids | None = None
    prompt: int = 0
    seen: int = -1
    document: bool = False
    parts: tuple[Span, ...] = ()

    @property
    def tokens(self) -> int:
        """How many tokens are embedded."""
        return len(self.ids)

    @property
    def answers(self) -> int:
        """How many vectors are pooled of it."""
        return len(self.parts) or 1

    @property
    def key(self) -> bytes:
        """Equal for texts whose answers are equal."""
        plain = self.ids.tobytes()
        if self.types is None and not self.prompt and self.seen < 0 and not self.document and not self.parts:
            return plain
        types = b"" if self.types is None else self.types.tobytes()
        head = b"%d %d %d %d " % (len(plain), self.prompt, self.seen, self.document)
        return head + plain + types + repr(self.parts).encode() if self.parts else head + plain + types


@dataclass(frozen=True, slots=True)
class Chunked:
    """A long text as chunks, and where in the text each lies, in characters."""

    encodings: Sequence[Encoding]
    spans: Sequence[Span]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk of a long text: where it lies in the text, in characters, its tokens, and its own answer.

    vector: cut and normalized as the request says, like that of a whole text; logits for scores.
    """

    start: int
    stop: int
    tokens: int
    vector: Vector


@dataclass(frozen=True, slots=True)
class Embedded:
    """A text's answer float32 as the model gives it, its tokens, whether it was cut, and which device computed it.

    vector: [width]; [tokens, width] where every token has one; [entries, 2] for sparse, ids of the vocabulary and weights.
    """

    vector: Vector
    tokens: int
    truncated: bool
    device: str
    chunks: Sequence[Chunk] = ()


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
    """Where a job lies in a row: its bin, its number there, and the position of its first token."""

    bin: int
    segment: int
    start: int = 0


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
    """The jobs in one row, where each lies, the row's input arrays by graph input name, and what comes out of it."""

    jobs: Sequence[Job]
    slots: Sequence[Slot]
    shape: Shaped
    inputs: Mapping[str, npt.NDArray[Any]]
    kind: Kind = Kind.DENSE

    @property
    def tokens(self) -> int:
        """Useful tokens; the rest of bins x positions is padding."""
        return sum(job.encoding.tokens for job in self.jobs)


@dataclass(frozen=True, slots=True)
class Output:
    """What a device made of a row: vectors [bins, segments, width] float32, which device, seconds on it.

    Where every token has a vector, they are [bins, positions, width].

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


class SparseVector(NamedTuple):
    """Weights of entries of the vocabulary: indices [n] int32, ascending, and values [n] float32; all others are 0."""

    indices: Ids
    values: Vector


@dataclass(frozen=True, kw_only=True)
class EmbedResult:
    """The answer to an EmbedRequest, in its order.

    embeddings: array [n, width] of the dtype asked for ([n, width / 8] for binary and ubinary), or n strings for base64.
    For sparse, n SparseVectors; for tokens, n arrays [tokens, width]; for scores, logits [n, labels] float32.
    errors: None or what went wrong, a text; the vector of a failed text is NaN (0 for integers, "" for base64, else nothing).
    chunks: of each text, where the request asks for spans.
    devices: which device computed it, a text, "" where none did. cached: texts whose vector was there already.
    fallback: why that was not the first of the chain, or "".
    """

    embeddings: npt.NDArray[Any] | list[str] | list[SparseVector] | list[Vector]
    tokens: Sequence[int]
    truncated: Sequence[bool]
    errors: Sequence[NpuProxyError | None]
    devices: Sequence[str]
    cached: int
    fallback: str
    fingerprint: str
    timings: Timings
    chunks: Sequence[Sequence[Chunk]] = ()

    @property
    def device(self) -> str:
        """The devices that computed it, each once, separated by commas."""
        return ",".join(dict.fromkeys(filter(None, self.devices)))

    def raise_first(self) -> EmbedResult:
        """Raise the first text's error, if any; else return self."""
        for index, error in enumerate(self.errors):
            if error is not None:
                if isinstance(error, InputError) and len(self.errors) > 1:  # others are shared by the texts of a row
                    error.text = index
                raise error
        return self
