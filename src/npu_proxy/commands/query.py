"""Commands for a single query: rerank, classify, similarity."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import msgspec

from npu_proxy.bulk.columns import ColumnOptions, OutputName, columns_of
from npu_proxy.bulk.files import STANDARD_INPUT, find_inputs
from npu_proxy.bulk.texts import TextSource, read_texts
from npu_proxy.bulk.verify import verify as compare_vectors
from npu_proxy.commands.files import INPUT, OUTPUT, InputFlags, OutputFlags, computing, make_job, run_job
from npu_proxy.commands.shared import DEFAULTS, SharedSettings
from npu_proxy.engine.calls import BATCH_SIZE
from npu_proxy.engine.engine import Engine
from npu_proxy.engine.options import RequestOptions
from npu_proxy.engine.validation import can_classify, can_rerank
from npu_proxy.errors import InputError
from npu_proxy.models.resolve import read_model
from npu_proxy.settings import Settings
from npu_proxy.spec import ModelSpec
from npu_proxy.types import Similarity


def rerank(
    query: str = "",
    /,
    *documents: str,
    reading: InputFlags = INPUT,
    query_field: str | None = None,
    writing: OutputFlags = OUTPUT,
    top_n: int | None = None,
    raw: bool = False,
    json: bool = False,
    settings: SharedSettings = DEFAULTS,
) -> None:
    """Rank documents by relevance to a query, best first. A long document is scored by its best part.

    Uses the first cross-encoder or late-interaction model in the setting `model`. If neither documents nor --input are given, each
    line of standard input is a document. Blank documents are not ranked. With --query-field and --output, every row of the input is
    a query and a document, and the output has their score.

    Parameters
    ----------
    query
        The query.
    documents
        The documents, one per argument; those of --input follow.
    query_field
        Field or column of the input that contains a query; needs --output, and a cross-encoder.
    top_n
        Show only the best `top_n` documents.
    raw
        Show logits instead of scores from 0 to 1.
    json
        Print one JSON object per document: its index among all documents, blank ones included, its score, and the document.
    """
    settings = _with_first(settings, can_rerank)
    if (query_field is None) != (writing.output is None) or (query_field is not None and (query or documents)):
        message = "--query-field and --output belong together: a query and a document per row, without others on the command line"
        raise InputError(message, param="query_field")
    if query_field is not None:
        text = replace(reading.text(), query=query_field)
        _run_scores("relevance", text, reading, writing, ColumnOptions(raw=raw), settings)
        return
    candidates = _texts(documents, reading)
    with Engine(settings=settings) as engine:
        for result in engine.rerank(query, [text for _, text in candidates], top_n=top_n, raw=raw, truncate="chunk"):
            index, document = candidates[result.index]
            if json:
                _print({"index": index, "score": result.score, "document": document})
            else:
                print(f"{result.score:9.4f}  {index:4}  {document}")


def classify(
    *texts: str,
    reading: InputFlags = INPUT,
    writing: OutputFlags = OUTPUT,
    top_n: int | None = 1,
    raw: bool = False,
    json: bool = False,
    settings: SharedSettings = DEFAULTS,
) -> None:
    """Classify texts.

    Uses the first sequence classification model in the setting `model`. If neither texts nor --input are given, each line of
    standard input is a text. Blank texts are left out. With --output, the labels of each row are written to a file.

    Parameters
    ----------
    texts
        The texts, one per argument; those of --input follow.
    top_n
        How many labels to show per text, the most likely first.
    raw
        Show logits instead of probabilities.
    json
        Print one JSON object per text: its index among all texts, blank ones included, the text, and its labels.
    """
    settings = _with_first(settings, can_classify)
    if writing.output is not None:
        if texts:
            raise InputError("--output needs --input; labels of texts on the command line are printed", param="output")
        _run_scores("labels", reading.text(), reading, writing, ColumnOptions(top_n=top_n, raw=raw), settings)
        return
    inputs = _texts(texts, reading)
    if not inputs:
        message = "there are no texts to classify; give texts as arguments, a file with --input, or lines on standard input"
        raise InputError(message, param="input")
    with Engine(settings=settings) as engine:
        found = engine.classify([text for _, text in inputs], top_n=top_n, raw=raw)
        for (index, text), labels in zip(inputs, found, strict=True):
            if json:
                _print({"index": index, "text": text, "labels": [asdict(label) for label in labels]})
            else:
                print(f"{', '.join(f'{label.label} {label.score:.4f}' for label in labels)}  {text}")


def _run_scores(
    output: OutputName, text: TextSource, reading: InputFlags, writing: OutputFlags, options: ColumnOptions, settings: Settings
) -> None:
    """Run a job that writes the labels or the relevance of each row."""
    with Engine(settings=replace(settings, cache_mb=0)) as engine:
        columns = columns_of(output, engine.spec, {}, options)
        request: RequestOptions = {"truncate": "chunk"} if output == "relevance" else {}

        metadata = {"model": engine.spec.name, "fingerprint": engine.spec.fingerprint, "output": output, **asdict(options)}
        job = make_job(text, reading, writing, columns, metadata)
        with computing(engine, columns.output_type, request, writing, batch_size=BATCH_SIZE, parallel=None) as compute:
            run_job(engine, job, compute, writing)


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


def _texts(arguments: Sequence[str], reading: InputFlags) -> list[tuple[int, str]]:
    """Arguments and rows of files, or lines of standard input if there is neither: those that are not blank, and their numbers.

    Raises InputError.
    """
    names = reading.input or (() if arguments else (STANDARD_INPUT,))
    rows: Iterable[str] = read_texts(find_inputs(names, reading.format), reading.text(), reading.delimiter) if names else ()
    numbered = enumerate(itertools.chain(arguments, itertools.islice(rows, reading.limit)))
    return [(index, text) for index, text in numbered if text.strip()]


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
