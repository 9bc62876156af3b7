"""What a job would do: rows, texts, tokens, time and size, measured on a sample."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from npu_proxy.bulk.job import Job, own_blocks
from npu_proxy.bulk.readers import Inputs, ReadOptions
from npu_proxy.bulk.rows import Compute, Pipeline, Rows
from npu_proxy.types import TextInput

_SAMPLE = 256
_SEED = 1
_MOST_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """texts: different ones. bad: rows without a text; problems: the first of them. bytes: of the output before compression.

    tokens, seconds, bytes: estimated from a random sample of the texts, computed on this machine.
    """

    files: int
    rows: int
    texts: int
    bad: int
    problems: Sequence[str]
    tokens: int
    seconds: float
    bytes: int


def forecast(job: Job, compute: Compute) -> Forecast:
    """Read all inputs of a job, and compute a sample of their texts. Raises InputError for a wrong file."""
    inputs = Inputs(job.files, ReadOptions(columns=job.rows.needed(), delimiter=job.delimiter))
    pipeline = Pipeline(job.rows, _ignore, _nothing)
    numbers, sample = random.Random(_SEED), list[TextInput]()  # noqa: S311 (a sample, not a secret)
    rows = texts = bad = kept = 0
    problems: list[str] = []
    for block in own_blocks(job, inputs):
        prepared = pipeline.prepare(block)
        rows += len(block)
        bad += len(prepared.errors)
        kept += block.table.nbytes if job.rows.keep is None else 0
        places = [block.place(row) for row, text in enumerate(prepared.hashes) if text is None]
        problems += [f"{place}: {error}" for place, error in zip(places, prepared.errors, strict=True)][:_MOST_SHOWN]
        for text in prepared.new:
            texts += 1
            if len(sample) < _SAMPLE:
                sample.append(text)
            elif (place := numbers.randrange(texts)) < _SAMPLE:
                sample[place] = text
    tokens, seconds, size = _measured(job, compute, sample)
    share = texts / max(1, len(sample))
    return Forecast(
        files=len(job.files),
        rows=rows,
        texts=texts,
        bad=bad,
        problems=problems[:_MOST_SHOWN],
        tokens=round(tokens * share),
        seconds=round(seconds * share, 1),
        bytes=round(size / max(1, len(sample)) * rows) + kept,
    )


def told(found: Forecast) -> str:
    """A forecast in words."""
    files = f"{found.files} file{'s' * (found.files != 1)}"
    lines = [
        f"{found.rows:,} rows in {files}, {found.texts:,} different texts, {found.bad:,} bad rows",
        f"about {found.tokens:,} tokens, {found.seconds:,.0f} seconds on this machine, {found.bytes / 1e6:,.1f} MB",
        *found.problems,
    ]
    return "\n".join(lines)


def _measured(job: Job, compute: Compute, sample: Sequence[TextInput]) -> tuple[int, float, int]:
    """Tokens, seconds and bytes of the sample's output. The first texts are computed twice: a model is slow at first."""
    if not sample:
        return 0, 0.0, 0
    for _ in compute(sample[:32]):
        pass
    began = time.perf_counter()
    results = list(compute(sample))
    seconds = time.perf_counter() - began
    places = iter(sample)
    tables = [job.rows.columns.table([next(places) for _ in result.errors], result) for result in results]
    return sum(sum(result.tokens) for result in results), seconds, sum(table.nbytes for table in tables)


def _ignore(table: pa.Table, rows: Rows) -> None:
    """Nothing is computed."""


def _nothing(numbers: object) -> pa.Table:
    raise AssertionError("nothing is computed")
