"""The verbs of both engines as values: which requests a call needs, and what its results are combined to. Pure functions.

Engine and AsyncEngine differ only in how they wait for the requests of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from npu_proxy.engine.inputs import text_list
from npu_proxy.engine.options import RequestOptions, make_request
from npu_proxy.engine.scoring import (
    probabilities,
    rerank_requests,
    rerank_results,
    sorted_labels,
    sparse_vectors,
    token_vectors,
)
from npu_proxy.engine.stream import batches
from npu_proxy.engine.validation import check_classifier, check_options, check_top_n
from npu_proxy.errors import InputError
from npu_proxy.settings import Settings
from npu_proxy.spec import ModelSpec
from npu_proxy.types import (
    EmbedRequest,
    EmbedResult,
    Label,
    OutputType,
    RerankResult,
    SparseVector,
    TextInput,
    Vector,
)

Array = npt.NDArray[Any]
Answer = TypeVar("Answer")

BATCH_SIZE = 256
"""Default number of texts per request; a few requests are in progress at a time."""
_RERANK_OPTIONS = ("truncate", "chunking", "max_tokens", "lane", "timeout")


@dataclass(frozen=True, kw_only=True)
class Call(Generic[Answer]):
    """requests: in the order of the texts. combine: makes the answer of their results, none of which has an error.

    patience: seconds to wait for room in the queue.
    """

    requests: Iterable[EmbedRequest]
    combine: Callable[[Sequence[EmbedResult]], Answer]
    patience: float


def embed_call(settings: Settings, texts: object, batch_size: int, options: RequestOptions) -> Call[Array]:
    """Vectors [n, width] of n texts, in the requested dtype."""
    requests, patience = _requests(settings, texts, batch_size, options, OutputType.DENSE)

    def combine(results: Sequence[EmbedResult]) -> Array:
        return np.concatenate([np.asarray(result.embeddings) for result in results])

    return Call(requests=requests, combine=combine, patience=patience)


def sparse_call(settings: Settings, texts: object, batch_size: int, options: RequestOptions) -> Call[list[SparseVector]]:
    """One sparse vector per text."""
    requests, patience = _requests(settings, texts, batch_size, options, OutputType.SPARSE)
    return Call(requests=requests, combine=lambda results: _flat(map(sparse_vectors, results)), patience=patience)


def tokens_call(settings: Settings, texts: object, batch_size: int, options: RequestOptions) -> Call[list[Vector]]:
    """One array [tokens, width] per text."""
    requests, patience = _requests(settings, texts, batch_size, options, OutputType.TOKENS)
    return Call(requests=requests, combine=lambda results: _flat(map(token_vectors, results)), patience=patience)


def classify_call(
    settings: Settings, spec: ModelSpec, texts: object, batch_size: int, options: RequestOptions, *, top_n: int | None, raw: bool
) -> Call[list[list[Label]]]:
    """The labels of each text. Raises UnsupportedError if the model is no classifier."""
    check_top_n(top_n)
    check_classifier(spec)
    requests, patience = _requests(settings, texts, batch_size, options, OutputType.SCORES)

    def combine(results: Sequence[EmbedResult]) -> list[list[Label]]:
        return _flat(sorted_labels(spec, probabilities(spec, result, raw=raw), top_n) for result in results)

    return Call(requests=requests, combine=combine, patience=patience)


def rerank_call(
    settings: Settings,
    spec: ModelSpec,
    query: str,
    documents: object,
    batch_size: int,
    options: RequestOptions,
    *,
    top_n: int | None,
    raw: bool,
) -> Call[list[RerankResult]]:
    """Documents by relevance. Raises UnsupportedError if the model cannot rank."""
    check_batch_size(batch_size)
    check_options(options, _RERANK_OPTIONS)
    if isinstance(documents, str):
        raise InputError("documents must be a list of texts; put a single document in a list", param="documents")
    shared = make_request([query], options, settings.bulk_timeout)
    requests = rerank_requests(
        spec,
        query,
        [str(document) for document in _strings(text_list(documents))],
        top_n=top_n,
        truncate=shared.truncate,
        chunking=shared.chunking,
        max_tokens=shared.max_tokens,
        deadline=shared.deadline,
        lane=shared.lane,
    )
    parts = [replace(request, texts=texts) for request in requests for texts in batches(request.texts, batch_size)]
    return Call(
        requests=parts,
        combine=lambda results: rerank_results(spec, results, top_n=top_n, raw=raw),
        patience=settings.bulk_timeout if len(parts) > len(requests) else 0.0,
    )


def stream_requests(
    settings: Settings,
    lists: Iterable[Sequence[TextInput]],
    options: RequestOptions,
    output_type: OutputType = OutputType.DENSE,
) -> Iterator[EmbedRequest]:
    """One request per list of texts, made when it is needed, so that its time begins then."""
    return (replace(make_request(texts, options, settings.bulk_timeout), output_type=output_type) for texts in lists)


def as_output_type(name: OutputType | str) -> OutputType:
    """An output type by its name. Raises InputError."""
    if name not in set(OutputType):
        raise InputError(f"`output_type` is {name!r}; it must be one of {', '.join(OutputType)}", param="output_type")
    return OutputType(name)


def check_batch_size(batch_size: int) -> None:
    """Raise InputError unless a request would have at least one text."""
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {batch_size}", param="batch_size")


def raise_first(result: EmbedResult, offset: int) -> EmbedResult:
    """Raise the error of the first text that failed, if any. offset: number of texts in the requests before."""
    try:
        return result.raise_first()
    except InputError as error:
        if offset:
            error.text = offset + (error.text or 0)
        raise


def _requests(
    settings: Settings,
    texts: object,
    batch_size: int,
    options: RequestOptions,
    output_type: OutputType,
) -> tuple[Iterable[EmbedRequest], float]:
    """The requests for texts, and the patience. Each has as much time as its size needs."""
    check_batch_size(batch_size)
    items = text_list(texts)
    if len(items) <= batch_size:
        request = make_request(items, options, None)
        return [replace(request, output_type=output_type)], 0.0
    make_request(items[:1], options, 0.0)  # a wrong option is an error before any text is computed
    return stream_requests(settings, batches(items, batch_size), options, output_type), settings.bulk_timeout


def _strings(documents: Sequence[TextInput]) -> Iterator[str]:
    for index, document in enumerate(documents):
        if not isinstance(document, str):
            raise InputError(f"document {index} is a {type(document).__name__}; expected a string", param="documents")
        yield document


def _flat(lists: Iterable[Iterable[Any]]) -> list[Any]:
    return [item for items in lists for item in items]
