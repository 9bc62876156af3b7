"""The faults, each as a function of a running load that returns when the fault is over."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from load import Load, accelerator

from npu_proxy import Engine
from npu_proxy.devices.worker.faults import SLOW_SECONDS, Fault


def pid(engine: Engine) -> int:
    found = accelerator(engine).reports()[0].worker_pid
    assert found is not None
    return found


def killed_ten_times(engine: Engine, load: Load) -> None:
    for _ in range(10):
        load.wait_back()
        load.wait_for(200)
        os.kill(pid(engine), signal.SIGKILL)
        load.wait_down()


def stopped(engine: Engine, load: Load) -> None:
    os.kill(pid(engine), signal.SIGSTOP)
    load.wait_down()


def injected(*faults: Fault) -> Callable[[Engine, Load], None]:
    def case(engine: Engine, load: Load) -> None:
        for fault in faults:
            accelerator(engine).inject(fault)
            if fault not in (Fault.COMPILE_FAIL, Fault.COMPILE_HANG):
                load.wait_down()

    return case


def three_errors(engine: Engine, load: Load) -> None:
    for _ in range(3):
        accelerator(engine).inject(Fault.ERROR)
        load.wait_for(100)


def broken_compiler(fault: Fault) -> Callable[[Engine, Load], None]:
    """The worker dies, and compiling the model again fails as well, once."""

    def case(engine: Engine, load: Load) -> None:
        accelerator(engine).inject(fault)  # happens at the next compilation
        os.kill(pid(engine), signal.SIGKILL)
        load.wait_down()

    return case


def slow_first(engine: Engine, load: Load) -> None:
    """One inference takes three seconds; where that is beyond `row_timeout`, the worker is restarted."""
    accelerator(engine).inject(Fault.SLOW)
    load.wait_down(SLOW_SECONDS + 0.5)


CASES: dict[str, Callable[[Engine, Load], None]] = {
    "killed ten times": killed_ten_times,
    "stopped (SIGSTOP)": stopped,
    "native crash": injected(Fault.CRASH),
    "hangs in the batch": injected(Fault.HANG),
    "NaN": injected(Fault.NAN),
    "device lost": injected(Fault.LOST),
    "three errors": three_errors,
    "compiler fails": broken_compiler(Fault.COMPILE_FAIL),
    "compiler hangs": broken_compiler(Fault.COMPILE_HANG),
    "slow first inference": slow_first,
    "a slot with other weights": injected(Fault.SLOT_WEIGHTS),
    "one bit of a weight flipped": injected(Fault.SLOT_BIT),
    "weights beyond half precision": injected(Fault.SLOT_OVERFLOW),
    "a slot leaves its output stale": injected(Fault.SLOT_STALE),
    "a slot wrong now and then": injected(Fault.SLOT_SOMETIMES),
    "outputs of two slots exchanged": injected(Fault.SWAPPED),
    "outputs of a bin shifted": injected(Fault.SHIFTED),
}
