"""Which device, precision, streams and row length embed fastest on this machine, measured side by side in one run.

Every candidate serves the same texts in every round, one after the other, so that a machine that slows down slows them
all; figures are ratios within a round. The slow ones leave early. What is not right is not used, however fast.
"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import openvino as ov

from npu_proxy.devices.exported import with_graph
from npu_proxy.devices.kinds import ALONE, TARGETS, chain
from npu_proxy.devices.openvino import available_threads
from npu_proxy.devices.profile import Choice, Profile, Trial, keep, machine
from npu_proxy.devices.shapes import ROW_TOKENS
from npu_proxy.engine.engine import Engine
from npu_proxy.engine.golden import GOLDEN_TEXTS
from npu_proxy.errors import InputError, ModelError, NpuProxyError, PullError, UnavailableError
from npu_proxy.models.layout import read_spec
from npu_proxy.models.quantized import int8_spec
from npu_proxy.models.store import Store
from npu_proxy.settings import Settings
from npu_proxy.types import ModelSpec

BASELINE = Choice(device="cpu", precision="fp32")
_ROW_LENGTHS = (256, ROW_TOKENS, 2 * ROW_TOKENS)
_CONTENDERS = 0.8
"""Share of the fastest one's speed, of the same device and precision, that keeps a candidate in for the next round."""
_LEAST_COSINE = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.98}
"""What the vectors' mean cosine to fp32 on the CPU must be; int8 has passed the guard of `quantize` besides, and an
accelerator its certification."""

Say = Callable[[str], None]
Vectors = npt.NDArray[np.float32]


def sample_texts(count: int, seed: int = 0) -> list[str]:
    """Texts whose lengths are spread as those of real corpora are: most short, some beyond every limit."""
    random = np.random.default_rng(seed)
    words = " ".join(GOLDEN_TEXTS[:10]).split()
    lengths = np.minimum(random.lognormal(3.4, 1.0, count).astype(int) + 1, 600)
    return [" ".join(random.choice(words, length)) for length in lengths]


def candidates(settings: Settings, spec: ModelSpec) -> Iterator[Choice]:
    """What there is to choose from: the settings' devices (`auto`: all that this machine has), each in all its ways."""
    names = [*chain(settings.device)]
    if settings.device == "auto":
        graphs = with_graph(settings, spec.folder)
        names += [name for name in graphs if name != "onnx" or importlib.util.find_spec("onnxruntime")]
    int8 = _has_int8(settings, spec)
    for name in names:
        if name in ALONE:
            yield Choice(device=name)
            continue
        precisions = ["fp32", *(["fp16"] if _has_fp16(name) else []), *(["int8"] if int8 else [])]
        streams = sorted({1, settings.threads or available_threads()}) if name == "cpu" else [0]
        for precision, count, tokens in itertools.product(precisions, streams, _ROW_LENGTHS):
            yield Choice(device=name, precision=precision, streams=count, row_tokens=tokens)


@dataclass
class _Contender:
    choice: Choice
    speeds: list[float] = field(default_factory=list[float])
    ratios: list[float] = field(default_factory=list[float])
    cosines: tuple[float, float] = (1.0, 1.0)
    error: str = ""

    def trial(self) -> Trial:
        return Trial(
            choice=self.choice,
            tokens_per_second=statistics.median(self.speeds) if self.speeds else 0.0,
            ratio=statistics.median(self.ratios) if self.ratios else 0.0,
            mean_cosine=self.cosines[0],
            least_cosine=self.cosines[1],
            rounds=len(self.ratios),
            error=self.error,
        )


def tune(settings: Settings, texts: Sequence[str] = (), *, rounds: int = 3, say: Say = print) -> Profile:
    """Measure every candidate on ``texts``, and keep all figures as this machine's profile of the model.

    Without texts, made-up ones of realistic lengths. Raises InputError for no rounds, ModelError for a model that is not
    there, UnavailableError where nothing is right.
    """
    if rounds < 1:
        raise InputError(f"`rounds` is {rounds}; it must be at least 1", param="rounds")
    name, folder = Store(settings.store).resolve(settings.model[0])
    spec = read_spec(folder, name=name, pooling=settings.pooling, max_length=settings.max_length)
    texts = list(texts) or sample_texts(400)
    contenders = [_Contender(choice) for choice in candidates(settings, spec)]
    say(f"{name} on {machine()}: {len(contenders)} candidates, {len(texts)} texts, {rounds} rounds")
    going = contenders
    for number in range(rounds):
        base, reference = _measure(settings, BASELINE, texts)
        for one in going:
            _race(settings, one, texts, base, reference)
            ratio = f"{one.ratios[-1]:5.2f} x" if not one.error else one.error
            say(f"round {number + 1}  {one.choice!s:40} {ratio}")
        going = _contending(going)
    trials = sorted((one.trial() for one in contenders), key=lambda trial: (bool(trial.error), -trial.ratio))
    if not trials or trials[0].error:
        raise UnavailableError("no candidate is right; see `npu-proxy doctor`")
    profile = Profile(model=name, fingerprint=spec.fingerprint, machine=machine(), trials=trials, unix=time.time())
    try:
        say(f"profile: {keep(settings.store, profile)}")
    except OSError as error:
        raise PullError(f"the store cannot be written: {error.strerror or error}; free space or set `store`") from error
    return profile


def _contending(going: Sequence[_Contender]) -> list[_Contender]:
    """Those near the fastest of their device and precision: each of these wants its own best streams and rows."""
    best: dict[tuple[str, str], float] = {}
    for one in going:
        key = one.choice.device, one.choice.precision
        best[key] = max(best.get(key, 0.0), 0.0 if one.error else one.ratios[-1])
    return [one for one in going if not one.error and one.ratios[-1] >= _CONTENDERS * best[one.choice.device, one.choice.precision]]


def _race(settings: Settings, one: _Contender, texts: Sequence[str], base: float, reference: Vectors) -> None:
    """One candidate's part of a round."""
    try:
        speed, vectors = _measure(settings, one.choice, texts)
    except NpuProxyError as error:
        one.error = str(error)
        return
    cosines = (vectors * reference).sum(1)
    one.speeds.append(speed)
    one.ratios.append(speed / base)
    one.cosines = float(cosines.mean()), float(cosines.min())
    if not one.cosines[0] >= _LEAST_COSINE[one.choice.precision]:
        one.error = f"vectors differ: mean cosine {one.cosines[0]:.6f}"


def _measure(settings: Settings, choice: Choice, texts: Sequence[str]) -> tuple[float, Vectors]:
    """Tokens a second and the vectors, on this device alone, compiled and warm. Raises NpuProxyError."""
    alone = replace(
        settings,
        device=choice.device,
        precision=choice.precision,  # type: ignore[arg-type]
        streams=choice.streams,
        row_tokens=choice.row_tokens or ROW_TOKENS,
        profile="off",
        fallback="off",
        probe_interval=0,
    )
    with Engine(settings=alone) as engine:
        engine.embed(texts[:32])
        start = time.perf_counter()
        results = [result.raise_first() for result in engine.results(texts)]
        seconds = time.perf_counter() - start
        return sum(sum(result.tokens) for result in results) / seconds, np.concatenate([result.embeddings for result in results])


def _has_int8(settings: Settings, spec: ModelSpec) -> bool:
    try:
        return bool(int8_spec(settings.store, spec))
    except ModelError:
        return False


def _has_fp16(name: str) -> bool:
    """Whether the device has two arithmetics to choose from, and half precision is one."""
    target = TARGETS[name]
    if "fp16" not in target.hints or target.kind.isolated:  # an accelerator's plugin is not loaded in this process
        return "fp16" in target.hints
    try:
        return "FP16" in ov.Core().get_property(target.openvino, "OPTIMIZATION_CAPABILITIES")
    except RuntimeError:
        return False
