"""Show how far a job is: a bar on a terminal, JSON lines elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from npu_proxy.bulk.job import Progress

ProgressStyle = Literal["auto", "bar", "json", "none"]
_EVERY_SECONDS = 10.0
Padding = Callable[[], float | None]
"""Returns the share of computed positions that held no token."""


@contextmanager
def shown_progress(style: ProgressStyle, padding: Padding) -> Generator[Callable[[Progress], None]]:
    """Show a job's progress on standard error; yields the function that receives it. auto: a bar if that is a terminal."""
    if style == "none":
        yield lambda _: None
    elif style == "bar" or (style == "auto" and sys.stderr.isatty()):
        yield from _bar(padding)
    else:
        yield _json_lines(padding)


def _bar(padding: Padding) -> Generator[Callable[[Progress], None]]:
    with Bar(BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=1.0)

        def show(progress: Progress) -> None:
            found = summary(progress, padding())
            parts = [f"{found['rows']:,} rows", f"{found['rows_per_second']:,.0f} rows/s"]
            parts += [f"{found['tokens_per_second']:,.0f} tokens/s"]
            parts += [f"{found['padding']:.0%} padding"] if found["padding"] is not None else []
            parts += [f"{found['failed']:,} failed"] if found["failed"] else []
            parts += [_duration(found["seconds_left"]) + " left"] if found["seconds_left"] is not None else []
            bar.update(task, completed=progress.fraction or 0.0, description=", ".join(parts))

        yield show


def _json_lines(padding: Padding) -> Callable[[Progress], None]:
    last = time.monotonic()

    def show(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _EVERY_SECONDS:
            last = now
            sys.stderr.write(json.dumps(summary(progress, padding())) + "\n")
            sys.stderr.flush()

    return show


def summary(progress: Progress, padding: float | None) -> dict[str, float | int | None]:
    """A job's progress as numbers: counts, speeds of this run, and the seconds left at that speed."""
    seconds = max(1e-6, time.monotonic() - progress.began)
    rows, tokens = progress.rows - progress.resumed, progress.tokens - progress.resumed_tokens
    left = None
    if progress.fraction is not None and progress.fraction > progress.resumed_fraction:
        share = (progress.fraction - progress.resumed_fraction) / seconds
        left = round((1 - progress.fraction) / share, 1)
    return {
        "rows": progress.rows,
        "tokens": progress.tokens,
        "truncated": progress.truncated,
        "failed": progress.failed,
        "rows_per_second": round(rows / seconds, 1),
        "tokens_per_second": round(tokens / seconds, 1),
        "padding": None if padding is None else round(padding, 4),
        "fraction": None if progress.fraction is None else round(progress.fraction, 4),
        "seconds": round(seconds, 1),
        "seconds_left": left,
    }


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
