"""The static graphs of an accelerator, one per batch shape, compiled by its plugin."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache as cached
from pathlib import Path
from typing import Any

import openvino as ov

from npu_proxy.batch import BatchShape, GraphShape
from npu_proxy.devices.failure import first_line
from npu_proxy.devices.graphs import Graphs
from npu_proxy.devices.worker.blobs import Blob, file_name, import_blob, stored_blobs, write_blob
from npu_proxy.devices.worker.compile_cache import CompileCache
from npu_proxy.spec import ModelSpec
from npu_proxy.targets import Target, supported
from npu_proxy.version import __version__

_log = logging.getLogger("npu_proxy.worker")


@dataclass(frozen=True)
class StaticGraphs:
    """Compiled graphs by batch shape. blobs: the memory of imported ones, which they need. unsaved: where to store new ones."""

    models: dict[BatchShape, ov.CompiledModel] = field(default_factory=dict[BatchShape, ov.CompiledModel])
    blobs: list[Blob] = field(default_factory=list[Blob])
    unsaved: dict[BatchShape, Path] = field(default_factory=dict[BatchShape, Path])

    def save(self, cache: CompileCache) -> None:
        """Store the graphs that were compiled. A full disk, or a plugin that cannot export, only costs time at the next start."""
        for shape, file in self.unsaved.items():
            if file.exists():  # another slot's graph is the same
                continue
            try:
                export: Callable[[], Any] = self.models[shape].export_model
                write_blob(file, export().getvalue())
            except (OSError, RuntimeError) as error:
                _log.debug("the compiled graph %s is not kept: %s", file.name, first_line(error))
        self.unsaved.clear()
        cache.prune()


def compile_static(
    core: ov.Core,
    target: Target,
    spec: ModelSpec,
    shapes: Sequence[BatchShape],
    properties: Mapping[str, object],
    *,
    cache: CompileCache | None = None,
    store: Path | None = None,
    fresh: bool = False,
    required: Mapping[str, object] | None = None,
    change: Callable[[ov.Model], None] | None = None,
) -> StaticGraphs:
    """Compile one static graph per batch shape, one after another, with those of ``properties`` that the plugin lists.

    cache, store: where to look for blobs compiled before or ahead of time. fresh: ignore them. required: properties to set even if
    the plugin does not list them. change: changes each graph, which is then neither read from the cache nor stored.
    """
    listed = core.get_property(target.openvino, "SUPPORTED_PROPERTIES")
    wanted = {**supported({**target.requested(spec.precision, properties), **_npu_compiler()}, listed), **(required or {})}
    folder = None if cache is None or change is not None else cache.folder(_versions(core, target, wanted))
    graphs, compiled = Graphs(spec), StaticGraphs()
    for shape in shapes:
        file = None if folder is None else folder / f"{spec.fingerprint}-{file_name(shape)}"
        stored = stored_blobs(store, target, spec, shape) if store and change is None else []
        imported = import_blob(core, target, [] if fresh else [*stored, *([file] if file else [])], wanted)
        if imported is not None:
            compiled.models[shape] = imported[0]
            compiled.blobs.append(imported[1])
            continue
        model = graphs(GraphShape.static(shape), target.kind.style)
        if target.kind.static and model.is_dynamic():  # npu-sim's CPU plugin would accept it
            raise RuntimeError(f"the graph for batches of {shape} is dynamic; {target.name} accepts static shapes only")
        if change is not None:
            change(model)
        compiled.models[shape] = core.compile_model(model, target.openvino, wanted)
        if file is not None:
            compiled.unsaved[shape] = file
    graphs.release()
    return compiled


def _versions(core: ov.Core, target: Target, properties: Mapping[str, object]) -> list[str]:
    """Everything that a blob depends on other than the model and the batch shape."""
    versions = [ov.get_version(), __version__, _graph_code(), target.name, repr(sorted(properties.items()))]
    for name in ("FULL_DEVICE_NAME", "NPU_DRIVER_VERSION", "NPU_COMPILER_VERSION", "GPU_DRIVER_VERSION"):
        try:
            versions.append(str(core.get_property(target.openvino, name)))
        except RuntimeError:  # not every plugin has every property
            continue
    return versions


@cached
def _graph_code() -> str:
    """A hash of the code that builds graphs, because it changes between releases too."""
    package = Path(__file__).parents[2]
    files = [package / "batch.py", *sorted((package / "graph").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _npu_compiler() -> dict[str, object]:
    """Select the driver's NPU compiler if OpenVINO's package has none, as on Linux."""
    libraries = Path(ov.__file__).parent / "libs"
    return {} if any(libraries.glob("*npu_compiler_loader*")) else {"NPU_COMPILER_TYPE": "DRIVER"}
