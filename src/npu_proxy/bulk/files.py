"""Find input files by path, folder, glob or URL, and open them decompressed. A compression is one row of a table."""

from __future__ import annotations

import bz2
import glob
import lzma
import os
import stat
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from npu_proxy.errors import InputError

STANDARD_INPUT = "/dev/stdin"
"""What `-` stands for, on every system."""
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".txt": "txt",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".arrows": "arrow",
    ".ipc": "arrow",
    ".feather": "arrow",
}
"""Formats by suffix; readers.py reads them."""
SEEKING = ("parquet", "arrow")
"""Formats that are read from the end, so neither from a pipe nor decompressed on the way."""

_Stream = Any
"""Has ``read(size)`` and ``close``."""


def _arrow(codec: str) -> Callable[[BinaryIO], _Stream]:
    return lambda raw: pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), codec)


COMPRESSIONS: dict[str, Callable[[BinaryIO], _Stream]] = {
    ".gz": _arrow("gzip"),
    ".zst": _arrow("zstd"),
    ".lz4": _arrow("lz4"),
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
"""Functions that decompress a stream, by suffix. A truncated file is an OSError or EOFError of the read."""
_SAY_FORMAT = "set --format"


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One input: its name as the user knows it, its format, how it is compressed, its bytes, and when it was modified.

    size, modified: 0 if unknown, as for standard input.
    """

    name: str
    format: str
    compression: str = ""
    size: int = 0
    modified: int = 0

    @property
    def is_url(self) -> bool:
        """Whether fsspec opens it."""
        return "://" in self.name

    @property
    def is_pipe(self) -> bool:
        """Whether it can be read only once, from its start."""
        return self.name == STANDARD_INPUT or (not self.is_url and not Path(self.name).is_file())


@dataclass(kw_only=True)
class OpenFile:
    """An open input file. stream: decompressed. done: returns the share of it that has been read."""

    file: InputFile
    stream: _Stream
    done: Callable[[], float] = field(default=lambda: 0.0)


@contextmanager
def open_input(file: InputFile) -> Generator[OpenFile]:
    """Open an input. What goes wrong while it is read becomes an InputError that names it."""
    with readable(file.name), closing(_open(file)) as raw:
        decompress = COMPRESSIONS.get(file.compression)
        stream = decompress(raw) if decompress else raw

        def done() -> float:
            return min(1.0, raw.tell() / file.size) if file.size else 0.0

        yield OpenFile(file=file, stream=stream, done=done)


@contextmanager
def readable(name: str) -> Generator[None]:
    """Convert what reading a file raises to an InputError that names it."""
    try:
        yield
    except pa.ArrowException as error:
        raise InputError(f"`{name}` cannot be read: {error}", param="input") from error
    except EOFError as error:
        raise InputError(f"`{name}` is cut short: {error}", param="input") from error
    except (OSError, lzma.LZMAError) as error:
        what = getattr(error, "strerror", None) or str(error)
        raise InputError(f"`{name}` cannot be read: {what}", param="input") from error


def _open(file: InputFile) -> BinaryIO:
    if file.name == STANDARD_INPUT:
        return cast("BinaryIO", open(sys.stdin.fileno(), "rb", closefd=False))
    return _fsspec().open(file.name, "rb").open() if file.is_url else Path(file.name).open("rb")


def find_inputs(names: Sequence[str], format: str | None = None) -> list[InputFile]:
    """The files that the names stand for, in the order of the names; those of a folder or glob sorted.

    format: overrides what the suffix says. Raises InputError for a name that stands for nothing, and for a file of a folder
    whose format is not known.
    """
    found = [file for name in names for file in _expanded(name, format)]
    if not found:
        raise InputError("there is no input; give --input", param="input")
    pipes = [file.name for file in found if file.is_pipe]
    if len(pipes) > len(set(pipes)):
        raise InputError(f"`{pipes[0]}` is given twice, but can be read only once", param="input")
    return found


def _expanded(name: str, format: str | None) -> Iterable[InputFile]:
    if name in ("-", STANDARD_INPUT):
        return [_checked(InputFile(name=STANDARD_INPUT, format=format or "txt"))]
    if "://" in name:
        return _remote(name, format)
    path = Path(name)
    if path.is_dir():
        return _of_folder(path, format)
    if not path.exists() and glob.has_magic(name):
        files = sorted(match for match in glob.glob(name, recursive=True) if not os.path.isdir(match))  # noqa: PTH207, PTH112
        if not files:
            raise InputError(f"`{name}` matches no file", param="input")
        return [_local(Path(file), format) for file in files]
    if not path.exists() or stat.S_ISSOCK(path.stat().st_mode):
        raise InputError(f"`{name}` is not a file", param="input")
    return [_local(path, format)]


def _of_folder(folder: Path, format: str | None) -> list[InputFile]:
    """All files below a folder, except those whose names begin with a dot or underscore, as Spark and Hadoop read folders."""
    inside = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in inside if not any(part[0] in "._" for part in path.relative_to(folder).parts)]
    if not files:
        raise InputError(f"the folder `{folder}` has no files", param="input")
    for path in files:
        if format is None and not _format_of(path.name)[0]:
            pattern = folder / "**" / f"*{next((p.suffix for p in files if _format_of(p.name)[0]), '.jsonl')}"
            message = f"the folder `{folder}` also has `{path.relative_to(folder)}`, which is in no known format"
            raise InputError(f"{message}; say which files to read with a glob, such as --input '{pattern}'", param="input")
    return [_local(path, format) for path in files]


def _local(path: Path, format: str | None) -> InputFile:
    known = path.stat()
    regular = stat.S_ISREG(known.st_mode)
    return _described(str(path), format, known.st_size if regular else 0, known.st_mtime_ns if regular else 0)


def _remote(name: str, format: str | None) -> list[InputFile]:
    """Files that fsspec finds. Their modification time is whatever their file system tells of their content."""
    fsspec = _fsspec()
    try:
        system, path = fsspec.core.url_to_fs(name)
        paths: list[str] = sorted(system.glob(path)) if glob.has_magic(path) else [path]
        details = [system.info(found) for found in paths]
    except ImportError as error:
        raise InputError(f"`{name}`: {error}", param="input") from error
    except (ValueError, OSError) as error:
        raise InputError(f"`{name}` cannot be read: {error or type(error).__name__}", param="input") from error
    if not details:
        raise InputError(f"`{name}` matches no file", param="input")
    if folder := next((one["name"] for one in details if one["type"] == "directory"), None):
        raise InputError(f"`{name}`: {folder} is a folder; name its files with a glob, such as {name}/*.parquet", param="input")
    return [_described(system.unstrip_protocol(one["name"]), format, int(one["size"] or 0), 0) for one in details]


def _described(name: str, format: str | None, size: int, modified: int) -> InputFile:
    known, compression = _format_of(name)
    file = InputFile(name=name, format=format or known, compression=compression, size=size, modified=modified)
    if not file.format:
        hint = f"{_SAY_FORMAT} to one of {', '.join(dict.fromkeys(FORMATS.values()))}"
        raise InputError(
            f"`{name}`: unknown file format; supported: {', '.join((*FORMATS, *COMPRESSIONS))}; or {hint}", param="input"
        )
    return _checked(file)


def _checked(file: InputFile) -> InputFile:
    if file.format in SEEKING and (file.is_pipe or file.compression):
        how = f"decompress it first (without `{file.compression}`)" if file.compression else "write it to a file first"
        raise InputError(f"`{file.name}`: {file.format} is read from its end; {how}", param="input")
    return file


def _format_of(name: str) -> tuple[str, str]:
    """Format and compression by the suffixes of a name; empty if unknown."""
    stem, suffix = os.path.splitext(name.lower())  # noqa: PTH122 (URLs too)
    compression = suffix if suffix in COMPRESSIONS else ""
    if compression:
        suffix = os.path.splitext(stem)[1]  # noqa: PTH122
    return FORMATS.get(suffix, ""), compression


def _fsspec() -> Any:
    import fsspec  # huggingface_hub needs it, so it is always there

    return fsspec
