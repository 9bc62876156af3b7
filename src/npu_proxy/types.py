"""Public requests and results, from a text on its way in to its result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from npu_proxy.errors import InputError, NpuProxyError

Vector = npt.NDArray[np.float32]
TokenIds = npt.NDArray[np.int32]
Span = tuple[int, int]
"""A range of characters or tokens: start and stop, as in a slice."""
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
"""Similarity of two vectors, in the terms of sentence-transformers; engine/similarity.py has the arithmetic."""


class Pair(NamedTuple):
    """Two texts that a cross-encoder scores together, such as a query and a document."""

    first: str
    second: str


TextInput = str | Sequence[int] | Pair
"""A text; token ids of the model's own vocabulary, without special tokens; or two texts for a cross-encoder."""


class Truncate(StrEnum):
    """What to do with a text longer than the model's limit: fail, cut off its end or its start, or split it into chunks."""

    ERROR = "error"
    END = "end"
    START = "start"
    CHUNK = "chunk"


class DType(StrEnum):
    """Number format of a result's vectors; see engine/finish.py for the arithmetic."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"
    UINT8 = "uint8"
    BINARY = "binary"
    UBINARY = "ubinary"
    BASE64 = "base64"


class OutputType(StrEnum):
    """What a model computes from a text, and what a request can ask for.

    dense: one vector per text. sparse: weights of vocabulary entries. tokens: one vector per token (late interaction).
    scores: one number per label (cross-encoders, classifiers). multi: the first three in one pass (bge-m3).
    """

    DENSE = "dense"
    SPARSE = "sparse"
    TOKENS = "tokens"
    SCORES = "scores"
    MULTI = "multi"

    @property
    def per_token(self) -> bool:
        """Whether a device returns one vector per token instead of one per text."""
        return self in (OutputType.TOKENS, OutputType.MULTI)


class Pooling(StrEnum):
    """How the token vectors of a text become one vector; the arithmetic is in graph/heads.py."""

    CLS = "cls"
    LAST_TOKEN = "lasttoken"
    MEAN = "mean"
    MEAN_SQRT_LENGTH = "mean_sqrt_len_tokens"
    WEIGHTED_MEAN = "weightedmean"
    MAX = "max"
    SPLADE = "splade"
    """The maximum of log(1 + relu(logit)) over the text, for each vocabulary entry."""
    NONE = "none"
    """No pooling: one vector per token."""

    @property
    def prunes(self) -> bool:
        """Whether pooling uses only one token per text, so that the last layer is computed for that token only."""
        return self in (Pooling.CLS, Pooling.LAST_TOKEN)


class Lane(StrEnum):
    """Priority of a request among those of the same client. Interactive texts go first; bulk texts age, so that none starves."""

    INTERACTIVE = "interactive"
    BULK = "bulk"


@dataclass(frozen=True, kw_only=True)
class Client:
    """Who sends a request. Clients with waiting texts get shares of the device in proportion to their weights, counted in tokens.

    name: identifies it; requests without a client share the name "". max_texts: maximum number of its texts in the queue.
    """

    name: str = ""
    weight: float = 1.0
    max_texts: int | None = None


NO_CLIENT = Client()
"""The client of requests that name none."""


@dataclass(frozen=True, kw_only=True)
class Chunking:
    """How a text longer than the model's limit is split into chunks.

    overlap: number of tokens that neighbouring chunks share; None means 32 or an eighth of a chunk, whichever is smaller. size:
    maximum number of tokens per chunk; None means the model's limit, or 256 for late chunking. sentences: end each chunk at a
    sentence boundary if there is one in its second half. spans: return each chunk's position in the text and its own vector
    (such texts bypass the cache). late: the model reads as much of the text at once as it can, and the tokens of each chunk are
    pooled separately, so that a chunk's vector reflects its context; for models that pool by mean or maximum. Late chunks do
    not overlap. boundaries: for late chunking, the characters at which a chunk begins, after the first one, in place of a size; the
    text must then fit into the model's limit. most: maximum number of chunks; the rest of the text is cut off.
    Source: Guenther et al. 2024 (late chunking).
    """

    overlap: int | None = None
    size: int | None = None
    sentences: bool = False
    spans: bool = False
    late: bool = False
    boundaries: tuple[int, ...] = ()
    most: int | None = None


DEFAULT_CHUNKING = Chunking()
"""How texts are chunked if the request does not specify it."""


_ENUMS: Mapping[str, type[StrEnum]] = {"output_type": OutputType, "truncate": Truncate, "dtype": DType, "lane": Lane}


@dataclass(frozen=True, kw_only=True)
class EmbedRequest:
    """Texts to embed, and how. ``deadline`` is a time.monotonic() value in seconds; None means the engine's default.

    Strings are converted to members of their enumerations. Raises InputError for unknown values, and for options that would
    have no effect.
    """

    texts: Sequence[TextInput]
    output_type: OutputType = OutputType.DENSE
    """One of the model's ``ModelSpec.output_types``."""
    input_type: str | None = None
    """`query`, `document`, `classification` or `clustering`: use the model's prompt for it, if there is one."""
    prompt_name: str | None = None
    """The name of one of the model's prompts; an unknown name is an error."""
    prompt: str | None = None
    """The text of a prompt, used instead of the model's own."""
    instruction: str | None = None
    """A description of the task, for models that take instructions."""
    dimensions: int | None = None
    """Keep only the first ``dimensions`` numbers of each vector, renormalized (Matryoshka models)."""
    normalize: bool = True
    truncate: Truncate = Truncate.END
    chunking: Chunking = DEFAULT_CHUNKING
    """Used with truncate=`chunk`."""
    max_tokens: int | None = None
    """Maximum number of tokens per text, including special tokens, if less than the model's limit."""
    max_document_tokens: int | None = None
    """Maximum number of tokens of each document, without special tokens: of the second text of a pair, or of each single text."""
    dtype: DType = DType.FLOAT32
    lane: Lane | None = None
    """None means interactive for up to ``Settings.interactive_texts`` texts, and bulk for more."""
    client: Client = NO_CLIENT
    on_empty: Literal["error", "placeholder", "embed"] | None = None
    """What to do with a text without tokens; None uses the setting `on_empty`."""
    expect_fingerprint: str | None = None
    """The fingerprint that the model must have; with any other, the request is refused."""
    deadline: float | None = None
    most_numbers: int | None = None
    """Maximum count of numbers in the result, without those of chunks; a larger one is an error, as soon as it is known."""

    def __post_init__(self) -> None:
        for name, enum in _ENUMS.items():
            value = getattr(self, name)
            if type(value) is enum or (value is None and name == "lane"):
                continue
            try:
                object.__setattr__(self, name, enum(value))
            except ValueError:
                raise InputError(f"`{name}` is {value!r}; it must be one of {', '.join(enum)}", param=name) from None
        if isinstance(self.texts, str):
            raise InputError("`texts` is a string; put a single text in a list", param="texts")
        for name, least in (
            ("dimensions", -math.inf),
            ("max_tokens", 1),
            ("max_document_tokens", 1),
        ):  # the bounds of dimensions depend on the model
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | np.integer) and value >= least):
                raise InputError(f"`{name}` is {value!r}; it must be an integer of at least 1", param=name)
        if not isinstance(self.chunking, Chunking):  # pyright: ignore[reportUnnecessaryIsInstance] - not all callers check types
            raise InputError(f"`chunking` is {self.chunking!r}; it must be a Chunking(...)", param="chunking")
        if self.truncate is not Truncate.CHUNK and self.chunking != DEFAULT_CHUNKING:
            raise InputError("`chunking` has no effect unless `truncate` is `chunk`", param="chunking")
        if self.truncate is Truncate.CHUNK and self.max_document_tokens is not None:
            message = "`max_document_tokens` cuts documents, and `truncate=chunk` splits them; send one of them"
            raise InputError(message, param="max_document_tokens")


# -- results -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TextChunk:
    """A chunk of a long text: the characters it covers, its tokens, and its own vector.

    vector: truncated and normalized as requested, like the vector of a whole text; logits for scores.
    """

    start: int
    stop: int
    tokens: int
    vector: Vector


@dataclass(frozen=True, slots=True)
class TextResult:
    """What the model computed for one text, before the request's output options are applied. This is what the cache stores.

    vector: float32 [width]; [tokens, width] if there is one vector per token; [entries, 2] for sparse: vocabulary ids and weights.
    truncated: whether tokens were cut off. device: the device that computed it.
    """

    vector: Vector
    tokens: int
    truncated: bool
    device: str
    chunks: Sequence[TextChunk] = ()
    origin: int = 0
    """Which start of the device computed it; if that turns out to have been wrong, the result is void. 0 if that is unknown."""


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds in total, in the tokenizer, in the queue (for the slowest text), and in inference (its share of the batches)."""

    total: float
    tokenized: float
    queued: float
    infer: float


class SparseVector(NamedTuple):
    """Nonzero weights of vocabulary entries: indices [n] int32, ascending, and values [n] float32."""

    indices: TokenIds
    values: Vector


@dataclass(frozen=True, slots=True)
class RerankResult:
    """The index of a document in the request, and its score."""

    index: int
    score: float


@dataclass(frozen=True, slots=True)
class Label:
    """A classifier's label and its score."""

    label: str
    score: float


@dataclass(frozen=True, kw_only=True)
class EmbedResult:
    """The result of an EmbedRequest. Every sequence has one entry per text, in the order of the request.

    embeddings: array [n, width] of the requested dtype ([n, width / 8] for binary and ubinary), or n strings for base64.
    For sparse, n SparseVectors; for tokens, n arrays [tokens, width]; for scores, logits [n, labels] float32.
    errors: the error of each text, or None; the vector of a failed text is NaN (0 for integers, "" for base64, empty
    otherwise). chunks: the chunks of each text, if the request asks for spans.
    devices: the device that computed each text, "" for failed ones. cached: number of texts that came from the cache.
    fallback: why the first device of the chain was not used, "" if it was.
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
    chunks: Sequence[Sequence[TextChunk]] = ()

    @property
    def device(self) -> str:
        """The distinct devices that computed the texts, separated by commas."""
        return ",".join(dict.fromkeys(filter(None, self.devices)))

    def raise_first(self) -> EmbedResult:
        """Raise the error of the first text that failed, if any; return self otherwise."""
        for index, error in enumerate(self.errors):
            if error is not None:
                if isinstance(error, InputError) and len(self.errors) > 1:  # the texts of a batch share any other error
                    error.text = index
                raise error
        return self
