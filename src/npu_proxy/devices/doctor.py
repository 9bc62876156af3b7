"""What this machine has for embedding, and how to fix what is missing. Plugins are loaded in a separate process.

A check is one function that returns Findings; ``_CHECKS`` lists the checks in the order of the report.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from npu_proxy.devices.failure import first_line
from npu_proxy.devices.shapes import full_batch_tokens
from npu_proxy.errors import ModelNotFoundError, NpuProxyError
from npu_proxy.models.quantized import int8_reports
from npu_proxy.models.resolve import read_model
from npu_proxy.models.tuning import apply_profile, find_profile
from npu_proxy.settings import Settings
from npu_proxy.system import available_threads, cgroup, library, pci, run_python
from npu_proxy.targets import TARGETS

_PROBE_SECONDS = 60.0
_GPU_FIX = "for an Intel GPU: sudo apt install intel-opencl-icd ocl-icd-libopencl1"


class Finding(msgspec.Struct, frozen=True, kw_only=True, rename={"fix": "cure"}):
    """One line: `ok`, `note` (optional) or `problem`; ``fix`` is the command or step that fixes it (`cure` in the JSON)."""

    topic: str
    level: str
    text: str
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All findings, and the devices that can serve."""

    findings: list[Finding]
    devices: list[str]

    @property
    def serves(self) -> bool:
        """Whether any device can serve."""
        return bool(self.devices)


def diagnose(settings: Settings) -> Diagnosis:
    """Run every check. Takes a few seconds."""
    plugins = _plugins()
    findings = [finding for check in _CHECKS for finding in check(settings)]
    findings += _openvino(plugins)
    return Diagnosis(findings=findings, devices=[name for name, plugin in plugins.items() if plugin.get("name")])


# -- checks ----------------------------------------------------------------------------------------------------------


def _system(_: Settings) -> Iterator[Finding]:
    try:
        release = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:  # not Linux, or a container without the file
        release = platform.platform()
    text = f"{release}, kernel {platform.release()}, {platform.machine()}, Python {platform.python_version()}"
    yield Finding(topic="system", level="ok", text=text)
    if "microsoft" in platform.release().lower():
        yield Finding(
            topic="system",
            level="note",
            text="this is WSL, which does not pass the NPU through",
            fix="run npu-proxy directly on Windows",
        )


def _memory(_: Settings) -> Iterator[Finding]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    limit = cgroup("memory.max")
    text = f"{total / 1e9:.1f} GB" + (f", of which this process may use {int(limit) / 1e9:.1f}" if limit.isdigit() else "")
    yield Finding(topic="memory", level="ok", text=text)
    quota = cgroup("cpu.max")
    words = f", limited by the cgroup ({quota})" if quota and not quota.startswith("max") else ""
    yield Finding(topic="processor", level="ok", text=f"{available_threads()} of {os.cpu_count()} threads for inference{words}")


def _npu(_: Settings) -> Iterator[Finding]:
    if not sys.platform.startswith("linux"):
        return
    present = pci("0x1200")  # class: processing accelerator
    if not present:
        yield Finding(
            topic="npu",
            level="note",
            text="no Intel NPU on the PCI bus (a virtual machine has one only if it is passed through)",
            fix="NPUs are part of Intel Core Ultra processors; in a virtual machine, pass the PCI device through",
        )
    else:
        yield Finding(topic="npu", level="ok", text=f"Intel NPU on the PCI bus: {', '.join(present)}")
    module = Path("/sys/module/intel_vpu").exists()
    if module:
        yield Finding(topic="npu", level="ok", text="kernel module intel_vpu is loaded")
    else:
        yield Finding(
            topic="npu",
            level="problem" if present else "note",
            text="kernel module intel_vpu is not loaded",
            fix="sudo modprobe intel_vpu (it is part of Linux 6.8 and later)",
        )
    nodes = sorted(Path("/dev/accel").glob("accel*")) if Path("/dev/accel").is_dir() else []
    if not nodes:
        yield Finding(
            topic="npu",
            level="problem" if present else "note",
            text="/dev/accel/accel0 does not exist",
            fix="it appears when intel_vpu finds an NPU; run `sudo dmesg | grep intel_vpu` to see why it did not",
        )
    yield from _access(nodes, "npu")
    yield from _driver(present=bool(present))


def _driver(*, present: bool) -> Iterator[Finding]:
    """The user-space driver, which includes its own compiler."""
    driver = library("libze_intel_npu.so") or library("libze_intel_vpu.so")
    loader = library("libze_loader.so")
    level = "problem" if present else "note"
    fix = "install intel-level-zero-npu and intel-driver-compiler-npu from https://github.com/intel/linux-npu-driver/releases"
    if driver:
        yield Finding(topic="npu", level="ok", text=f"NPU user driver: {driver}")
    else:
        yield Finding(topic="npu", level=level, text="no NPU user driver (libze_intel_npu.so)", fix=fix)
    if not loader:
        yield Finding(
            topic="npu",
            level=level,
            text="no Level Zero loader (libze_loader.so.1)",
            fix="sudo apt install libze1, or `level-zero` from the NPU driver's page",
        )
    compiler = library("libnpu_driver_compiler.so") or library("libnpu_compiler.so")
    if compiler:
        yield Finding(topic="npu", level="ok", text=f"NPU compiler: {compiler}")
    else:
        yield Finding(
            topic="npu", level=level, text="no NPU compiler: OpenVINO's Linux wheel has none; the driver includes it", fix=fix
        )


def _gpu(_: Settings) -> Iterator[Finding]:
    if not sys.platform.startswith("linux"):
        return
    nodes = sorted(Path("/dev/dri").glob("renderD*")) if Path("/dev/dri").is_dir() else []
    if not nodes:
        yield Finding(
            topic="gpu", level="note", text="/dev/dri/renderD* does not exist: no graphics driver, or no GPU", fix=_GPU_FIX
        )
        return
    yield from _access(nodes, "gpu")
    if not library("libOpenCL.so"):
        yield Finding(
            topic="gpu",
            level="problem",
            text="no OpenCL loader (libOpenCL.so.1)",
            fix=_GPU_FIX,
        )


def _access(nodes: list[Path], topic: str) -> Iterator[Finding]:
    for node in nodes:
        if os.access(node, os.R_OK | os.W_OK):
            yield Finding(topic=topic, level="ok", text=f"{node} can be opened")
            continue
        try:
            group = node.group()
        except KeyError:  # a container may only have its number
            group = str(node.stat().st_gid)
        yield Finding(
            topic=topic,
            level="problem",
            text=f"{node} belongs to the group `{group}`, of which you are not a member",
            fix=f"sudo usermod -aG {group} $USER, then log in again",
        )


def _folders(settings: Settings) -> Iterator[Finding]:
    for topic, folder, setting in (("store", settings.store, "store"), ("cache", settings.compile_cache, "compile_cache")):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(folder, os.W_OK)
            free = shutil.disk_usage(folder).free
        except OSError as error:
            yield Finding(
                topic=topic,
                level="problem",
                text=f"{folder}: {error.strerror}",
                fix=f"set `{setting}` to a folder that you can write to",
            )
            continue
        if not writable:
            yield Finding(
                topic=topic,
                level="problem",
                text=f"{folder} is not writable",
                fix=f"set `{setting}` to a folder that you can write to",
            )
        elif free < 2e9:
            yield Finding(
                topic=topic,
                level="problem",
                text=f"{folder}: only {free / 1e9:.1f} GB free",
                fix="free disk space; a model takes 0.1 to 2 GB",
            )
        else:
            yield Finding(topic=topic, level="ok", text=f"{folder}, {free / 1e9:.0f} GB free")


def _model(settings: Settings) -> Iterator[Finding]:
    """The model in the settings, its int8 copy, and its tuning profile."""
    try:
        spec = read_model(settings)
    except ModelNotFoundError as error:
        yield Finding(topic="model", level="note", text=str(error), fix=f"npu-proxy pull {settings.model[0]}")
        return
    except NpuProxyError as error:
        yield Finding(topic="model", level="problem", text=str(error))
        return
    int8 = next(iter(int8_reports(settings.store, spec.fingerprint)), None)
    words = f", int8 copy with Spearman {int8.spearman:.2f} (fp32: {int8.spearman_fp32:.2f})" if int8 else ""
    yield Finding(topic="model", level="ok", text=f"{spec.name}, fingerprint {spec.fingerprint}{words}")
    if find_profile(settings.store, spec.fingerprint) is not None:
        used = apply_profile(settings, spec)
        text = f"tuned on this machine; with these settings: device {used.device}, streams {used.streams or 'default'}"
        yield Finding(topic="model", level="ok", text=f"{text}, {full_batch_tokens(used)} tokens per batch")


_CHECKS: tuple[Callable[[Settings], Iterator[Finding]], ...] = (_system, _memory, _folders, _model, _npu, _gpu)


# -- OpenVINO, in a separate process, because a broken driver may crash it ---------------------------------------------

_ASK = """
import json, sys
import openvino as ov
from npu_proxy.devices.failure import first_line
from npu_proxy.targets import TARGETS
from npu_proxy.devices.openvino import open_core
found = {}
for name in ("npu", "gpu", "cpu"):
    target = TARGETS[name]
    try:
        core = open_core(target)
        core.get_property(target.openvino, "SUPPORTED_PROPERTIES")  # loads the plugin, or raises an error that says why it cannot
        present = any(device.split(".")[0] == target.openvino for device in core.available_devices)
        found[name] = {"name": core.get_property(target.openvino, "FULL_DEVICE_NAME")} if present else {}
    except Exception as error:
        found[name] = {"error": str(error)}
print(json.dumps(found))
"""


def _plugins() -> dict[str, dict[str, str]]:
    """Each plugin's device name, or its error."""
    code, printed = run_python(_ASK, b"", _PROBE_SECONDS)
    if code is None:
        return {name: {"error": f"no response within {_PROBE_SECONDS:g} seconds"} for name in ("npu", "gpu", "cpu")}
    try:
        return json.loads(printed.splitlines()[-1])
    except (IndexError, ValueError):
        return {name: {"error": "the process that loaded the plugins died"} for name in ("npu", "gpu", "cpu")}


def _openvino(plugins: dict[str, dict[str, str]]) -> Iterator[Finding]:
    yield Finding(topic="openvino", level="ok", text=f"OpenVINO {importlib.metadata.version('openvino')}")
    for name, plugin in plugins.items():
        if plugin.get("name"):
            yield Finding(topic="openvino", level="ok", text=f"{name}: {plugin['name']}")
            continue
        level = "problem" if name == "cpu" or not TARGETS[name].missing() else "note"
        reason = first_line(plugin["error"]) if "error" in plugin else "its plugin loads but finds no device"
        yield Finding(topic="openvino", level=level, text=f"{name} cannot be used: {reason}")
