"""Faults injected on demand into the real graph and the real plugin, for tests and for demonstrating failover.

An operation after the last layer reads a word of the memory that the worker shares with its owner, and acts on it. A graph
contains it only if the WorkerTask has ``faults=True``; no setting does that.
"""

from __future__ import annotations

import os
import time
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset15 as op


class Fault(IntEnum):
    """What the operation does to the next batch, or what happens in the next compilation."""

    NONE = 0
    ERROR = 1
    """Fail once, with a message that classify_failure does not recognize."""
    LOST = 2
    """Fail as if the device had fallen off its bus."""
    NAN = 3
    """Return NaN once."""
    CRASH = 4
    """Abort the process, as native code might."""
    HANG = 5
    """Never return."""
    SLOW = 6
    """Take three seconds, once."""
    WRONG = 7
    """Return wrong vectors for every batch."""
    COMPILE_FAIL = 8
    COMPILE_HANG = 9


SLOW_SECONDS = 3.0
_LASTING = {Fault.WRONG, Fault.COMPILE_FAIL, Fault.COMPILE_HANG}

_Model: Any = ov.Model
_Op: Any = ov.Op


class _Faulty(_Op):
    """The identity, or the fault in the control word."""

    def __init__(self, inputs: Any = None, control: npt.NDArray[np.uint64] | None = None) -> None:
        super().__init__(self, inputs)
        self._control = control
        self.constructor_validate_and_infer_types()

    def validate_and_infer_types(self) -> None:
        self.set_output_type(0, self.get_input_element_type(0), self.get_input_partial_shape(0))

    def clone_with_new_inputs(self, inputs: Any) -> _Faulty:
        return _Faulty(inputs, self._control)

    def has_evaluate(self) -> bool:
        return True

    def evaluate(self, outputs: Any, inputs: Any) -> bool:
        inputs[0].copy_to(outputs[0])
        assert self._control is not None
        fault = Fault(int(self._control[1]))
        if fault and fault not in _LASTING:
            self._control[1] = 0
        match fault:
            case Fault.ERROR:
                raise RuntimeError("injected: an error of unknown kind")
            case Fault.LOST:
                raise RuntimeError("injected: L0 zeFenceHostSynchronize result: ZE_RESULT_ERROR_DEVICE_LOST, code 0x70000001")
            case Fault.NAN:
                outputs[0].data[:] = np.nan
            case Fault.WRONG:
                outputs[0].data[:] = outputs[0].data[..., ::-1].copy()
            case Fault.CRASH:
                os.abort()
            case Fault.HANG:
                time.sleep(3600)  # ends with the process
            case Fault.SLOW:
                time.sleep(SLOW_SECONDS)
            case _:
                pass
        return True


def with_faults(model: ov.Model, control: npt.NDArray[np.uint64]) -> ov.Model:
    """The same model with the operation after its last layer. Compilation faults happen here."""
    match Fault(int(control[1])):
        case Fault.COMPILE_FAIL:
            raise RuntimeError("injected: Compilation failed: StopLocationVerifierPass")
        case Fault.COMPILE_HANG:
            time.sleep(3600)  # ends with the process
        case _:
            pass
    source = model.outputs[0].get_node().input_value(0)
    result = op.result(_Faulty([source], control).output(0))
    result.output(0).set_names(model.outputs[0].get_names())
    faulty: ov.Model = _Model([result], model.get_parameters(), model.get_friendly_name())
    return faulty
