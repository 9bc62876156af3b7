"""Embed files into a file: read rows, compute each distinct text once, store parts, and write the output from them.

The job can be killed at any moment and resumed (work_folder.py). Threads: this one reads rows and takes results, the engine has
its own, one stores parts, and one writes the output from them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from npu_proxy.bulk.arrow import compute as arrow
from npu_proxy.bulk.delivery import Delivery, check_table, key_of
from npu_proxy.bulk.duplicates import Numbers
from npu_proxy.bulk.files import InputFile
from npu_proxy.bulk.output import Output, write_errors
from npu_proxy.bulk.parts import Parts
from npu_proxy.bulk.previous import Previous
from npu_proxy.bulk.readers import Block, Inputs, ReadOptions
from npu_proxy.bulk.rows import ERROR, HASH, PREVIOUS, ROW_ID, Compute, Pipeline, RowOptions, Rows, Unchanged
from npu_proxy.bulk.sinks.base import Place
from npu_proxy.bulk.sinks.table import Database, open_sink
from npu_proxy.bulk.work_folder import Part, Start, WorkFolder, open_work
from npu_proxy.bulk.writers import PLACE, Format, OutputSchema, format_of, json_lines, row_schema
from npu_proxy.errors import InputError

OnError = Literal["stop", "null", "skip"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to read, what to compute and where to write it.

    shard: (i, n), computes every n-th block from the i-th on. target: a file, or the table of a database; None writes JSON lines to
    standard output. on_error: what
    becomes of a row whose text cannot be embedded. max_errors: how many of those there may be. metadata: about the model and the
    options, stored in the output; an unfinished job is only resumed if it is the same.
    """

    files: Sequence[InputFile]
    rows: RowOptions
    metadata: Mapping[str, Any]
    delimiter: str | None = None
    limit: int | None = None
    shard: tuple[int, int] = (1, 1)
    target: Path | Database | None = None
    start: Start = "new"
    on_error: OnError = "null"
    max_errors: int = 0


@dataclass(kw_only=True)
class Progress:
    """Counts of a job so far. resumed, resumed_tokens, resumed_fraction: what was done before.

    unchanged: rows that a database has already. deleted: rows of it that are gone from the input.
    """

    rows: int = 0
    resumed: int = 0
    resumed_tokens: int = 0
    resumed_fraction: float = 0.0
    tokens: int = 0
    truncated: int = 0
    failed: int = 0
    unchanged: int = 0
    deleted: int = 0
    fraction: float | None = None
    began: float = field(default_factory=time.monotonic)


Report = Callable[[Progress], None]


def run(job: Job, compute: Compute, report: Report = lambda _: None) -> Progress:
    """Run a job, or what is left of it.

    Raises InputError for a wrong file, and for more bad rows than the job allows; JobError if it cannot go on. Everything that was
    finished is kept.
    """
    progress = Progress()
    inputs = Inputs(job.files, ReadOptions(columns=job.rows.needed(), delimiter=job.delimiter))

    def tell(done: pa.Table) -> None:
        progress.rows += done.num_rows
        progress.tokens += arrow.sum(done["tokens"]).as_py() or 0
        progress.truncated += arrow.sum(done["truncated"]).as_py() or 0
        progress.failed += done.num_rows - done[ERROR].null_count
        progress.fraction = inputs.fraction() if job.limit is None else progress.rows / job.limit
        report(progress)

    if job.target is None:
        stream(job, own_blocks(job, inputs), compute, tell)
        return progress
    if isinstance(job.target, Database):
        _run_into_database(job, job.target, inputs, compute, progress, tell)
        return progress
    target = checked_target(job)
    form = _checked_format(job, target)
    with open_work(target) as work:
        work.begin(_plan(job), job.start)
        previous = Previous(target, job.rows, job.metadata) if job.start == "update" and target.exists() else None
        schema = OutputSchema(form, {**job.metadata, "id": job.rows.id_field or ROW_ID}, job.rows.computed())
        with Output(work, form, schema, skip_failed=job.on_error == "skip") as output:
            _compute_parts(job, work, own_blocks(job, inputs), compute, output.add, _Known(progress, tell, previous, form))
            written = output.finish()
            write_errors(work, target)
            work.finish(written)
    return progress


def _run_into_database(
    job: Job, target: Database, inputs: Inputs, compute: Compute, progress: Progress, tell: Callable[[pa.Table], None]
) -> None:
    """Write to a database instead of a file. Raises InputError if that would delete rows which the job does not read."""
    if job.start == "update" and (job.shard != (1, 1) or job.limit is not None):
        what = "--limit" if job.limit is not None else "--shard"
        raise InputError(f"--update deletes rows that are not in the input, so it cannot be combined with {what}", param="update")
    key = key_of(job.rows.id_field or ROW_ID, job.rows.computed())
    vector = job.rows.columns.vector
    place = Place(location=target.location, table=target.table, key=key, vector=vector, metadata=job.metadata)
    with open_work(target.work) as work, closing(open_sink(target.scheme, place)) as sink:
        work.begin(_plan(job), job.start)
        if work.delivered < 0:
            check_table(sink, place, job.start)
            work.deliver(0)  # from here on, the table is this job's
        schema = OutputSchema(Format(write=_no_file), job.metadata, job.rows.computed())
        delivery = Delivery(work, sink, place, schema, job.rows.id_field or ROW_ID)
        if job.start == "update":
            delivery.remember()
        known = _Known(progress, tell, None, Format(write=_no_file), delivery.unchanged)
        _compute_parts(job, work, own_blocks(job, inputs), compute, delivery.add, known)
        if job.start == "update":
            progress.deleted = delivery.delete_gone()
        write_errors(work, target.work)
        work.remove()


def _no_file(tables: object, schema: object, path: object) -> None:
    raise AssertionError("a database is no file")


@dataclass(frozen=True)
class _Known:
    """What receives the progress of a job, and what is known before it begins."""

    progress: Progress
    tell: Callable[[pa.Table], None]
    previous: Previous | None
    form: Format
    unchanged: Unchanged | None = None


def _compute_parts(
    job: Job,
    work: WorkFolder,
    blocks: Iterator[Block],
    compute: Compute,
    receive: Callable[[Part], None],
    known: _Known,
) -> None:
    """Compute what is missing. receive: gets all parts in order, those of an earlier run first."""
    progress = known.progress
    for part in work.parts:
        known.tell(work.table(part))
        receive(part)
    progress.resumed, progress.resumed_tokens = progress.rows, progress.tokens
    with Parts(work, receive, job.rows.computed()) as parts:

        def done(table: pa.Table, rows: Rows) -> None:
            progress.unchanged += len(rows.keys) - len(rows.numbers)
            known.tell(table)
            if problem := _too_many_errors(job, known.form, table, progress.failed):
                parts.finish()
                raise problem
            parts.add(table, rows)

        pipeline = Pipeline(job.rows, done, partial(_earlier, parts, known.previous), known.unchanged)
        for keys, numbers in known.previous.hashes() if known.previous else ():
            pipeline.know(keys, numbers)
        parts.skip(blocks, pipeline)
        if work.parts:
            known.tell(work.table(work.parts[0]).slice(0, 0))
            progress.resumed_fraction, progress.began = progress.fraction or 0.0, time.monotonic()
        for result in compute(pipeline.texts(blocks)):
            pipeline.take(result, compute)
        pipeline.end()
        parts.finish()
        if not work.parts:  # no file had a row or columns
            pipeline.take_block(Block(file="", unit="row", places=(), table=pa.table({})))
            parts.finish()


def _earlier(parts: Parts, previous: Previous | None, numbers: Numbers) -> pa.Table:
    """What was computed for earlier rows of this job, and for rows of the output before it, by their sorted numbers."""
    if previous is None:
        return parts.earlier(numbers)
    cut = int(np.searchsorted(numbers, PREVIOUS))
    found = [parts.earlier(numbers[:cut])] if cut else []
    found += [previous.take(numbers[cut:])] if cut < len(numbers) else []
    return pa.concat_tables(found)


def _too_many_errors(job: Job, form: Format, table: pa.Table, failed: int) -> InputError | None:
    """The error that ends the job, if the rows that failed in a block are more than it allows."""
    bad = table.filter(arrow.is_valid(table[ERROR]))
    if not bad.num_rows or (job.on_error != "stop" and failed <= job.max_errors):
        return None
    first = f"{bad[PLACE][0].as_py()}: {bad[ERROR][0].as_py()}"
    if job.on_error == "stop":
        has_null = form.has_null(row_schema(job.rows.columns.schema))
        go_on = "null or skip" if has_null else "skip (this output has no value for such a row; parquet and jsonl have)"
        return InputError(f"{first}; go on with --resume --on-error {go_on}", param="on_error")
    message = f"more than {job.max_errors} rows failed, at last {first}; go on with a larger --max-errors and --resume"
    return InputError(message, param="max_errors")


def stream(job: Job, blocks: Iterable[Block], compute: Compute, tell: Callable[[pa.Table], None] = lambda _: None) -> None:
    """Write JSON lines to standard output, as they come. Raises InputError at the first row that fails, if that is to stop it."""

    def done(table: pa.Table, rows: Rows) -> None:
        for place, error in zip(table[PLACE].to_pylist(), table[ERROR].to_pylist(), strict=True):
            if error is not None and job.on_error == "stop":
                raise InputError(f"{place}: {error}; use --on-error null to continue without it", param="on_error")
        shown = table.filter(arrow.is_null(table[ERROR])) if job.on_error == "skip" else table
        sys.stdout.buffer.write(json_lines(shown.drop_columns([name for name in _INNER if name in table.schema.names])))
        sys.stdout.buffer.flush()
        tell(table)

    pipeline = Pipeline(job.rows, done, None)
    for result in compute(pipeline.texts(blocks)):
        pipeline.take(result, compute)
    pipeline.end()


_INNER = (ROW_ID, PLACE, HASH)
"""Columns that standard output does not have."""


# -- what is checked before any work -------------------------------------------------------------------------------------


def _checked_format(job: Job, target: Path) -> Format:
    """The output's format. Raises InputError if it cannot hold what is computed."""
    form, schema = format_of(target), row_schema(job.rows.columns.schema)
    form.check(schema, str(job.metadata.get("dtype", "")))
    if job.on_error == "null" and not form.has_null(schema):
        message = "this output has no value for a row that failed"
        raise InputError(f"{message}; write parquet or jsonl, or leave such rows out with --on-error skip", param="on_error")
    return form


def checked_target(job: Job) -> Path:
    """The file that will be the output; a symbolic link stands for the file it names. Raises InputError if it cannot be."""
    assert isinstance(job.target, Path)
    target = Path(os.path.realpath(job.target))
    format_of(job.target)
    if target.is_dir():
        raise InputError(f"`{job.target}` is a folder; name a file in it", param="output")
    if target.exists() and not target.is_file():
        message = f"`{job.target}` is neither a file nor a folder; leave out --output to write JSON lines to standard output"
        raise InputError(message, param="output")
    if not target.parent.is_dir():
        raise InputError(f"`{target.parent}` is not a folder; create it first", param="output")
    for file in job.files:
        if not file.is_pipe and not file.is_url and target.exists() and target.samefile(file.name):
            raise InputError(f"`{job.target}` is also an input; choose another --output", param="output")
    if target.exists() and job.start == "new":
        raise InputError(f"`{job.target}` exists; replace it with --overwrite, or choose another --output", param="output")
    return target


def _plan(job: Job) -> Mapping[str, Any]:
    """What must be the same for a job to be resumed."""
    return {
        "inputs": [[file.name, file.format, file.size, file.modified] for file in job.files],
        "text": [job.rows.text.field, job.rows.text.template],
        "columns": job.rows.keep if job.rows.keep is None else list(job.rows.keep),
        "id_field": job.rows.id_field,
        "delimiter": job.delimiter,
        "limit": job.limit,
        "shard": list(job.shard),
        "output": str(job.rows.columns.schema),
        **job.metadata,
    }


def own_blocks(job: Job, blocks: Iterable[Block]) -> Iterator[Block]:
    """The blocks of a job's shard, within its limit."""
    number, count = job.shard
    left = job.limit
    for position, whole in enumerate(blocks):
        block = whole if left is None else whole.head(left)
        if left is not None:
            left -= len(block)
        if position % count == number - 1:
            yield block
        if left == 0:
            return
