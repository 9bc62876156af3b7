"""What every dialect does the same when it ranks or classifies: requests and scores. The shapes are each dialect's own."""

from __future__ import annotations

from collections.abc import Sequence

from npu_proxy.engine.verbs import Label, Ranked, check_classifier, labels, probabilities, rank_requests, ranking
from npu_proxy.server.dialect import Served
from npu_proxy.types import EmbedRequest, EmbedResult, Kind, TextInput, Truncate


def to_rank(
    served: Served,
    query: str,
    documents: Sequence[str],
    top_n: int | None,
    *,
    truncate: Truncate = Truncate.END,
    max_tokens: int | None = None,
) -> list[EmbedRequest]:
    """What a body that ranks asks of the engine. Raises InputError."""
    return rank_requests(served.spec, query, documents, top_n=top_n, truncate=truncate, max_tokens=max_tokens)


def ranks(served: Served, results: list[EmbedResult], top_n: int | None = None, *, raw: bool = False) -> list[Ranked]:
    """Documents by falling score."""
    return ranking(served.spec, results, top_n=top_n, raw=raw)


def to_classes(served: Served, texts: Sequence[TextInput], truncate: Truncate = Truncate.END) -> EmbedRequest:
    """What a body that classifies asks of the engine. Raises UnsupportedError for a model without labels."""
    check_classifier(served.spec)
    return EmbedRequest(texts=texts, want=Kind.SCORES, truncate=truncate)


def classes(served: Served, result: EmbedResult, *, raw: bool = False) -> list[list[Label]]:
    """Labels of each text by falling score."""
    return labels(served.spec, probabilities(served.spec, result, raw=raw))


def tokens_used(results: Sequence[EmbedResult]) -> int:
    """Tokens of all texts of an answer."""
    return sum(sum(one.tokens) for one in results)
