"""The command line: the only reader of arguments, environment and TOML. A command is a short function over the library."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Literal, NoReturn

from cyclopts import App, CycloptsError, config
from rich.console import Console
from rich.markup import escape

from npu_proxy.bulk.commands import classify, rerank, show, similarity
from npu_proxy.engine.engine import Engine
from npu_proxy.engine.options import Options
from npu_proxy.errors import InputError, ModelError, NpuProxyError, SettingsError
from npu_proxy.models.pull import pull as pull_model
from npu_proxy.models.store import Store
from npu_proxy.prepare.caches import cache
from npu_proxy.prepare.commands import DEFAULTS, Shared, certify, compile_model, convert, doctor, quantize, tune
from npu_proxy.settings import Settings
from npu_proxy.types import DType, Truncate
from npu_proxy.version import __version__

_PREFIX = "NPU_PROXY_"
_CONFIG = f"{_PREFIX}CONFIG"


def _format_error(error: CycloptsError) -> str:
    return f"npu-proxy: {escape(' '.join(str(error).split()))} `npu-proxy --help` shows what there is."


app = App(
    name="npu-proxy",
    version=__version__,
    help="Embeds text on NPU, GPU and CPU. Settings come from flags, then NPU_PROXY_* variables, then npu-proxy.toml "
    "(or the file that NPU_PROXY_CONFIG names).",
    error_formatter=_format_error,
    error_console=Console(stderr=True, soft_wrap=True),
)


@app.command
def embed(
    *texts: str,
    input: Path | None = None,
    text_field: str = "text",
    output: Path | None = None,
    dimensions: int | None = None,
    normalize: bool = True,
    truncate: Truncate = Truncate.END,
    dtype: DType = DType.FLOAT32,
    input_type: Literal["query", "document"] | None = None,
    prompt_name: str | None = None,
    batch_size: int = 256,
    parallel: int | None = None,
    on_error: Literal["stop", "null"] = "stop",
    settings: Shared = DEFAULTS,
) -> None:
    """Embed texts, or the texts of a file.

    Prints one JSON object a text: index, embedding, tokens, truncated. Without texts and --input, each line of
    standard input is a text.

    Parameters
    ----------
    texts
        Texts to embed.
    input
        File of texts: .jsonl, .csv, .txt (a text a line) or .parquet.
    text_field
        Field or column of the file that holds the text.
    output
        File for the vectors, in the order of the input: .npy, .jsonl or .parquet.
    dimensions
        Keep the first so many numbers and normalize again (Matryoshka models).
    normalize
        Scale each vector to length 1.
    truncate
        Longer than the model's limit: cut the end, cut the start, fail, or read it in chunks and take their mean.
    dtype
        Numbers of the output.
    input_type
        Use the model's prompt for queries or documents, where it has one.
    prompt_name
        Use a prompt of the model by its name.
    batch_size
        Texts handed to the engine at once.
    parallel
        Worker processes, each with a model of its own; 0 is one a core.
    on_error
        A text that cannot be embedded: stop, or write null and go on.
    """
    from npu_proxy.bulk.files import Target
    from npu_proxy.bulk.job import FileJob, run

    options: Options = {
        "dimensions": dimensions,
        "normalize": normalize,
        "truncate": truncate,
        "dtype": dtype,
        "input_type": input_type,
        "prompt_name": prompt_name,
    }
    if texts and input:
        raise InputError("give texts or --input, not both", param="input")
    with Engine(settings=settings) as engine:
        if input is not None:
            job = FileJob(
                source=input,
                text_field=text_field,
                target=output,
                on_error=on_error,
                batch_size=batch_size,
                parallel=parallel,
            )
            report = run(engine, job, options)
            notes = f", {report.truncated} cut at the limit" * bool(report.truncated)
            notes += f", {report.failed} without a vector" * bool(report.failed)
            print(f"{report.texts} texts, {report.tokens} tokens on {_devices(engine)}{notes}", file=sys.stderr)
            return
        source = texts or (line.rstrip("\r\n") for line in sys.stdin)
        with Target(output, dtype) as target:
            first = 0
            for result in engine.results(source, batch_size=batch_size, parallel=parallel, **options):
                if on_error == "stop":
                    result.raise_first()
                target.write(result, first)
                first += len(result.tokens)


@app.command
def serve(*, settings: Shared = DEFAULTS) -> None:
    """Serve the model over HTTP. The port answers at once, with 503 until the model is ready; SIGTERM drains."""
    from npu_proxy.server.run import serve as run_server

    code = run_server(settings)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # everything is stopped; a download that hangs in its thread must not hold the process


@app.command
def pull(model: str = "", /, *, revision: str | None = None, settings: Shared = DEFAULTS) -> None:
    """Fetch a model into the local store, or check and repair one that is there.

    Parameters
    ----------
    model
        Hugging Face name, catalog alias, or a folder to import; the setting `model` when left out.
    revision
        Branch, tag or commit on the hub.
    """
    stored = pull_model(
        Store(settings.store),
        model or settings.model[0],
        mirrors=settings.mirrors,
        report=lambda line: print(line, file=sys.stderr),
        progress=sys.stderr.isatty(),
        revision=revision,
    )
    print(f"{stored.name}  {stored.size / 1e6:.1f} MB  {stored.folder}")


@app.command(name="list")
def list_models(*, settings: Shared = DEFAULTS) -> None:
    """Show the models in the local store."""
    models = Store(settings.store).list()
    if not models:
        print(f"no models in {settings.store}; fetch the default one with `npu-proxy pull`", file=sys.stderr)
        return
    rows = [("MODEL", "SIZE", "FROM", "FOLDER")]
    rows += [(model.name, f"{model.size / 1e6:.1f} MB", model.source, str(model.folder)) for model in models]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for *cells, folder in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), folder, sep="  ")


@app.command
def rm(model: str, *, settings: Shared = DEFAULTS) -> None:
    """Remove a model from the local store, with its int8 copies, compiled blobs and profiles.

    Parameters
    ----------
    model
        Name or alias, as `npu-proxy list` shows it.
    """
    from npu_proxy.prepare.commands import forget

    store = Store(settings.store)
    stored = store.find(model)
    if stored is not None:
        forget(settings, stored.folder)
    removed = store.remove(model)
    print(f"removed {removed.name}, {removed.size / 1e6:.1f} MB")


def _devices(engine: Engine) -> str:
    """`npu, cpu (12 texts)`: who embedded, and how much of it where it was more than one."""
    executed = engine.stats().counters.executed
    if len(executed) < 2:
        return "".join(executed) or engine.device.name
    return ", ".join(f"{device} ({texts} texts)" for device, texts in executed.items())


app.command(cache)
for command in (doctor, certify, quantize, tune, convert, compile_model, rerank, classify, similarity, show):
    app.command(command, name="compile" if command is compile_model else None)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong flag, setting, file or model, 130 interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        _check_environment()
        app.config = [config.Env(_PREFIX, command=False), _toml()]
        app(arguments)
    except NpuProxyError as error:
        _quit(str(error), 2 if isinstance(error, InputError | SettingsError | ModelError) else 1)
    except KeyboardInterrupt:
        _quit("interrupted", 130)
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(0)


def _quit(message: str, code: int) -> NoReturn:
    print(f"npu-proxy: {message}", file=sys.stderr)
    sys.exit(code)


def _check_environment() -> None:
    """An NPU_PROXY_* variable that means nothing is a mistake, not a comment."""
    known = [_PREFIX + setting.name.upper() for setting in fields(Settings)] + [_CONFIG]
    own = ["INPUT", "TEXT_FIELD", "OUTPUT", "DIMENSIONS", "NORMALIZE", "TRUNCATE", "DTYPE", "INPUT_TYPE", "PROMPT_NAME"]
    own += [
        "TOP_N",
        "RAW",
        "HOW",
        "BATCH_SIZE",
        "PARALLEL",
        "ON_ERROR",
        "REVISION",
        "JSON",
        "PAIRS",
        "SAMPLE",
        "MOST_LOSS",
        "ROUNDS",
        "PLATFORM",
        "ONLY",
        "TRUST_REMOTE_CODE",
    ]
    known += [_PREFIX + name for name in own]
    for name in os.environ:
        if name.startswith(_PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise SettingsError(f"unknown variable `{name}`" + (f"; did you mean `{near[0]}`?" if near else ""))


def _toml() -> config.Toml:
    named = os.environ.get(_CONFIG)
    if named and not Path(named).is_file():
        raise SettingsError(f"{_CONFIG} names `{named}`, which is not a file")
    return config.Toml(named or "npu-proxy.toml", must_exist=bool(named), use_commands_as_keys=False)
