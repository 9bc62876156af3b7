"""The CPU device: few shapes, few graphs, errors that stay DeviceErrors."""

import numpy as np
import pytest

from conftest import golden
from npu_proxy.batch import Batch, BatchShape
from npu_proxy.devices.cpu import OpenVinoCpu
from npu_proxy.devices.openvino import open_core
from npu_proxy.devices.worker.compile import compile_static
from npu_proxy.errors import DeviceError
from npu_proxy.models.layout import read_spec
from npu_proxy.system import available_threads
from npu_proxy.targets import TARGETS


def test_threads_are_those_this_process_may_use() -> None:
    import os

    assert 1 <= available_threads() <= (os.cpu_count() or 1)


def test_an_npu_takes_static_shapes_only() -> None:
    """The simulated one too: the processor behind it would compile a dynamic graph."""
    target = TARGETS["npu-sim"]
    core = open_core(target)
    spec = read_spec(golden("mean")[0])
    static = BatchShape(bins=1, positions=32, segments=4)
    compiled = compile_static(core, target, spec, [static], {"NPU_TURBO": True}).models[static]  # a property it does not list
    assert not compiled.input("input_ids").partial_shape.is_dynamic
    with pytest.raises(RuntimeError, match="static shapes only"):
        compile_static(core, target, spec, [BatchShape(bins=1, positions=32, segments=-1)], {})


def test_a_batch_that_does_not_fit_is_a_device_error_and_the_device_goes_on() -> None:
    device = OpenVinoCpu(read_spec(golden("mean")[0]), threads=1)
    assert device.streams == 1
    shape = device.shapes[0]
    assert isinstance(shape, BatchShape)
    good = {
        "input_ids": np.zeros((shape.bins, shape.positions), np.int32),
        "position_ids": np.zeros((shape.bins, shape.positions), np.int32),
        "segment_ids": np.zeros((shape.bins, shape.positions), np.int32),
        "pool": np.zeros((shape.bins, shape.segments, shape.positions), np.float32),
    }
    for _ in range(3):
        with pytest.raises(DeviceError, match="the CPU failed"):
            device.submit(Batch([], [], shape, good | {"input_ids": np.zeros((1, 2, 3), np.int32)})).result()
        assert device.submit(Batch([], [], shape, good)).result().vectors.shape == (shape.bins, shape.segments, 32)
