"""Small looks at the system, for the doctor."""

from __future__ import annotations

import os
from pathlib import Path


def cgroup(name: str) -> str:
    """A file of this process's control group (version 2), or ''."""
    try:
        return (Path("/sys/fs/cgroup") / name).read_text(encoding="ascii").strip()
    except OSError:
        return ""


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
