"""The folder of an unfinished job, next to its output: finished parts, their checksums in a manifest, and a lock.

A part is an Arrow file that is written under another name, synced to disk, renamed, and then entered into the manifest. What the
manifest does not name does not exist, so a job that is killed at any moment goes on after its last entry.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import filelock
import pyarrow as pa

from npu_proxy.bulk.arrow import compute, read_mapped
from npu_proxy.errors import InputError, JobError

Start = Literal["new", "resume", "overwrite", "update"]
"""What to do with an unfinished job: refuse it, continue it, begin again, or continue it unless it has become another one."""
_MANIFEST = "manifest.jsonl"
_LOCK = "lock"
_DELIVERED = "delivered"
_OPEN_PARTS = 8
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One entry of the manifest: some blocks of the inputs, and the file that has what was computed of them.

    first: number of the first row among those of all inputs. texts: hash of the rows' texts. sha256: of the file.
    """

    file: str
    blocks: int
    first: int
    rows: int
    tokens: int
    truncated: int
    failed: int
    texts: str
    sha256: str
    bytes: int


class WorkFolder:
    """``OUTPUT.job``, held by one process at a time. Use ``open_work`` to make one.

    is_ours: whether what is in it belongs to this job, so that it may be removed. delivered: how many parts a database has, -1
    before the job has taken its table.
    """

    def __init__(self, folder: Path, target: Path) -> None:
        self.folder = folder
        self.target = target
        self.parts: list[Part] = []
        self.is_ours: bool = False
        self.delivered: int = -1
        self._open: OrderedDict[str, pa.Table] = OrderedDict()

    @property
    def rows(self) -> int:
        """Number of rows that are done."""
        return sum(part.rows for part in self.parts)

    def begin(self, plan: Mapping[str, Any], start: Start) -> None:
        """Take up an unfinished job of the same plan, or begin a new one. Raises InputError if that contradicts ``start``."""
        manifest = self.folder / _MANIFEST
        lines = _whole_lines(manifest)
        if lines and start == "new":
            raise InputError(
                f"`{self.folder}` holds an unfinished job; continue it with --resume, or start again with --overwrite",
                param="output",
            )
        if not lines and start == "resume" and self.target.exists():
            message = f"`{self.target}` exists, and there is no unfinished job of it to resume; replace it with --overwrite"
            raise InputError(message, param="resume")
        if lines and start == "update" and lines[0].get("plan") != plan:
            lines = []
        if not lines or start == "overwrite":
            self._clear()
            _append(manifest, {"plan": plan})
        else:
            _check_same(lines[0].get("plan", {}), plan, self.folder)
            self._take_up(lines)
        self.is_ours = True

    def _take_up(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Take the parts that are as the manifest says, up to the first that is not, and remove everything else."""
        for line in lines[1:]:
            if _DELIVERED in line:
                self.delivered = int(line[_DELIVERED])
                continue
            part = Part(**line)
            if not self._is_whole(part):
                break
            self.parts.append(part)
        self.delivered = min(self.delivered, len(self.parts))
        kept = {_MANIFEST, _LOCK, *(part.file for part in self.parts)}
        for file in self.folder.iterdir():
            if file.name not in kept:
                file.unlink()
        self._rewrite(lines[0]["plan"])

    def add(self, blocks: Sequence[pa.Table], texts: str) -> Part:
        """Store a part of some blocks. When this returns, it survives a power failure."""
        table = pa.concat_tables(blocks, promote_options="default").combine_chunks()
        name = f"part-{len(self.parts):06}.arrow"
        partial = self.folder / f"{name}.tmp"
        with _durable(partial) as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        totals = {name: int(compute.sum(table[name]).as_py() or 0) for name in ("tokens", "truncated")}
        part = Part(
            file=name,
            blocks=len(blocks),
            first=table["index"][0].as_py() if table.num_rows else 0,
            rows=table.num_rows,
            failed=table["error"].length() - table["error"].null_count,
            texts=texts,
            sha256=_sha256(partial),
            bytes=partial.stat().st_size,
            **totals,
        )
        partial.replace(self.folder / name)
        _sync_folder(self.folder)
        _append(self.folder / _MANIFEST, asdict(part))
        self.parts.append(part)
        return part

    def deliver(self, parts: int) -> None:
        """Note that a database has received so many parts."""
        _append(self.folder / _MANIFEST, {_DELIVERED: parts})
        self.delivered = parts

    def table(self, part: Part) -> pa.Table:
        """The rows of a part, mapped into memory."""
        if part.file in self._open:
            self._open.move_to_end(part.file)
        else:
            self._open[part.file] = read_mapped(self.folder / part.file)
            if len(self._open) > _OPEN_PARTS:
                self._open.popitem(last=False)
        return self._open[part.file]

    def tables(self) -> Iterator[pa.Table]:
        """The rows of all parts in order."""
        for part in self.parts:
            yield self.read(part)

    def read(self, part: Part) -> pa.Table:
        """The rows of a part, for a single use in any thread."""
        return read_mapped(self.folder / part.file)

    def finish(self, written: Path) -> None:
        """Make ``written`` the output, with the files beside it, and remove everything else."""
        for beside in self.folder.glob(f"{written.name}.*"):
            beside.replace(self.target.with_name(f"{self.target.name}.{beside.name.removeprefix(written.name + '.')}"))
        with written.open("rb+") as file:
            os.fsync(file.fileno())
        written.replace(self.target)
        _sync_folder(self.target.parent)
        self.remove()

    def remove(self) -> None:
        """Remove the folder."""
        self.parts.clear()
        with suppress(OSError):
            self._clear()
            (self.folder / _LOCK).unlink(missing_ok=True)
            self.folder.rmdir()

    def _clear(self) -> None:
        self._open.clear()
        (self.folder / _MANIFEST).unlink(missing_ok=True)  # first, so that what remains is nobody's
        for file in self.folder.iterdir():
            if file.name != _LOCK:
                file.unlink()

    def _is_whole(self, part: Part) -> bool:
        file = self.folder / part.file
        return file.is_file() and file.stat().st_size == part.bytes and _sha256(file) == part.sha256

    def _rewrite(self, plan: Mapping[str, Any]) -> None:
        """Write the manifest without a line that was cut off."""
        partial = self.folder / f"{_MANIFEST}.tmp"
        lines = [{"plan": plan}, *map(asdict, self.parts), {_DELIVERED: self.delivered}]
        with _durable(partial) as file:
            file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        partial.replace(self.folder / _MANIFEST)
        _sync_folder(self.folder)


@contextmanager
def open_work(target: Path) -> Generator[WorkFolder]:
    """Hold the work folder of an output. Raises InputError if another process holds it, JobError if a disk is full."""
    folder = target.with_name(target.name + ".job")
    lock = filelock.FileLock(folder / _LOCK, timeout=0)
    try:
        folder.mkdir(exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        message = f"another process is writing `{target}`; wait until it has finished, or choose another --output"
        raise InputError(message, param="output") from None
    except OSError as error:
        raise InputError(f"`{target}` cannot be written: {error.strerror}", param="output") from error
    work = WorkFolder(folder, target)
    try:
        yield work
    except OSError as error:
        if error.errno not in _FULL:
            raise
        for partial in folder.glob("*.tmp"):
            partial.unlink(missing_ok=True)
        message = f"no space left for `{target}`; {work.rows} rows are done and kept in `{folder}`"
        raise JobError(f"{message}: free some space and run the same command with --resume") from error
    finally:
        if not work.parts and (work.is_ours or not (folder / _MANIFEST).exists()):
            work.remove()
        lock.release()


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Raise InputError naming what differs between the plan of an unfinished job and that of this one."""
    for name in dict.fromkeys((*before, *now)):
        old, new = before.get(name), now.get(name)
        if old != new:
            what = f"{name} was {_shown(old)} and is now {_shown(new)}"
            if isinstance(old, list) and isinstance(new, list):
                changed = [item for item in new if item not in old] or [item for item in old if item not in new]
                what = f"{name} changed: {_shown(changed[0]) if changed else 'its order'}"
            hint = "run it as before, or start again with --overwrite"
            raise InputError(f"`{folder}` holds a job that was different: {what}; {hint}", param=name)


def _shown(value: object) -> str:
    return json.dumps(value)[:200]


def _whole_lines(manifest: Path) -> Sequence[dict[str, Any]]:
    """The entries of a manifest; the last one is left out if a crash cut it off."""
    try:
        content = manifest.read_bytes()
    except FileNotFoundError:
        return []
    lines: list[dict[str, Any]] = []
    with suppress(ValueError):  # what a power failure left
        lines.extend(json.loads(line) for line in content.split(b"\n")[:-1])
    return lines


def _append(manifest: Path, entry: Mapping[str, Any]) -> None:
    with manifest.open("ab") as file:
        size = file.tell()
        try:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                os.truncate(manifest, size)
            raise


@contextmanager
def _durable(path: Path) -> Generator[Any]:
    """Write a file that is on the disk when the block ends."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
