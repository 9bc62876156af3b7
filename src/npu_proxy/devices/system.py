"""Small looks at the system, and Python processes of our own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_END_SECONDS = 5.0


def python_command(code: str) -> Sequence[str]:
    """A Python of this environment that imports nothing from the current folder."""
    return [sys.executable, "-P", "-c", code]


def child_environment() -> Mapping[str, str]:
    """The variables and the import path of this process."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def ask_python(code: str, content: bytes, seconds: float) -> tuple[int | None, str]:
    """Run code with ``content`` on its standard input; its exit code (None after ``seconds``) and what it printed.

    A process that a driver holds in the kernel cannot be killed; it is left behind rather than waited for.
    """
    process = subprocess.Popen(  # noqa: S603
        python_command(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=child_environment()
    )
    try:
        printed, _ = process.communicate(content, timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_END_SECONDS)
        return None, ""
    return process.returncode, printed.decode(errors="replace")


def cgroup(name: str) -> str:
    """A file of this process's control group (version 2), or ''."""
    try:
        return (Path("/sys/fs/cgroup") / name).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def available_memory() -> int:
    """Bytes of memory this process may use: the machine's, or its control group's limit where that is less."""
    limit = cgroup("memory.max")
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8_000_000_000
    return min(machine, int(limit)) if limit.isdigit() else machine


def pci(kind: str) -> list[str]:
    """PCI addresses of Intel devices of a class."""
    found: list[str] = []
    for device in sorted(Path("/sys/bus/pci/devices").glob("*")):
        try:
            if (device / "vendor").read_text().strip() == "0x8086" and (device / "class").read_text().startswith(kind):
                found.append(f"{device.name} {(device / 'device').read_text().strip()}")
        except OSError:  # it went away
            continue
    return found


def library(name: str) -> str:
    """Where the dynamic linker finds a library, or ''."""
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
