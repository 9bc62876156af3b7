"""From settings to the chain of devices that serves a model."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from npu_proxy.devices.accelerator import Accelerator, Plan
from npu_proxy.devices.base import Device, GoldenRow
from npu_proxy.devices.blobs import Blob, compile_ahead
from npu_proxy.devices.breaker import Policy
from npu_proxy.devices.cache import Cache
from npu_proxy.devices.certify import Certificates, Verdict
from npu_proxy.devices.exported import ExportedDevice, graph_file, with_file, with_graph
from npu_proxy.devices.fake import FakeDevice
from npu_proxy.devices.fallback import Fallback
from npu_proxy.devices.faults import Fault
from npu_proxy.devices.kinds import EXPORTED, TARGETS, chain
from npu_proxy.devices.openvino import OpenVinoCpu, available_threads
from npu_proxy.devices.process import Limits, Task
from npu_proxy.devices.profile import settled
from npu_proxy.devices.shapes import dynamic_shapes, static_shapes
from npu_proxy.errors import ModelError, UnavailableError
from npu_proxy.models.fingerprint import fingerprint
from npu_proxy.models.layout import read_spec
from npu_proxy.models.quantized import int8_spec
from npu_proxy.models.store import Store
from npu_proxy.settings import Settings
from npu_proxy.types import ModelSpec, Output, Pack

_LOOK_SECONDS = 0.05


def open_devices(
    settings: Settings, spec: ModelSpec, golden: GoldenRow, stopping: threading.Event, *, fault: Fault | None = None
) -> Fallback:
    """The chain that the setting `device` names, its accelerators compiling in the background.

    Returns once something can serve. Raises UnavailableError when nothing can or ``stopping`` is set first, DeviceError
    and ModelError when the model cannot be compiled. fault: for tests, what befalls the accelerators from
    the start; with any, they obey ``inject`` (devices/faults.py).
    """
    names = chain(settings.device)[: None if settings.fallback == "on" else 1]
    if names == ["debug"]:
        shapes = dynamic_shapes(spec.max_length, settings.row_tokens, packed=settings.packing)
        return Fallback([FakeDevice(name="debug", width=spec.width, shapes=shapes)], probe_every=0)
    if names[0] in EXPORTED:
        return Fallback([_exported(settings, spec, golden, names[0])], probe_every=settings.probe_interval)
    reference = _Reference(settings, spec, golden)
    certificates = Certificates(settings.store / "certificates")
    accelerators = [
        Accelerator(_plan(settings, spec, name, fault), golden, reference, certificates) for name in names if name != "cpu"
    ]
    devices: list[Device] = [*accelerators]
    try:
        if "cpu" in names:
            devices.append(reference.serving())
        else:
            _await_any(accelerators, 2 * settings.compile_timeout, stopping)
        return Fallback(devices, hedge=settings.hedge, probe_every=settings.probe_interval)
    except BaseException:
        for one in accelerators:
            one.close()
        raise


def _await_any(accelerators: Sequence[Accelerator], seconds: float, stopping: threading.Event) -> None:
    """Until one of them serves. Raises UnavailableError once none will, after ``seconds``, and when ``stopping`` is set."""
    end = time.monotonic() + seconds
    while not any(one.ready for one in accelerators):
        if all(one.settle(0) for one in accelerators) or time.monotonic() > end or stopping.wait(_LOOK_SECONDS):
            reasons = "; ".join(f"{one.name}: {one.reason}" for one in accelerators)
            raise UnavailableError(f"no device can serve: {reasons}. Add `cpu` to `device`, or see `npu-proxy doctor`")


def certify(settings: Settings, spec: ModelSpec, golden: GoldenRow, name: str) -> tuple[list[Verdict], str]:
    """Judge one accelerator anew, whatever was found before: its verdicts by shape, and why it cannot serve ('' if it can)."""
    certificates = Certificates(settings.store / "certificates", anew=True)
    device = Accelerator(_plan(settings, spec, name), golden, _Reference(settings, spec, golden), certificates)
    try:
        device.settle(2 * settings.compile_timeout)
        return certificates.found, "" if device.ready else device.reason
    finally:
        device.close()


def compile_blobs(settings: Settings, spec: ModelSpec, name: str, platform: str) -> tuple[Path, list[Blob]]:
    """Compile a model's rows ahead of time for a device, or for another machine's (``platform``). Raises DeviceError."""
    plan = _plan(settings, spec, name)
    limit = settings.compile_timeout * len(plan.shapes)
    task = plan.task
    return compile_ahead(settings.store, task.target, spec, plan.shapes, task.properties, platform, seconds=limit)


def _exported(settings: Settings, spec: ModelSpec, golden: GoldenRow, name: str) -> Device:
    threads, file = settings.threads or available_threads(), spec.folder / graph_file(settings, name)
    return ExportedDevice(spec, name, file, threads=threads, row_tokens=settings.row_tokens, golden=golden)


def served(settings: Settings) -> tuple[Settings, ModelSpec]:
    """The settings with nothing left open, and the spec of what they serve. Raises ModelError and ModelNotFoundError."""
    name, folder = Store(settings.store).resolve(settings.model[0])
    spec = read_spec(folder, name=name, pooling=settings.pooling, max_length=settings.max_length)
    settings = settled(settings, spec)
    return settings, served_spec(settings, spec)


def served_spec(settings: Settings, spec: ModelSpec) -> ModelSpec:
    """The spec of what the settings `device` and `precision` compute from, with its fingerprint. Raises ModelError."""
    if settings.device in EXPORTED:
        return with_file(settings, spec)
    if spec.refused and settings.device != "debug":
        there = with_graph(settings, spec.folder)
        ways = " or ".join(f"`device` {name} with `{setting}`" for name, (setting, _) in EXPORTED.items())
        cure = f"set `device` to {there[0]}, or leave it out" if there else f"it brings a graph file under another name, for {ways}"
        raise ModelError(f"{spec.name} cannot be served by `device` {settings.device}: {cure} ({spec.refused})")
    if settings.precision == "int8":
        spec = int8_spec(settings.store, spec)
    if settings.precision == "fp16":
        spec = replace(spec, precision="fp16", fingerprint=fingerprint(spec, precision="fp16"))
    return replace(spec, fingerprint=f"debug-{spec.fingerprint}"[:16]) if settings.device == "debug" else spec


def _plan(settings: Settings, spec: ModelSpec, name: str, fault: Fault | None = None) -> Plan:
    target = TARGETS[name]
    properties: dict[str, object] = {
        "PERFORMANCE_HINT": settings.hint.upper(),
        "INFERENCE_NUM_THREADS": settings.threads or available_threads(),
    }
    cache = Cache(root=settings.compile_cache, limit=settings.compile_cache_mb * 1_000_000) if settings.compile_cache_mb else None
    longest = spec.max_length
    if settings.fallback == "on" and "cpu" in chain(settings.device):
        longest = min(longest, settings.accelerator_tokens)
    return Plan(
        task=Task(target=target, spec=spec, properties=properties, cache=cache, store=settings.store, faults=fault is not None),
        shapes=static_shapes(longest, settings.row_tokens, packed=settings.packing),
        limits=Limits(compile=settings.compile_timeout, row=settings.row_timeout, heartbeat=settings.heartbeat_timeout),
        streams=settings.requests,
        first_fault=fault or Fault.NONE,
        policy=Policy(
            failures=settings.breaker_failures,
            window=settings.breaker_window,
            first=settings.breaker_backoff,
            longest=max(settings.breaker_backoff, settings.breaker_longest),
        ),
    )


def _cpu(settings: Settings, spec: ModelSpec, golden: GoldenRow) -> OpenVinoCpu:
    return OpenVinoCpu(
        spec,
        threads=settings.threads,
        streams=settings.streams,
        row_tokens=settings.row_tokens,
        packed=settings.packing,
        golden=golden,
    )


@dataclass
class _Reference:
    """fp32 vectors from the CPU for certification: the chain's own CPU, or one made when it is needed."""

    settings: Settings
    spec: ModelSpec
    golden: GoldenRow

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._device: OpenVinoCpu | None = None

    def serving(self) -> OpenVinoCpu:
        """The chain's CPU, which is the reference as well when it computes in fp32."""
        with self._lock:
            device = _cpu(self.settings, self.spec, self.golden)
            self._device = device if self.spec.precision == "fp32" else None
            return device

    def __call__(self, row: Pack) -> Output:
        """The row's vectors."""
        with self._lock:
            if self._device is None:
                self._device = _cpu(self.settings, replace(self.spec, precision="fp32", graph=None), self.golden)
        return self._device.infer(row)
