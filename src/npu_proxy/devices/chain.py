"""Builds the chain of devices that serves a model, from the settings."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from npu_proxy.batch import Batch, Output
from npu_proxy.devices.accelerator.accelerator import Accelerator, AcceleratorPlan
from npu_proxy.devices.accelerator.breaker import BreakerPolicy
from npu_proxy.devices.base import Device, GoldenBatch, InProcessDevice
from npu_proxy.devices.certify import Certificates, Verdict
from npu_proxy.devices.cpu import OpenVinoCpu
from npu_proxy.devices.exported import ExportedDevice
from npu_proxy.devices.fake import FakeDevice
from npu_proxy.devices.fallback import Fallback
from npu_proxy.devices.onnx_runtime import OnnxRuntime
from npu_proxy.devices.shapes import dynamic_shapes, full_batch_tokens, static_shapes
from npu_proxy.devices.watched import Watched, WatchPlan
from npu_proxy.devices.worker.compile_ahead import Blob, compile_ahead
from npu_proxy.devices.worker.compile_cache import CompileCache
from npu_proxy.devices.worker.faults import Fault
from npu_proxy.devices.worker.process import WorkerLimits, WorkerTask
from npu_proxy.errors import SettingsError, UnavailableError
from npu_proxy.models.graph_files import graph_file
from npu_proxy.settings import Settings
from npu_proxy.spec import ModelSpec
from npu_proxy.system import available_threads
from npu_proxy.targets import GRAPH_FILES, SECOND_RUNTIME, TARGETS, device_chain

_POLL_SECONDS = 0.05
_log = logging.getLogger("npu_proxy.devices")

_MOST_STREAMS_PER_THREAD = 4
"""More streams than this per CPU thread are taken for a mistake."""
_PATIENCE = 6
"""A batch may take this many times `row_timeout` on the CPU, which also computes the longest texts."""
_AGREEMENT = {"fp32": 0.998, "fp16": 0.998, "int8": 0.96}
"""The minimum cosine of two devices, each of which may differ from fp32 by what certification allows."""


def open_devices(
    settings: Settings, spec: ModelSpec, golden: GoldenBatch, stopping: threading.Event, *, fault: Fault | None = None
) -> Fallback:
    """Open the devices that the setting `device` names, as one chain. Accelerators compile in the background.

    Returns once a device can serve. Raises UnavailableError if none can or ``stopping`` is set first, DeviceError or ModelError
    if the model cannot be compiled. fault: for tests, the fault that the accelerators start with; unless it is None, further
    faults can be injected (worker/faults.py).
    """
    names = device_chain(settings.device)[: None if settings.fallback else 1]
    if names == ["debug"]:
        shapes = dynamic_shapes(spec.max_length, full_batch_tokens(settings), packed=settings.packing)
        return Fallback([FakeDevice(name="debug", width=spec.width, shapes=shapes, records=False)], probe_every=0)
    if len(names) == 1 and names[0] in GRAPH_FILES:
        exported = _watched(settings, spec, golden, lambda: _exported(settings, spec, golden, names[0]))
        return Fallback(
            [exported],
            probe_every=settings.probe_interval,
            verify_every=settings.verify_every,
            max_retries=settings.max_retries,
        )
    reference = _Reference(settings, spec, golden)
    certificates = Certificates(settings.store / "certificates")
    accelerators = [
        Accelerator(_plan(settings, spec, name, fault), golden, reference, certificates)
        for name in names
        if name not in ("cpu", SECOND_RUNTIME)
    ]
    by_name: dict[str, Device] = {accelerator.name: accelerator for accelerator in accelerators}
    try:
        if "cpu" in names:
            by_name["cpu"] = reference.serving()
        if SECOND_RUNTIME in names:
            by_name[SECOND_RUNTIME] = _second_runtime(settings, spec, golden, reference)
        if len(by_name) == len(accelerators):
            _await_any(accelerators, 2 * settings.compile_timeout, stopping)
        return Fallback(
            [by_name[name] for name in names],
            hedge=settings.hedge,
            probe_every=settings.probe_interval,
            verify_every=settings.verify_every,
            agreement=_AGREEMENT[spec.precision],
            max_retries=settings.max_retries,
        )
    except BaseException:
        for device in by_name.values():
            device.close()
        raise


def _await_any(accelerators: Sequence[Accelerator], seconds: float, stopping: threading.Event) -> None:
    """Wait until a device serves. Raises UnavailableError if all have failed, after ``seconds``, or if ``stopping`` is set."""
    end = time.monotonic() + seconds
    while not any(accelerator.ready for accelerator in accelerators):
        decided = all(accelerator.wait_decided(0) for accelerator in accelerators)
        if decided or time.monotonic() > end or stopping.wait(_POLL_SECONDS):
            reasons = "; ".join(f"{accelerator.name}: {accelerator.reason}" for accelerator in accelerators)
            raise UnavailableError(
                f"no device can serve: {reasons}. Add `cpu` to `device`, or run `npu-proxy doctor` to find out why"
            )


def certify(settings: Settings, spec: ModelSpec, golden: GoldenBatch, name: str) -> tuple[list[Verdict], str]:
    """Certify one accelerator, ignoring stored verdicts. Returns its verdicts, and why it cannot serve ("" if it can)."""
    certificates = Certificates(settings.store / "certificates", fresh=True)
    device = Accelerator(_plan(settings, spec, name), golden, _Reference(settings, spec, golden), certificates)
    try:
        device.wait_decided(2 * settings.compile_timeout)
        return certificates.found, "" if device.ready else device.reason
    finally:
        device.close()


def compile_blobs(settings: Settings, spec: ModelSpec, name: str, platform: str) -> tuple[Path, list[Blob]]:
    """Compile a model's batch shapes ahead of time for a device of this or another machine (``platform``). Raises DeviceError."""
    plan = _plan(settings, spec, name)
    limit = settings.compile_timeout * len(plan.shapes)
    task = plan.task
    return compile_ahead(settings.store, task.target, spec, plan.shapes, task.properties, platform, seconds=limit)


def _exported(settings: Settings, spec: ModelSpec, golden: GoldenBatch, name: str) -> InProcessDevice:
    threads, file = settings.threads or available_threads(), spec.folder / graph_file(settings, name)
    return ExportedDevice(spec, name, file, threads=threads, batch_tokens=full_batch_tokens(settings), golden=golden)


def _second_runtime(settings: Settings, spec: ModelSpec, golden: GoldenBatch, reference: _Reference) -> Device:
    """ONNX Runtime, once it computes golden texts as OpenVINO does. Raises DeviceError if it does not."""
    if spec.precision == "int8":
        raise SettingsError("device `onnx` in a chain has no int8; leave it out, or set `precision` to fp32", param="device")
    threads, tokens = settings.threads or available_threads(), full_batch_tokens(settings)
    fp32 = replace(spec, precision="fp32", graph=None)

    def make() -> InProcessDevice:
        return OnnxRuntime(fp32, threads=threads, batch_tokens=tokens, packed=settings.packing, golden=golden)

    return _watched(settings, fp32, golden, make, reference)


def _plan(settings: Settings, spec: ModelSpec, name: str, fault: Fault | None = None) -> AcceleratorPlan:
    target = TARGETS[name]
    properties: dict[str, object] = {
        "PERFORMANCE_HINT": settings.hint.upper(),
        "INFERENCE_NUM_THREADS": settings.threads or available_threads(),
    }
    limit = settings.compile_cache_mb * 1_000_000
    cache = CompileCache(root=settings.compile_cache, limit=limit) if limit else None
    longest = spec.max_length
    if settings.fallback and {"cpu", SECOND_RUNTIME} & set(device_chain(settings.device)):
        longest = min(longest, settings.accelerator_tokens)
    return AcceleratorPlan(
        task=WorkerTask(
            target=target,
            spec=spec,
            properties=properties,
            slots=settings.requests,
            cache=cache,
            store=settings.store,
            faults=fault is not None,
        ),
        shapes=static_shapes(longest, full_batch_tokens(settings), packed=settings.packing),
        limits=WorkerLimits(compile=settings.compile_timeout, batch=settings.row_timeout, heartbeat=settings.heartbeat_timeout),
        first_fault=fault or Fault.NONE,
        policy=_policy(settings),
    )


def _policy(settings: Settings) -> BreakerPolicy:
    return BreakerPolicy(
        failures=settings.breaker_failures,
        window=settings.breaker_window,
        first=settings.breaker_backoff,
        longest=max(settings.breaker_backoff, settings.breaker_longest),
    )


def _watched(
    settings: Settings,
    spec: ModelSpec,
    golden: GoldenBatch,
    make: Callable[[], InProcessDevice],
    reference: Callable[[Batch], Output] | None = None,
) -> Watched:
    """A device of this process behind a circuit breaker."""
    least = TARGETS["cpu"].kind.least_cosine[spec.precision]
    seconds = _PATIENCE * settings.row_timeout
    return Watched(
        WatchPlan(
            make=make,
            golden=golden,
            policy=_policy(settings),
            batch_seconds=seconds,
            least_cosine=least,
            reference=reference,
        )
    )


def _cpu(settings: Settings, spec: ModelSpec, golden: GoldenBatch) -> OpenVinoCpu:
    _check_streams(settings)
    return OpenVinoCpu(
        spec,
        threads=settings.threads,
        streams=settings.streams,
        batch_tokens=full_batch_tokens(settings),
        packed=settings.packing,
        golden=golden,
    )


def _check_streams(settings: Settings) -> None:
    """Warn of more streams than CPU threads, and raise SettingsError for far more: each is a compiled copy of the model."""
    threads, streams = settings.threads or available_threads(), settings.streams or 1
    if streams <= threads:
        return
    message = f"`streams` is {streams}, but there are {threads} CPU threads (`threads`); each stream is a copy of the model"
    if streams > _MOST_STREAMS_PER_THREAD * threads:
        raise SettingsError(f"{message}; set it to at most {_MOST_STREAMS_PER_THREAD * threads}", param="streams")
    _log.warning("%s, and those beyond the threads only wait", message)


@dataclass
class _Reference:
    """Computes batches in fp32 on the CPU for certification, on the chain's CPU device or on one created when needed."""

    settings: Settings
    spec: ModelSpec
    golden: GoldenBatch

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._device: Device | None = None

    def serving(self) -> Device:
        """The chain's CPU device, which is also the reference if it computes in fp32."""
        with self._lock:
            settings, spec, golden = self.settings, self.spec, self.golden
            device = _watched(settings, spec, golden, lambda: _cpu(settings, spec, golden))
            self._device = device if self.spec.precision == "fp32" else None
            return device

    def __call__(self, batch: Batch) -> Output:
        """Compute the batch. Raises DeviceError."""
        with self._lock:
            if self._device is None:
                self._device = _cpu(self.settings, replace(self.spec, precision="fp32", graph=None), self.golden)
        return self._device.submit(batch).result()
