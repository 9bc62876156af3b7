"""Commands for a single query: rerank, classify, similarity."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import msgspec

from npu_proxy.bulk.readers import read_lines
from npu_proxy.bulk.verify import verify as compare_vectors
from npu_proxy.commands.shared import DEFAULTS, SharedSettings
from npu_proxy.engine.engine import Engine
from npu_proxy.engine.validation import can_classify, can_rerank
from npu_proxy.errors import InputError
from npu_proxy.models.resolve import read_model
from npu_proxy.settings import Settings
from npu_proxy.spec import ModelSpec
from npu_proxy.types import Similarity


def rerank(
    query: str,
    *documents: str,
    input: Path | None = None,
    top_n: int | None = None,
    raw: bool = False,
    json: bool = False,
    settings: SharedSettings = DEFAULTS,
) -> None:
    """Rank documents by relevance to a query, best first. A long document is scored by its best part.

    Uses the first cross-encoder or late-interaction model in the setting `model`.

    Parameters
    ----------
    query
        The query.
    documents
        The documents, one per argument; see also --input.
    input
        File of documents, one per line. If neither a file nor documents are given, standard input is read.
    top_n
        Show only the best `top_n` documents.
    raw
        Show logits instead of scores from 0 to 1.
    json
        Print one JSON object per document.
    """
    candidates = _texts(documents, input)
    with Engine(settings=_with_first(settings, can_rerank)) as engine:
        for result in engine.rerank(query, candidates, top_n=top_n, raw=raw, truncate="chunk"):
            if json:
                _print({"index": result.index, "score": result.score, "document": candidates[result.index]})
            else:
                print(f"{result.score:9.4f}  {result.index:4}  {candidates[result.index]}")


def classify(
    *texts: str,
    input: Path | None = None,
    top_n: int | None = 1,
    raw: bool = False,
    json: bool = False,
    settings: SharedSettings = DEFAULTS,
) -> None:
    """Classify texts.

    Uses the first sequence classification model in the setting `model`.

    Parameters
    ----------
    texts
        The texts, one per argument; see also --input.
    input
        File of texts, one per line. If neither a file nor texts are given, standard input is read.
    top_n
        How many labels to show per text, the most likely first.
    raw
        Show logits instead of probabilities.
    json
        Print one JSON object per text.
    """
    inputs = _texts(texts, input)
    if not inputs:
        message = "there are no texts to classify; give texts as arguments, a file with --input, or lines on standard input"
        raise InputError(message, param="input")
    with Engine(settings=_with_first(settings, can_classify)) as engine:
        for text, labels in zip(inputs, engine.classify(inputs, top_n=top_n, raw=raw), strict=True):
            if json:
                _print({"text": text, "labels": [asdict(label) for label in labels]})
            else:
                print(f"{', '.join(f'{label.label} {label.score:.4f}' for label in labels)}  {text}")


def similarity(
    first: str, *others: str, how: Similarity | None = None, json: bool = False, settings: SharedSettings = DEFAULTS
) -> None:
    """Show how similar a text is to others, most similar first.

    Parameters
    ----------
    first
        The text to compare.
    others
        The texts to compare it with.
    how
        cosine, dot, euclidean or manhattan (distances are negative). Default: the model's similarity.
    json
        Print one JSON object per text.
    """
    if not others:
        raise InputError("there is no text to compare with; give at least two texts", param="others")
    with Engine(settings=settings) as engine:
        vectors = engine.embed([first, *others], normalize=engine.spec.normalizes)
        scores = engine.similarity(vectors[:1], vectors[1:], how)[0]
    for index in (-scores).argsort(kind="stable"):
        if json:
            _print({"index": int(index), "similarity": float(scores[index]), "text": others[index]})
        else:
            print(f"{scores[index]:9.4f}  {others[index]}")


def _with_first(settings: Settings, is_suitable: Callable[[ModelSpec], bool]) -> Settings:
    """The settings with only the first suitable model. Unchanged if there is none: the engine's error then explains why."""
    for model in settings.model if len(settings.model) > 1 else ():
        if is_suitable(read_model(settings, model)):
            return replace(settings, model=(model,))
    return settings


def _texts(arguments: Sequence[str], file: Path | None) -> list[str]:
    """The arguments and the non-blank lines of a file, or those of standard input if there is neither. Raises InputError."""
    if file is None and arguments:
        return list(arguments)
    try:
        if file is None:
            lines = list(read_lines(sys.stdin))
        else:
            with file.open(encoding="utf-8-sig", newline="") as stream:
                lines = list(read_lines(stream))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file or 'standard input'} cannot be read: {error}", param="input") from error
    return [*arguments, *filter(str.strip, lines)]


def _print(content: dict[str, object]) -> None:
    print(msgspec.json.encode(content).decode())


def verify(
    vectors: Path,
    *,
    input: Path,
    text_field: str = "text",
    vector_field: str = "embedding",
    sample: int = 200,
    json: bool = False,
    settings: SharedSettings = DEFAULTS,
) -> None:
    """Tell whether stored vectors were made by this model, precision and instruction, by embedding a sample of the texts again.

    Exit code 0 if they were, 1 if not.

    Parameters
    ----------
    vectors
        File of vectors: .npy, .parquet or .jsonl.
    input
        File of their texts, in the same order: .jsonl, .csv, .txt or .parquet.
    text_field
        Field or column of the file that contains the text.
    vector_field
        Field or column of the vectors, if they are not in a .npy file.
    sample
        Number of texts to embed.
    json
        Print the comparison as one JSON object.
    """
    if sample < 1:
        raise InputError(f"sample must be at least 1, not {sample}", param="sample")
    with Engine(settings=settings) as engine:
        found = compare_vectors(engine, vectors, input, text_field=text_field, vector_field=vector_field, sample=sample)
        name, fingerprint = engine.spec.name, engine.spec.fingerprint
    best = found.matches[0]
    prompt = f"with the prompt `{best.prompt}` ({best.text!r})" if best.text else "without a prompt"
    if found.same:
        verdict = f"made by {name}, fingerprint {fingerprint}, {prompt}"
    elif found.related:
        verdict = f"not made by {name} as it is now; perhaps in another precision, or with other settings ({prompt} it is closest)"
    else:
        verdict = f"not made by {name}"
    if json:
        _print({**asdict(found), "fingerprint": fingerprint, "verdict": verdict})
    else:
        print(f"{found.sampled} of {found.count} vectors, {found.dimensions} of {found.width} dimensions, {found.kind}")
        for match in found.matches:
            print(f"cosine at least {match.least:.5f}, mean {match.mean:.5f}  {match.prompt or 'no prompt'}")
        print(verdict)
    if not found.same:
        sys.exit(1)
