"""Which devices there are: the rules of a kind (shapes, isolation, precision, exactness) apart from OpenVINO's own name for it.

A kind is what the code obeys; so `npu-sim`, which is kind npu over the CPU plugin, runs the very code of an NPU.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from npu_proxy.errors import SettingsError
from npu_proxy.graph.packed import CPU, NATIVE, Style


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The rules of a kind.

    isolated: it runs in a process of its own, because its driver can hang or crash. static: it takes static shapes only,
    one compiled graph a shape. least_cosine: what certification asks for against fp32 on the CPU, by precision.
    """

    name: str
    isolated: bool
    static: bool
    style: Style
    least_cosine: Mapping[str, float] = field(default_factory=dict[str, float])


_CPU = Kind(name="cpu", isolated=False, static=False, style=CPU)
_ACCELERATED: Mapping[str, float] = {"fp32": 0.999, "fp16": 0.999, "int8": 0.98}  # they compute in fp16 whatever is stored
_GPU = Kind(name="gpu", isolated=True, static=True, style=NATIVE, least_cosine=_ACCELERATED)
_NPU = Kind(name="npu", isolated=True, static=True, style=NATIVE, least_cosine=_ACCELERATED)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A device as users name it: its kind, OpenVINO's name for it, and where this system shows that it is there.

    nodes: glob patterns of device files (Linux), any of which must exist; none: no such sign, ask OpenVINO.
    plugin: a plugin library to register under ``openvino`` first. properties: asked for where the plugin lists them.
    hints: the arithmetic to ask for, by precision; an NPU has only one.
    """

    name: str
    kind: Kind
    openvino: str
    nodes: tuple[str, ...] = ()
    plugin: str = ""
    properties: Mapping[str, object] = field(default_factory=dict[str, object])
    hints: Mapping[str, str] = field(default_factory=dict[str, str])
    cure: str = ""
    """What to do when the system does not show it."""
    reload: str = "its log lines above say why"
    """What the operator can do when restarting the worker process does not help."""

    def asked(self, precision: str, properties: Mapping[str, object]) -> dict[str, object]:
        """All properties to ask for, ``properties`` first."""
        hint = {"INFERENCE_PRECISION_HINT": self.hints[precision]} if precision in self.hints else {}
        return {**self.properties, **hint, **properties}

    def missing(self) -> str:
        """Why this system cannot have the device, or ''. Costs a look at the file system only."""
        if not self.nodes or not sys.platform.startswith("linux") or any(any(Path("/").glob(node)) for node in self.nodes):
            return ""
        return f"there is no /{self.nodes[0]}; {self.cure}"


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
            nodes=("dev/dri/renderD*",),
            hints={"fp32": "f32", "fp16": "f16", "int8": "f16"},
            cure="no graphics driver is loaded",
            reload="reload its driver or restart the machine, see `npu-proxy doctor`",
        ),
        Target(
            name="npu",
            kind=_NPU,
            openvino="NPU",
            nodes=("dev/accel/accel*",),
            cure="load the driver with `modprobe intel_vpu`; `npu-proxy doctor` says more",
            reload="reload its driver: `modprobe -r intel_vpu && modprobe intel_vpu`, see `npu-proxy doctor`",
        ),
        Target(
            name="npu-sim",
            kind=_NPU,
            openvino="NPUSIM_CPU",  # the plugin insists on CPU in the name
            plugin="openvino_intel_cpu_plugin",
            properties=_ON_CPU,
            hints=_CPU_HINTS,
        ),
    )
}
"""Devices by the names of the setting `device`."""

ANY = "any"
"""The platform of a device that has only one."""

AUTO = ("npu", "gpu", "cpu")
"""The chain of `auto`."""

EXPORTED: Mapping[str, tuple[str, str]] = {
    "ir": ("ir_file", "openvino/openvino_model.xml"),
    "onnx": ("onnx_file", "onnx/model.onnx"),
}
"""Devices that run a graph file of the model's repository: the setting that names the file, and what it usually is."""

ALONE = ("debug", *EXPORTED)
"""Devices that are never part of a chain: other vectors, or another copy of the model."""


def normalized(device: str) -> str:
    """The setting `device` in lower case and without spaces."""
    return ",".join(name.strip().lower() for name in device.split(",") if name.strip())


def chain(device: str) -> list[str]:
    """The devices that the setting `device` means, in order. Raises SettingsError naming what is wrong."""
    names = normalized(device).split(",") if normalized(device) else []
    if names == ["auto"]:
        return [name for name in AUTO if not TARGETS[name].missing()]
    known = ("auto", *TARGETS, *ALONE)
    for name in names:
        if name not in known:
            raise SettingsError(f"`device` names `{name}`; known: {', '.join(known)}", param="device")
        if name in ("auto", *ALONE) and len(names) > 1:
            raise SettingsError(f"`device` names `{name}` in a chain; it can only stand alone", param="device")
    if not names or len(set(names)) < len(names):
        raise SettingsError("`device` must name each device once, such as `npu,gpu,cpu`", param="device")
    if "cpu" in names[:-1]:
        raise SettingsError("`device` names devices behind `cpu`, which always answers; put it last", param="device")
    return names


def supported(wanted: Mapping[str, object], listed: Collection[str]) -> dict[str, object]:
    """The properties a plugin lists: an unknown one would raise."""
    return {name: value for name, value in wanted.items() if name in listed}
