"""Embed one file into another, in order, with a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from npu_proxy.bulk.readers import Reader, open_texts
from npu_proxy.bulk.writers import VectorWriter
from npu_proxy.engine.engine import Engine
from npu_proxy.engine.options import RequestOptions
from npu_proxy.errors import InputError
from npu_proxy.types import DType


@dataclass(frozen=True, kw_only=True)
class FileJob:
    """What to read and where to write. ``on_error``: `stop` at a text that cannot be embedded, or write `null` for it."""

    source: Path
    text_field: str
    target: Path | None
    on_error: Literal["stop", "null"]
    batch_size: int
    parallel: int | None


@dataclass(kw_only=True)
class JobReport:
    """Counts of texts and tokens that a job has processed."""

    texts: int = 0
    tokens: int = 0
    truncated: int = 0
    failed: int = 0


def run(engine: Engine, job: FileJob, options: RequestOptions) -> JobReport:
    """Embed the file. Raises InputError for a bad file, and for the first bad text unless ``on_error`` is `null`."""
    report = JobReport()
    with (
        open_texts(job.source, job.text_field) as source,
        VectorWriter(job.target, DType(options.get("dtype", DType.FLOAT32))) as target,
        _progress(source, report) as advance,
    ):
        for result in engine.results(source.items, batch_size=job.batch_size, parallel=job.parallel, **options):
            if job.on_error == "stop":
                for number, error in enumerate(result.errors):
                    if error is not None:
                        where = f"text {report.texts + number} (counted from 0) of `{job.source}`"
                        raise InputError(f"{where}: {error}; use --on-error null to continue without it") from error
            target.write(result, report.texts)
            report.texts += len(result.tokens)
            report.tokens += sum(result.tokens)
            report.truncated += sum(result.truncated)
            report.failed += sum(error is not None for error in result.errors)
            advance()
    return report


@contextmanager
def _progress(source: Reader[str], report: JobReport) -> Generator[Callable[[], None]]:
    """Show a progress bar if standard error is a terminal; yields a function to call after each batch."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("embedding", total=1.0)

        def advance() -> None:
            seconds = max(1e-9, progress.tasks[0].elapsed or 0)
            speed = f"{report.texts} texts, {report.tokens / seconds:,.0f} tokens/s"
            progress.update(task, completed=source.fraction(), description=speed)

        yield advance
