"""The CPU's slots: examined against each other, compiled again when one is wrong, left out when that does not help."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from conftest import golden, smallest_cosine
from npu_proxy.batch import Batch, text_outputs
from npu_proxy.devices.cpu import OpenVinoCpu
from npu_proxy.engine.golden import GoldenBatches
from npu_proxy.engine.packing import pack, plan_batch
from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.errors import DeviceError
from npu_proxy.models.layout import read_spec

FOLDER, TEXTS, VECTORS = golden("mean")
SPEC = read_spec(FOLDER)
TOKENIZER = RequestTokenizer(SPEC)
GOLDEN = GoldenBatches(TOKENIZER, SPEC)
TOKENS = 128
"""Positions of a full batch: two bins of 64, which the model's limit of 48 allows."""


class Disturbed:
    """An infer request whose output a function changes afterwards."""

    def __init__(self, infer_request: Any, change: Callable[[np.ndarray], None]) -> None:
        self._request, self._change = infer_request, change

    def set_output_tensor(self, tensor: Any) -> None:
        self._output = tensor
        self._request.set_output_tensor(tensor)

    def infer(self, *arguments: Any, **options: Any) -> None:
        self._request.infer(*arguments, **options)
        self._change(self._output.data)


def backwards(output: np.ndarray) -> None:
    output[:] = output[..., ::-1].copy()


def device(**options: Any) -> OpenVinoCpu:
    cpu = OpenVinoCpu(SPEC, **{"threads": 2, "streams": 2, "batch_tokens": TOKENS, "golden": GOLDEN, **options})
    cpu._growth.join(30)
    return cpu


def disturb(cpu: OpenVinoCpu, *names: str, change: Callable[[np.ndarray], None] = backwards) -> None:
    for slot in cpu._slots:
        if slot.name in names:
            slot.infer_request = Disturbed(slot.infer_request, change)


def batch_of(cpu: OpenVinoCpu, count: int, turn: int | None = 0) -> Batch:
    encodings = TOKENIZER.plain([TEXTS[number % len(TEXTS)] for number in range(count)])
    plan = plan_batch([encoding.tokens for encoding in encodings], cpu.shapes, canary_tokens=3)
    return pack(encodings, plan, SPEC.batch_layout, canaries=GOLDEN.canaries, turn=turn)


def check_right(batch: Batch, cpu: OpenVinoCpu) -> None:
    own = {encoding.key: vector for encoding, vector in zip(TOKENIZER.plain(TEXTS), VECTORS, strict=True)}
    output = cpu.submit(batch).result(30)
    assert smallest_cosine(text_outputs(batch, output.vectors), np.stack([own[text.key] for text in batch.encodings])) > 0.9999


def test_all_slots_agree_and_serve() -> None:
    cpu = device()
    assert [slot.name for slot in cpu._slots] == ["small", "0", "1"]
    for count in (1, 3, 30):
        check_right(batch_of(cpu, count), cpu)
    report = cpu.reports()[0]
    assert (report.slots, report.guarded, report.canary_failures, report.reason) == (3, 3, 0, "")
    share = report.examined
    assert share is not None
    for _ in range(20):
        cpu.probe()
    assert cpu.reports()[0].examined == 1 > share
    cpu.close()


@pytest.mark.parametrize("name", ["small", "0"])
def test_a_wrong_slot_is_compiled_again_and_its_batch_computed_again(name: str) -> None:
    cpu = device(streams=1)
    disturb(cpu, name)
    for _ in range(4):
        for count in (1, 30):
            check_right(batch_of(cpu, count), cpu)
    report = cpu.reports()[0]
    assert (report.slots, report.canary_failures, report.state, report.reason) == (2, 1, "serving", "")
    cpu.close()


def test_without_canaries_the_examination_in_turn_finds_a_wrong_slot() -> None:
    cpu = device()
    disturb(cpu, "1")
    for _ in range(20):
        cpu.probe()
    for _ in range(6):
        check_right(batch_of(cpu, 30, None), cpu)
    cpu.close()


def test_two_different_computations_make_it_examine_every_slot() -> None:
    cpu = device()
    disturb(cpu, "0", "1")
    cpu.doubt("two computations differ")
    for _ in range(6):
        check_right(batch_of(cpu, 30, None), cpu)
    cpu.close()


def test_a_slot_that_stays_wrong_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = device()
    disturb(cpu, "1")
    disturbed = next(slot.infer_request for slot in cpu._slots if slot.name == "1")
    monkeypatch.setattr(cpu, "_compile", lambda graphs, **options: disturbed)
    for _ in range(4):
        check_right(batch_of(cpu, 30), cpu)
    report = cpu.reports()[0]
    assert (report.slots, report.state) == (2, "failing")
    assert "slot 1 was left out" in report.reason
    assert cpu.ready
    cpu.close()


def test_if_all_full_slots_are_left_out_the_small_one_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = device(streams=1)
    disturb(cpu, "0")
    monkeypatch.setattr(cpu, "_compile_again", lambda slot: None)
    for _ in range(3):
        check_right(batch_of(cpu, 30), cpu)
    assert cpu.reports()[0].slots == 1
    cpu.close()


def test_a_device_without_a_right_slot_fails_and_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = device()
    disturb(cpu, "small", "0", "1")
    monkeypatch.setattr(cpu, "_compile_again", lambda slot: None)
    for count in (30, 1, 1):
        with pytest.raises(DeviceError):
            cpu.submit(batch_of(cpu, count)).result(30)
    assert not cpu.ready
    cpu.close()


def test_one_that_is_wrong_from_the_start_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    original = OpenVinoCpu._compile

    def first_wrong(self: OpenVinoCpu, graphs: Any, **options: Any) -> Any:
        compiled.append("full" if options["full"] else "small")
        request = original(self, graphs, **options)
        return Disturbed(request, backwards) if len(compiled) == 2 else request

    monkeypatch.setattr(OpenVinoCpu, "_compile", first_wrong)
    cpu = device()
    assert compiled == ["small", "full", "small", "full", "full"]  # two differ, so both are compiled again, then the third
    for _ in range(4):
        check_right(batch_of(cpu, 30, None), cpu)
    cpu.close()


def test_a_slot_that_comes_later_is_examined_too(monkeypatch: pytest.MonkeyPatch) -> None:
    original = OpenVinoCpu._compile
    compiled: list[bool] = []

    def wrong_from_the_third(self: OpenVinoCpu, graphs: Any, **options: Any) -> Any:
        compiled.append(options["full"])
        request = original(self, graphs, **options)
        return Disturbed(request, backwards) if len(compiled) > 2 else request

    monkeypatch.setattr(OpenVinoCpu, "_compile", wrong_from_the_third)
    cpu = device(streams=3)
    assert (cpu.streams, cpu.max_streams) == (1, 3)
    report = cpu.reports()[0]
    assert report.slots == 2
    assert "left out" in report.reason
    check_right(batch_of(cpu, 30), cpu)
    cpu.close()


def test_slots_that_never_agree_do_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    original = OpenVinoCpu._compile
    rng = np.random.default_rng(0)

    def random(output: np.ndarray) -> None:
        output[:] = rng.standard_normal(output.shape)

    monkeypatch.setattr(
        OpenVinoCpu, "_compile", lambda self, graphs, **options: Disturbed(original(self, graphs, **options), random)
    )
    with pytest.raises(DeviceError, match="differently"):
        device()


def test_numbers_that_are_not_finite_do_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    original = OpenVinoCpu._compile

    def overflowing(output: np.ndarray) -> None:
        output[:] = np.inf

    monkeypatch.setattr(
        OpenVinoCpu, "_compile", lambda self, graphs, **options: Disturbed(original(self, graphs, **options), overflowing)
    )
    with pytest.raises(DeviceError, match="not finite"):
        device()


def test_what_is_not_written_is_not_a_vector() -> None:
    cpu = device(golden=None)

    class Idle(Disturbed):
        def infer(self, *arguments: Any, **options: Any) -> None:
            """Write nothing."""

    for slot in cpu._slots:
        slot.infer_request = Idle(slot.infer_request, backwards)
    assert np.isnan(cpu.submit(batch_of(cpu, 1, None)).result(30).vectors).all()
    cpu.close()


def test_a_model_whose_limit_allows_no_full_batch_has_two_slots_for_small_ones() -> None:
    cpu = OpenVinoCpu(
        replace(SPEC, max_length=24), threads=2, streams=1, golden=GoldenBatches(TOKENIZER, replace(SPEC, max_length=24))
    )
    assert [slot.full for slot in cpu._slots] == [False, False]
    cpu.probe()
    assert cpu.reports()[0].slots == 2
    cpu.close()
