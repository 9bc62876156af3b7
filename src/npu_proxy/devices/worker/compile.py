"""The static graphs of an accelerator, one per batch shape, compiled by its plugin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openvino as ov

from npu_proxy.batch import BatchShape, GraphShape
from npu_proxy.devices.graphs import Graphs
from npu_proxy.devices.worker.blobs import import_blob, stored_blobs
from npu_proxy.devices.worker.compile_cache import CompileCache
from npu_proxy.devices.worker.faults import with_faults
from npu_proxy.spec import ModelSpec
from npu_proxy.targets import Target, supported


def compile_static(
    core: ov.Core,
    target: Target,
    spec: ModelSpec,
    shapes: Sequence[BatchShape],
    properties: Mapping[str, object],
    *,
    cache: CompileCache | None = None,
    store: Path | None = None,
    required: Mapping[str, object] | None = None,
    faults: npt.NDArray[np.uint64] | None = None,
) -> dict[BatchShape, ov.CompiledModel]:
    """Compile one static graph per batch shape, one after another, with those of ``properties`` that the plugin lists.

    cache: where OpenVINO keeps blobs; without it, or if its disk is full, each graph is compiled again. store: where to look
    for blobs compiled ahead of time. required: properties to set even if the plugin does not list them. faults: the control
    block of the shared memory; with it, the graph contains the operation of faults.py and is not cached.
    """
    listed = core.get_property(target.openvino, "SUPPORTED_PROPERTIES")
    wanted = {**supported({**target.requested(spec.precision, properties), **_npu_compiler()}, listed), **(required or {})}
    folder = None if cache is None or faults is not None else cache.folder(_versions(core, target))
    if folder is not None:
        core.set_property({"CACHE_DIR": str(folder)})
    graphs = Graphs(spec)
    models: dict[BatchShape, ov.CompiledModel] = {}
    for shape in shapes:
        blobs = stored_blobs(store, target, spec, shape) if store and faults is None else []
        imported = import_blob(core, target, blobs, wanted)
        if imported:
            models[shape] = imported
            continue
        model = graphs(GraphShape.static(shape), target.kind.style)
        if target.kind.static and model.is_dynamic():  # npu-sim's CPU plugin would accept it
            raise RuntimeError(f"the graph for batches of {shape} is dynamic; {target.name} accepts static shapes only")
        if faults is not None:
            model = with_faults(model, faults)
        try:
            models[shape] = core.compile_model(model, target.openvino, wanted)
        except RuntimeError:
            if folder is None:
                raise
            folder = None
            core.set_property({"CACHE_DIR": ""})  # a cache that cannot be read or written must not prevent serving
            models[shape] = core.compile_model(model, target.openvino, wanted)
    graphs.release()
    if cache is not None:
        cache.prune()
    return models


def _versions(core: ov.Core, target: Target) -> list[str]:
    """Everything that a blob depends on other than the graph."""
    versions = [ov.get_version(), target.name]
    for name in ("FULL_DEVICE_NAME", "NPU_DRIVER_VERSION", "NPU_COMPILER_VERSION", "GPU_DRIVER_VERSION"):
        try:
            versions.append(str(core.get_property(target.openvino, name)))
        except RuntimeError:  # not every plugin has every property
            continue
    return versions


def _npu_compiler() -> dict[str, object]:
    """Select the driver's NPU compiler if OpenVINO's package has none, as on Linux."""
    libraries = Path(ov.__file__).parent / "libs"
    return {} if any(libraries.glob("*npu_compiler_loader*")) else {"NPU_COMPILER_TYPE": "DRIVER"}
