"""Flags of the commands that read and write files, and the jobs that they describe."""

from __future__ import annotations

import re
import signal
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from cyclopts import Parameter

from npu_proxy.bulk.columns import Columns
from npu_proxy.bulk.dry_run import forecast, told
from npu_proxy.bulk.files import STANDARD_INPUT, find_inputs
from npu_proxy.bulk.job import Job, OnError, Progress, run
from npu_proxy.bulk.output import errors_file
from npu_proxy.bulk.progress import ProgressStyle, shown_progress
from npu_proxy.bulk.rows import Compute, RowOptions
from npu_proxy.bulk.sinks.table import Database, as_target
from npu_proxy.bulk.texts import TextSource
from npu_proxy.bulk.work_folder import Start
from npu_proxy.bulk.writers import format_of, row_schema
from npu_proxy.commands.shared import say
from npu_proxy.engine.engine import Engine
from npu_proxy.engine.options import RequestOptions
from npu_proxy.errors import InputError, NpuProxyError
from npu_proxy.types import EmbedResult, OutputType, TextInput

_NO_COLUMNS = "none"


@Parameter(name="*", group="Input")
@dataclass(frozen=True, kw_only=True)
class InputFlags:
    """Which files to read, and what of them."""

    input: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative_iterable=())] = ()
    """Files: .jsonl, .json (an array of objects), .csv, .tsv, .txt (a text per line), .parquet, .arrow or .feather, also with .gz,
    .zst, .bz2, .lz4 or .xz; folders; patterns such as 'data/**/*.jsonl'; URLs such as s3://bucket/file.parquet; - for standard
    input."""

    format: Literal["jsonl", "json", "csv", "tsv", "txt", "parquet", "arrow"] | None = None
    """Format of the input, if its name does not say it. Standard input is txt by default."""

    text_field: str = "text"
    """Field or column that contains the text; a.b for field b of a struct a."""

    template: str | None = None
    """Make the text of several fields: "{title}\\n{text}". Numbers are written as in JSON, missing fields are empty."""

    delimiter: str | None = None
    """Character between the fields of .csv and .tsv."""

    limit: int | None = None
    """Read only the first rows."""

    def text(self) -> TextSource:
        """What of a row is its text."""
        return TextSource(field=self.text_field, template=self.template)


@Parameter(name="*", group="Output")
@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """Where to write, and what becomes of rows that fail."""

    output: str | None = None
    """File to write: .parquet, .arrow, .npy (vectors alone), .jsonl, .faiss, .usearch, or .bulk (for Elasticsearch); or a
    table of a database: lancedb:FOLDER#TABLE, duckdb:FILE#TABLE, qdrant:URL#COLLECTION, postgresql://HOST/DATABASE#TABLE. An
    unfinished job keeps what it has done in OUTPUT.job. If it is not set, JSON lines are written to standard output."""

    columns: Annotated[tuple[str, ...] | None, Parameter(consume_multiple=True, negative_iterable=())] = None
    """Columns of the input to keep in the output; `none` for none. Default: all, or none on standard output."""

    id_field: str | None = None
    """Column that identifies a row. Default: an id `row_id` is made of the file's name, the text, and how often it has occurred."""

    shard: str | None = None
    """i/n, such as 2/4: do the i-th of n parts of the work, for several machines with the same files."""

    ray: str | None = None
    """Compute on a Ray cluster: its address, `auto`, or `local` for one on this machine. Needs npu-proxy[ray]."""

    ray_workers: str = "1"
    """How many workers the cluster runs, or the fewest and the most, such as 2:16. More join when machines do."""

    ray_cpus: int = 1
    """Processors per worker."""

    resume: bool = False
    """Continue an unfinished job of this output, if there is one."""

    overwrite: bool = False
    """Replace the output, and start an unfinished job again."""

    update: bool = False
    """Bring an existing .parquet or .arrow output up to date: texts that it has are not computed again, and rows that are gone from
    the input are left out."""

    on_error: OnError | None = None
    """What becomes of a row whose text cannot be embedded: stop the job, write null, or skip the row. Such rows are listed in
    OUTPUT.errors.jsonl. Default: null, or stop where the output has no null (integer .npy, standard output)."""

    max_errors: int = 100
    """Stop when more rows have failed."""

    dry_run: bool = False
    """Read the input, compute a sample of it, and say what the job would take: rows, tokens, time and size."""

    progress: ProgressStyle = "auto"
    """A bar (on a terminal), or JSON lines every ten seconds."""

    def keep(self) -> Sequence[str] | None:
        """The columns to keep; None for all."""
        if self.columns is None:
            return None if self.output else ()
        return () if self.columns == (_NO_COLUMNS,) else self.columns

    def workers(self) -> tuple[int, int]:
        """The fewest and the most workers on a cluster. Raises InputError."""
        least, _, most = self.ray_workers.partition(":")
        if not least.isdigit() or not (most or least).isdigit():
            raise InputError(f"--ray-workers is `{self.ray_workers}`; write a number, or two such as 2:16", param="ray_workers")
        return int(least), int(most or least)

    def shards(self) -> tuple[int, int]:
        """Number of the shard, from 1, and how many there are. Raises InputError."""
        if self.shard is None:
            return 1, 1
        found = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise InputError(f"--shard is `{self.shard}`; write the part and the number of parts, such as 1/4", param="shard")
        return int(found[1]), int(found[2])


PARAMETERS = tuple(field.name.upper() for flags in (InputFlags, OutputFlags) for field in fields(flags))
"""These flags as NPU_PROXY_* variables."""
INPUT = InputFlags()
OUTPUT = OutputFlags()


def make_job(text: TextSource, reading: InputFlags, writing: OutputFlags, columns: Columns, metadata: Mapping[str, Any]) -> Job:
    """The job that the flags describe. Raises InputError."""
    for name, value, least in (("limit", reading.limit, 1), ("max_errors", writing.max_errors, 0)):
        if value is not None and value < least:
            raise InputError(f"{name} must be at least {least}, not {value}", param=name)
    if reading.delimiter is not None and len(reading.delimiter.encode()) != 1:
        raise InputError(f"delimiter is {reading.delimiter!r}; it must be one character", param="delimiter")
    starts: list[Start] = [name for name in ("resume", "overwrite", "update") if getattr(writing, name)]
    if len(starts) > 1:
        raise InputError(f"--{starts[0]} and --{starts[1]} contradict each other", param=starts[0])
    target = None if writing.output is None else as_target(writing.output)
    has_null = format_of(target).has_null if isinstance(target, Path) else lambda _: target is not None
    return Job(
        files=find_inputs(reading.input or (STANDARD_INPUT,), reading.format),
        rows=RowOptions(
            text=text,
            columns=columns,
            keep=writing.keep(),
            id_field=writing.id_field,
            hash_rows=isinstance(target, Database),
        ),
        metadata=metadata,
        delimiter=reading.delimiter,
        limit=reading.limit,
        shard=writing.shards(),
        target=target,
        start=starts[0] if starts else "new",
        on_error=writing.on_error or ("null" if has_null(row_schema(columns.schema)) else "stop"),
        max_errors=writing.max_errors,
    )


def run_job(engine: Engine, job: Job, compute: Compute, writing: OutputFlags) -> None:
    """Run a job with its progress shown, and tell what was done; or only what it would do."""
    if writing.dry_run:
        print(told(forecast(job, compute)))
        return

    def padding() -> float | None:
        counters = engine.stats().counters
        return 1 - counters.tokens / counters.positions if counters.positions else None

    with _ended_by_signals(), _hint(job), shown_progress(writing.progress, padding) as report:
        progress = run(job, compute, report)
    say(_told(progress, engine, job))


def _told(progress: Progress, engine: Engine, job: Job) -> str:
    notes = f", {progress.resumed} of them done before" * bool(progress.resumed)
    notes += f", {progress.unchanged} unchanged" * bool(progress.unchanged)
    notes += f", {progress.deleted} deleted" * bool(progress.deleted)
    notes += f", {progress.truncated} truncated" * bool(progress.truncated)
    if progress.failed:
        notes += f", {progress.failed} failed"
        notes += f": {errors_file(_file(job.target))}" if job.target else ""
    return f"{progress.rows} texts, {progress.tokens} tokens on {_devices(engine)}{notes}"


def _devices(engine: Engine) -> str:
    """The devices that computed, as in `npu`; with the number of texts per device if there were several."""
    executed = engine.stats().counters.executed
    if len(executed) < 2:
        return "".join(executed) or engine.device.name
    return ", ".join(f"{device} ({texts} texts)" for device, texts in executed.items())


def _file(target: Path | Database) -> Path:
    """The output's file, or what stands for it."""
    return target if isinstance(target, Path) else target.work


@contextmanager
def _hint(job: Job) -> Generator[None]:
    """Say that what is done is kept, when a job ends before its time."""
    try:
        yield
    except BaseException as error:
        folder = job.target and _file(job.target).with_name(f"{_file(job.target).name}.job")
        if folder and folder.is_dir() and any(folder.glob("part-*.arrow")) and "--resume" not in str(error):
            say(f"npu-proxy: what is done is kept in `{folder}`; --resume continues")
        raise


class Ended(NpuProxyError):
    """A signal ended the job. signal: its number."""

    kind = "ended"

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.signal = number


@contextmanager
def computing(
    engine: Engine, output_type: OutputType, request: RequestOptions, writing: OutputFlags, *, batch_size: int, parallel: int | None
) -> Generator[Compute]:
    """What computes the texts of a job: this process, worker processes, or a Ray cluster."""
    if writing.ray is not None:
        from npu_proxy.ray.cluster import Cluster, ClusterOptions

        if parallel is not None:
            raise InputError("--ray and --parallel contradict each other", param="parallel")
        options = ClusterOptions(address=writing.ray, workers=writing.workers(), cpus=writing.ray_cpus)
        with Cluster(options, engine.settings, output_type, request) as cluster:
            yield cluster
        return

    def compute(texts: Iterable[TextInput]) -> Iterator[EmbedResult]:
        return engine.results(texts, batch_size=batch_size, parallel=parallel, output_type=output_type, **request)

    yield compute


@contextmanager
def _ended_by_signals() -> Generator[None]:
    """Let SIGTERM and SIGHUP end a job as Ctrl-C does: workers are stopped, and what is done is kept."""

    def end(number: int, _frame: object) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)
        raise Ended(number)

    handled = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = [signal.signal(number, end) for number in handled]
    try:
        yield
    finally:
        for number, handler in zip(handled, before, strict=True):
            signal.signal(number, handler)
