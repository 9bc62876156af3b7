"""The entry point of the command line. Settings are read from flags, then NPU_PROXY_* variables, then npu-proxy.toml."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

from cyclopts import App, CycloptsError, config
from rich.console import Console
from rich.markup import escape

from npu_proxy.bulk.files import STANDARD_INPUT
from npu_proxy.commands.cache import cache
from npu_proxy.commands.embed import embed
from npu_proxy.commands.files import PARAMETERS, Ended
from npu_proxy.commands.models import list_models, pull, rm, show
from npu_proxy.commands.prepare import certify, compare, compile_model, convert, doctor, quantize, tune
from npu_proxy.commands.query import classify, rerank, similarity, verify
from npu_proxy.commands.shared import DEFAULTS, SharedSettings
from npu_proxy.errors import InputError, ModelError, NpuProxyError, SettingsError
from npu_proxy.settings import Settings
from npu_proxy.version import __version__

_PREFIX = "NPU_PROXY_"
_CONFIG = f"{_PREFIX}CONFIG"
_PARAMETERS = (
    *PARAMETERS,
    "DIMENSIONS",
    "NORMALIZE",
    "TRUNCATE",
    "CHUNKS",
    "OUTPUT_TYPE",
    "DTYPE",
    "INPUT_TYPE",
    "PROMPT_NAME",
    "TOP_N",
    "RAW",
    "HOW",
    "BATCH_SIZE",
    "PARALLEL",
    "REVISION",
    "JSON",
    "PAIRS",
    "SAMPLE",
    "MOST_LOSS",
    "ROUNDS",
    "PLATFORM",
    "ONLY",
    "TRUST_REMOTE_CODE",
)
"""Parameters of individual commands that can also be set as NPU_PROXY_* variables."""


def _format_error(error: CycloptsError) -> str:
    return f"npu-proxy: {escape(' '.join(str(error).split()))} See `npu-proxy --help`."


app: App = App(
    name="npu-proxy",
    version=__version__,
    help="Embed text on an NPU, GPU or CPU. Settings come from flags, then NPU_PROXY_* variables, then npu-proxy.toml "
    "(or the file that NPU_PROXY_CONFIG names).",
    error_formatter=_format_error,
    error_console=Console(stderr=True, soft_wrap=True),
)


@app.command
def serve(*, settings: SharedSettings = DEFAULTS) -> None:
    """Serve the model over HTTP.

    The port is open immediately and returns status 503 until the model is ready. On SIGTERM, open requests get `drain`
    seconds to finish. On SIGHUP, keys, the certificate, limits and `served_model_name` are read again.
    """
    from npu_proxy.server.run import serve as run_server

    code = run_server(settings, _read_again)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # everything has stopped; a hanging download thread must not keep the process alive


def _read_again() -> Settings:
    """The settings of this command line, with the current content of the TOML file. Raises SettingsError."""
    app.config = [config.Env(_PREFIX, command=False), _toml()]
    try:
        _, bound, _ = app.parse_args(list(_without_old_spellings(sys.argv[1:])), exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise SettingsError(" ".join(str(error).split())) from error
    return bound.arguments.get("settings", DEFAULTS)


app.command(embed)
app.command(cache)
app.command(list_models, name="list")
app.command(compile_model, name="compile")
for _command in (pull, rm, doctor, certify, quantize, tune, convert, compare, rerank, classify, similarity, show, verify):
    app.command(_command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Exit codes: 0 for success, 1 for failure, 2 for a wrong flag, setting, file or model, 130 if interrupted,
    and 128 plus the number of the signal that ended it.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        _check_environment()
        app.config = [config.Env(_PREFIX, command=False), _toml()]
        app(list(_without_old_spellings(sys.argv[1:] if arguments is None else arguments)))
    except Ended as error:
        _quit(str(error), 128 + error.signal)
    except NpuProxyError as error:
        _quit(str(error), 2 if isinstance(error, InputError | SettingsError | ModelError) else 1)
    except KeyboardInterrupt:
        _quit("interrupted", 130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(0)


def _quit(message: str, code: int) -> NoReturn:
    print(f"npu-proxy: {message}", file=sys.stderr)
    sys.exit(code)


def _without_old_spellings(arguments: Iterable[str]) -> Iterable[str]:
    """Translate `--fallback off` and `--profile off`, the syntax of earlier versions, to `--no-fallback` and `--no-profile`."""
    remaining = _without_lone_hyphens(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name not in ("--fallback", "--profile"):
            yield argument
            continue
        following = value if equals else next(remaining, None)
        if following in ("on", "off"):
            yield name if following == "on" else name.replace("--", "--no-", 1)
        else:
            yield argument
            if not equals and following is not None:
                yield following


def _without_lone_hyphens(arguments: Iterable[str]) -> Iterator[str]:
    """Translate `--input -`, which the parser would take for a flag."""
    is_input = False
    for argument in arguments:
        if argument.startswith("--"):
            is_input = argument == "--input"
        yield STANDARD_INPUT if is_input and argument == "-" else argument


def _check_environment() -> None:
    """Raise SettingsError for an unknown NPU_PROXY_* variable."""
    known = [_PREFIX + setting.name.upper() for setting in fields(Settings)] + [_CONFIG]
    known += [_PREFIX + name for name in _PARAMETERS]
    for name in os.environ:
        if name.startswith(_PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise SettingsError(f"unknown variable `{name}`" + (f"; did you mean `{near[0]}`?" if near else ""))


def _toml() -> config.Toml:
    named = os.environ.get(_CONFIG)
    if named and not Path(named).is_file():
        raise SettingsError(f"{_CONFIG} names `{named}`, which is not a file")
    return config.Toml(named or "npu-proxy.toml", must_exist=bool(named), use_commands_as_keys=False)
