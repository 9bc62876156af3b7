"""Opens OpenVINO's core, and makes the first calls into its bindings in one thread."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset15 as op

from npu_proxy.targets import Target

_warming = threading.Lock()


def open_core(target: Target) -> ov.Core:
    """Create a Core with the target's plugin registered. Raises RuntimeError, as all of OpenVINO does.

    It reads graph files into memory of its own: a file that is cut short while it is mapped ends the process (SIGBUS).
    """
    warm_bindings()
    core = ov.Core()
    core.set_property({"ENABLE_MMAP": False})
    if target.plugin:
        core.register_plugin(target.plugin, target.openvino)
    return core


def warm_bindings() -> None:
    """Call every method of the bindings that serving uses, once per process, in one thread; later calls return at once.

    When two threads make their first calls at the same time, OpenVINO's Python bindings may wait for each other while one of them
    holds Python's lock; then the whole process stands still (docs/openvino-races.md).
    """
    with _warming:
        _warm_bindings()


@cache
def _warm_bindings() -> None:
    parameter: Any = op.parameter([1, 4], np.float32, name="x")
    model_class: Any = ov.Model
    model = model_class([op.relu(parameter)], [parameter], "warm")
    compiled = ov.Core().compile_model(model, "CPU", {"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": 1})
    compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
    x, out = np.zeros([1, 4], np.float32), np.empty([1, 4], np.float32)
    request: Any = compiled.create_infer_request()
    request.set_tensor(compiled.inputs[0], ov.Tensor(x, shared_memory=True))
    request.set_output_tensor(ov.Tensor(out, shared_memory=True))
    request.infer()
    np.array(request.infer([x], share_inputs=True)[0])
    np.array(request.infer({0: x})[0])
    np.array(request.get_output_tensor(0).data)
    np.array(request.get_tensor(compiled.outputs[0]).data)
    np.array(compiled(x)[0])
    exported: Any = compiled.export_model()
    blob = np.frombuffer(bytearray(exported.getvalue()), np.uint8)
    import_model: Any = ov.Core().import_model
    import_model(ov.Tensor(blob, shared_memory=True), "CPU", {"NUM_STREAMS": 1})
