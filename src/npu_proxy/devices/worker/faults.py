"""Faults injected on demand into a worker, for tests and for demonstrating failover and canaries.

A word of the memory that the worker shares with its owner says which fault is on. A worker obeys it only if its WorkerTask has
``faults=True``; no setting does that.
"""

from __future__ import annotations

import os
import threading
import time
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov


class Fault(IntEnum):
    """What happens to the next batch, to batches from now on, or in the next compilation."""

    NONE = 0
    ERROR = 1
    """Fail once, with a message that classify_failure does not recognize."""
    LOST = 2
    """Fail once as if the device had fallen off its bus."""
    NAN = 3
    """Return NaN once."""
    CRASH = 4
    """Abort the process, as native code might."""
    HANG = 5
    """Never return."""
    SLOW = 6
    """Take three seconds, once."""
    WRONG = 7
    """Return wrong vectors for every batch, also after compiling again."""
    COMPILE_FAIL = 8
    COMPILE_HANG = 9

    # Until the graphs are compiled again; those of a slot are in slot 0.
    SLOT_WEIGHTS = 10
    """A slot's graph has the weights of two layers exchanged."""
    SLOT_BIT = 11
    """One bit is flipped in one weight of a slot's graph: the highest of an exponent."""
    SLOT_OVERFLOW = 12
    """The weights of one layer of a slot's graph are too large by a factor of 10,000, as if half precision had overflowed."""
    SLOT_STALE = 13
    """A slot reports success without having written its output, for every other batch."""
    SLOT_SOMETIMES = 14
    """A slot returns wrong vectors for one in ten batches."""
    SLOT_AT_START = 15
    """As SLOT_WEIGHTS, but from the first compilation on, and until a slot is compiled again on its own."""
    SWAPPED = 16
    """Two slots exchange their outputs."""
    SHIFTED = 17
    """The outputs of one bin of each batch are one segment (or token) too far."""


SLOW_SECONDS = 3.0
_SWAP_SECONDS = 0.5
_LASTING = frozenset(Fault) - {Fault.ERROR, Fault.LOST, Fault.NAN, Fault.CRASH, Fault.HANG, Fault.SLOW}
_UNTIL_COMPILED = frozenset(Fault(number) for number in range(Fault.SLOT_WEIGHTS, len(Fault)))
_DAMAGED = frozenset({Fault.SLOT_WEIGHTS, Fault.SLOT_BIT, Fault.SLOT_OVERFLOW})
_SLOT = 0
"""The slot that the faults of a slot are in."""


class Faults:
    """Makes the faults of one worker happen. ``control[1]`` is the fault that is on."""

    def __init__(self, control: npt.NDArray[np.uint64]) -> None:
        self._control = control
        self._counts: dict[int, int] = {}
        self._partner: npt.NDArray[np.float32] | None = None
        self._exchange = threading.Condition()

    @property
    def _on(self) -> Fault:
        return Fault(int(self._control[1]))

    def compiling(self, *, slot: int | None = None) -> None:
        """Called before compiling all slots, or one slot on its own."""
        match self._on:
            case Fault.COMPILE_FAIL:
                raise RuntimeError("injected: Compilation failed: StopLocationVerifierPass")
            case Fault.COMPILE_HANG:
                time.sleep(3600)  # ends with the process
            case fault if fault in _UNTIL_COMPILED and (fault is not Fault.SLOT_AT_START or slot is not None):
                self._control[1] = Fault.NONE
            case _:
                pass

    def damages(self, slot: int) -> Fault:
        """The fault of a slot's weights, which the worker compiles into a graph; NONE if it has none."""
        fault = Fault.SLOT_WEIGHTS if self._on is Fault.SLOT_AT_START else self._on
        return fault if slot == _SLOT and fault in _DAMAGED else Fault.NONE

    def before(self, slot: int) -> bool:
        """Called before an inference. Returns whether the inference shall run."""
        self._counts[slot] = self._counts.get(slot, 0) + 1
        fault = self._on
        if fault and fault not in _LASTING:
            self._control[1] = Fault.NONE
        match fault:
            case Fault.ERROR:
                raise RuntimeError("injected: an error of unknown kind")
            case Fault.LOST:
                raise RuntimeError("injected: L0 zeFenceHostSynchronize result: ZE_RESULT_ERROR_DEVICE_LOST, code 0x70000001")
            case Fault.CRASH:
                os.abort()
            case Fault.HANG:
                time.sleep(3600)  # ends with the process
            case Fault.SLOW:
                time.sleep(SLOW_SECONDS)
            case Fault.NAN:
                return False  # the owner has filled the output with NaN
            case Fault.SLOT_STALE:
                return slot != _SLOT or self._counts[slot] % 2 == 0
            case _:
                pass
        return True

    def after(self, slot: int, output: npt.NDArray[np.float32]) -> None:
        """Called after an inference, with the output that it has written."""
        count = self._counts[slot]
        match self._on:
            case Fault.WRONG:
                output[:] = output[..., ::-1].copy()
            case Fault.SLOT_SOMETIMES if slot == _SLOT and count % 10 == 0:
                output[:] = output[..., ::-1].copy()
            case Fault.SHIFTED:
                bin = count % len(output)
                output[bin] = np.roll(output[bin], 1, axis=0)
            case Fault.SWAPPED:
                self._swap(output)
            case _:
                pass

    def _swap(self, output: npt.NDArray[np.float32]) -> None:
        """Exchange the output with that of another slot, if one has the same shape and is done soon."""
        with self._exchange:
            other = self._partner
            if other is not None and other.shape == output.shape:
                other[:], output[:] = output.copy(), other.copy()
                self._partner = None
                self._exchange.notify_all()
            elif other is None:
                self._partner = output
                self._exchange.wait_for(lambda: self._partner is not output, timeout=_SWAP_SECONDS)
                if self._partner is output:
                    self._partner = None


def damage(model: ov.Model, fault: Fault) -> None:
    """Change the weights of a graph, in place, as a fault says."""
    layers: list[Any] = [
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() == "MatMul" and node.input_value(1).get_node().get_type_name() == "Constant"
    ]
    first = layers[len(layers) // 2]
    weights = _weights(first)
    match fault:
        case Fault.SLOT_WEIGHTS:
            second = next(layer for layer in reversed(layers) if layer is not first and _weights(layer).shape == weights.shape)
            mine, other = first.input_value(1), second.input_value(1)
            first.input(1).replace_source_output(other)
            second.input(1).replace_source_output(mine)
        case Fault.SLOT_BIT:
            bits = weights.copy()
            flat = bits.reshape(-1)
            flat.view(np.uint32 if bits.dtype == np.float32 else np.uint16)[len(flat) // 2] ^= (
                1 << 30 if bits.dtype == np.float32 else 1 << 14
            )
            first.input(1).replace_source_output(_constant(bits))
        case _:
            first.input(1).replace_source_output(_constant(weights * weights.dtype.type(1e4)))


def _weights(layer: Any) -> npt.NDArray[Any]:
    weights: npt.NDArray[Any] = layer.input_value(1).get_node().data
    return weights


def _constant(weights: npt.NDArray[Any]) -> Any:
    from openvino import opset15

    constant: Any = opset15.constant(weights)
    return constant.output(0)
