"""The table of devices. The rules for a kind of device are separate from OpenVINO's name for the device.

All code depends on the kind only, so `npu-sim`, which is of kind npu but uses the CPU plugin, runs exactly the code of an NPU.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from npu_proxy.batch import CPU_STYLE, NATIVE_STYLE, GraphStyle
from npu_proxy.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class DeviceKind:
    """The rules for a kind of device.

    isolated: it runs in a separate process, because its driver can hang or crash. static: it takes static shapes only, with
    one compiled graph per shape. least_cosine: by precision, the minimum cosine of golden texts to fp32 on the CPU;
    for the CPU itself, to what its other slots computed.
    """

    name: str
    isolated: bool
    static: bool
    style: GraphStyle
    least_cosine: Mapping[str, float] = field(default_factory=dict[str, float])


_AGREEING: Mapping[str, float] = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.98}
_CPU = DeviceKind(name="cpu", isolated=False, static=False, style=CPU_STYLE, least_cosine=_AGREEING)
_ACCELERATED: Mapping[str, float] = {
    "fp32": 0.999,
    "fp16": 0.999,
    "int8": 0.98,
}  # they compute in fp16, however the weights are stored
_GPU = DeviceKind(name="gpu", isolated=True, static=True, style=NATIVE_STYLE, least_cosine=_ACCELERATED)
_NPU = DeviceKind(name="npu", isolated=True, static=True, style=NATIVE_STYLE, least_cosine=_ACCELERATED)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A device as users name it: its kind, OpenVINO's name for it, and how to tell whether this system has it.

    nodes: glob patterns of device files (Linux), one of which must exist; empty if only OpenVINO can tell. plugin: a plugin
    library to register under ``openvino`` first. properties: set if the plugin lists them. hints: the arithmetic to request,
    by precision; empty for an NPU, which has only one. graphs_per_slot: its plugin builds a graph per stream, and gives a batch
    to whichever stream is free; therefore each slot gets compiled graphs of its own, with one stream.
    """

    name: str
    kind: DeviceKind
    openvino: str
    graphs_per_slot: bool = False
    nodes: tuple[str, ...] = ()
    plugin: str = ""
    properties: Mapping[str, object] = field(default_factory=dict[str, object])
    hints: Mapping[str, str] = field(default_factory=dict[str, str])
    fix: str = ""
    """What to do if the system does not have it."""
    reload: str = "see its log lines above"
    """What the operator can do when restarting the worker process does not help."""

    def requested(self, precision: str, properties: Mapping[str, object]) -> dict[str, object]:
        """All properties to set; ``properties`` override the target's own."""
        hint = {"INFERENCE_PRECISION_HINT": self.hints[precision]} if precision in self.hints else {}
        return {**self.properties, **hint, **properties}

    def missing(self) -> str:
        """Why this system cannot have the device, or "". Checks the file system only."""
        if not self.nodes or not sys.platform.startswith("linux") or any(any(Path("/").glob(node)) for node in self.nodes):
            return ""
        return f"/{self.nodes[0]} does not exist; {self.fix}"


_ON_CPU = {"ENABLE_CPU_PINNING": False}  # the tokenizer and HTTP share its cores
_CPU_HINTS = {"fp32": "f32", "fp16": "f16", "int8": "f32"}
TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(name="cpu", kind=_CPU, openvino="CPU", properties=_ON_CPU, hints=_CPU_HINTS),
        Target(
            name="gpu",
            kind=_GPU,
            openvino="GPU",
            graphs_per_slot=True,
            nodes=("dev/dri/renderD*",),
            hints={"fp32": "f32", "fp16": "f16", "int8": "f16"},
            fix="no graphics driver is loaded",
            reload="reload its driver or restart the machine; see `npu-proxy doctor`",
        ),
        Target(
            name="npu",
            kind=_NPU,
            openvino="NPU",
            nodes=("dev/accel/accel*",),
            fix="load the driver with `modprobe intel_vpu`, or run `npu-proxy doctor` for details",
            reload="reload its driver: `modprobe -r intel_vpu && modprobe intel_vpu`; see `npu-proxy doctor`",
        ),
        Target(
            name="npu-sim",
            kind=_NPU,
            openvino="NPUSIM_CPU",  # the plugin requires CPU in the name
            graphs_per_slot=True,
            plugin="openvino_intel_cpu_plugin",
            properties=_ON_CPU,
            hints=_CPU_HINTS,
        ),
    )
}
"""Devices by their names in the setting `device`."""

ANY_PLATFORM = "any"
"""The platform of a device that has only one."""

AUTO = ("npu", "gpu", "cpu")
"""The chain that `auto` stands for."""

GRAPH_FILES: Mapping[str, tuple[str, str]] = {
    "ir": ("ir_file", "openvino/openvino_model.xml"),
    "onnx": ("onnx_file", "onnx/model.onnx"),
}
"""Devices that run a graph file from the model's repository: the setting that names the file, and its usual path."""

STANDALONE = ("debug", *GRAPH_FILES)
"""Devices whose vectors differ if they are used alone: they run another copy of the model, or no model."""

SECOND_RUNTIME = "onnx"
"""In a chain: the model's own graph in ONNX Runtime, with the same vectors as on the other devices (devices/onnx_runtime.py)."""


def normalize_device(device: str) -> str:
    """The setting `device` in lower case and without spaces."""
    return ",".join(name.strip().lower() for name in device.split(",") if name.strip())


def device_chain(device: str) -> list[str]:
    """The devices that the setting `device` names, in order. Raises SettingsError."""
    names = normalize_device(device).split(",") if normalize_device(device) else []
    if names == ["auto"]:
        return [name for name in AUTO if not TARGETS[name].missing()]
    known = ("auto", *TARGETS, *STANDALONE)
    for name in names:
        if name not in known:
            raise SettingsError(f"`device` names `{name}`, which is not a known device; known: {', '.join(known)}", param="device")
        if name in ("auto", *STANDALONE) and name != SECOND_RUNTIME and len(names) > 1:
            raise SettingsError(
                f"`device` names `{name}` together with other devices; `{name}` can only be used alone", param="device"
            )
    if not names or len(set(names)) < len(names):
        raise SettingsError("`device` must name each device once, for example `npu,gpu,cpu`", param="device")
    return names


def supported(wanted: Mapping[str, object], listed: Collection[str]) -> dict[str, object]:
    """The properties that a plugin lists; setting any other would raise an error."""
    return {name: value for name, value in wanted.items() if name in listed}
