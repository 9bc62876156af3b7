"""What this machine has (processors, memory, devices, libraries), and how to start Python processes."""

from __future__ import annotations

import ctypes
import gc
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from npu_proxy import quiet
from npu_proxy.errors import SettingsError

_END_SECONDS = 5.0


def python_command(code: str) -> Sequence[str]:
    """The command that runs Python code in this environment, without importing from the current folder."""
    return [sys.executable, "-P", "-c", quiet.CODE + code]


def child_environment() -> Mapping[str, str]:
    """The environment variables of this process, with its import path in PYTHONPATH."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


_LIMIT_MEMORY = """
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({0}, {0}))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except ImportError:  # Windows
    pass
"""


def run_python(code: str, content: bytes, seconds: float, most_bytes: int | None = None) -> tuple[int | None, str]:
    """Run code with ``content`` on standard input. Returns its exit code (None if it exceeds ``seconds``) and what it printed.

    most_bytes: of its memory, where the system can limit it. A process that is stuck in a driver cannot be killed; it is abandoned
    rather than waited for.
    """
    limited = "" if most_bytes is None else _LIMIT_MEMORY.format(most_bytes)
    process = subprocess.Popen(  # noqa: S603
        python_command(limited + code),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=child_environment(),
    )
    try:
        printed, _ = process.communicate(content, timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_END_SECONDS)
        return None, ""
    return process.returncode, printed.decode(errors="replace")


def private_folder(folder: Path) -> Path:
    """Create a folder, and those above it that are missing, for this user only. Raises SettingsError if every user may write to it.

    Raises OSError if it cannot be created.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
        path.chmod(0o700)  # whatever the umask
    if not missing:
        check_not_public(folder)
    return folder


def check_not_public(path: Path) -> None:
    """Raise SettingsError if every user of this machine may change a file, or replace the files in a folder."""
    mode = path.stat().st_mode
    if sys.platform != "win32" and mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        what, cure = ("folder", " or use a folder inside it") if stat.S_ISDIR(mode) else ("file", "")
        raise SettingsError(f"{what} {path} can be written by every user of this machine; run `chmod o-w {path}`{cure}")


def available_threads() -> int:
    """Number of cores that this process may use, by its affinity and by the quota of its control group (version 2), if any."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))


def cgroup(name: str) -> str:
    """The content of a file of this process's control group (version 2), or "" if it cannot be read."""
    try:
        return (Path("/sys/fs/cgroup") / name).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def available_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's limit if that is lower."""
    limit = cgroup("memory.max")
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8_000_000_000
    return min(machine, int(limit)) if limit.isdigit() else machine


def give_back_memory() -> None:
    """Collect garbage, and give memory that is free but held by the C library back to the operating system (glibc)."""
    gc.collect()
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no such library; Windows
        return None


def pci(kind: str) -> list[str]:
    """PCI addresses and device ids of the Intel devices of a class."""
    devices: list[str] = []
    for device in sorted(Path("/sys/bus/pci/devices").glob("*")):
        try:
            if (device / "vendor").read_text().strip() == "0x8086" and (device / "class").read_text().startswith(kind):
                devices.append(f"{device.name} {(device / 'device').read_text().strip()}")
        except OSError:  # removed meanwhile
            continue
    return devices


def library(name: str) -> str:
    """The path of a library in the usual folders of the dynamic linker, or "" if it has none."""
    folders = [
        *os.environ.get("LD_LIBRARY_PATH", "").split(":"),
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
        "/usr/local/lib",
    ]
    for folder in filter(None, folders):
        for file in sorted(Path(folder).glob(f"{name}*")):
            return str(file)
    return ""
