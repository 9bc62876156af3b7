"""Measures which device, precision, number of streams and batch size embed fastest on this machine, in one run.

In each round, all candidates embed the same texts one after the other, and speeds are compared within the round, so that a machine
that slows down affects all of them. Slow candidates are dropped early. Candidates with wrong vectors are never used.
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

from npu_proxy.devices.shapes import ROW_TOKENS
from npu_proxy.engine.engine import Engine
from npu_proxy.engine.golden import GOLDEN_TEXTS
from npu_proxy.errors import InputError, ModelError, NpuProxyError, PullError, UnavailableError
from npu_proxy.models.graph_files import available_devices
from npu_proxy.models.quantized import int8_spec
from npu_proxy.models.resolve import read_model
from npu_proxy.models.tuning import TuningChoice, TuningProfile, TuningTrial, machine, save_profile
from npu_proxy.settings import Settings
from npu_proxy.spec import ModelSpec
from npu_proxy.system import available_threads
from npu_proxy.targets import STANDALONE, TARGETS, device_chain

BASELINE = TuningChoice(device="cpu", precision="fp32")
_ROW_LENGTHS = (256, ROW_TOKENS, 2 * ROW_TOKENS)
_CLOSE_ENOUGH = 0.8
"""A candidate stays for the next round if it has this share of the speed of the fastest of its device and precision."""
_LEAST_COSINE = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.98}
"""The minimum mean cosine to fp32 on the CPU. In addition, int8 has passed the checks of `quantize`, and an accelerator its
certification."""

Say = Callable[[str], None]
Vectors = npt.NDArray[np.float32]


def sample_texts(count: int, seed: int = 0) -> list[str]:
    """Texts whose lengths are distributed as in real corpora: most are short, some are longer than any limit."""
    random = np.random.default_rng(seed)
    words = " ".join(GOLDEN_TEXTS[:10]).split()
    lengths = np.minimum(random.lognormal(3.4, 1.0, count).astype(int) + 1, 600)
    return [" ".join(random.choice(words, length)) for length in lengths]


def candidates(settings: Settings, spec: ModelSpec) -> Iterator[TuningChoice]:
    """All choices for the settings' devices; for `auto`, for all devices of this machine and graph files of the model."""
    names = [*device_chain(settings.device)]
    if settings.device == "auto":
        graphs = available_devices(settings, spec.folder)
        names += [name for name in graphs if name != "onnx" or importlib.util.find_spec("onnxruntime")]
    int8 = _has_int8(settings, spec)
    for name in names:
        if name in STANDALONE:
            yield TuningChoice(device=name)
            continue
        precisions = ["fp32", *(["fp16"] if _has_fp16(name) else []), *(["int8"] if int8 else [])]
        streams = sorted({1, settings.threads or available_threads()}) if name == "cpu" else [0]
        for precision, count, tokens in itertools.product(precisions, streams, _ROW_LENGTHS):
            yield TuningChoice(device=name, precision=precision, streams=count, row_tokens=tokens)


@dataclass
class _Candidate:
    choice: TuningChoice
    speeds: list[float] = field(default_factory=list[float])
    ratios: list[float] = field(default_factory=list[float])
    cosines: tuple[float, float] = (1.0, 1.0)
    error: str = ""

    def trial(self) -> TuningTrial:
        return TuningTrial(
            choice=self.choice,
            tokens_per_second=statistics.median(self.speeds) if self.speeds else 0.0,
            ratio=statistics.median(self.ratios) if self.ratios else 0.0,
            mean_cosine=self.cosines[0],
            least_cosine=self.cosines[1],
            rounds=len(self.ratios),
            error=self.error,
        )


def tune(settings: Settings, texts: Sequence[str] = (), *, rounds: int = 3, say: Say = print) -> TuningProfile:
    """Measure all candidates on ``texts``, and store the results as this machine's profile of the model.

    Without texts, generated ones of realistic lengths are used. Raises InputError for less than one round, ModelError if the model
    cannot be read, UnavailableError if no candidate is correct, and PullError if the store cannot be written.
    """
    if rounds < 1:
        raise InputError(f"`rounds` is {rounds}; it must be at least 1", param="rounds")
    spec = read_model(settings)
    texts = list(texts) or sample_texts(400)
    entrants = [_Candidate(choice) for choice in candidates(settings, spec)]
    say(f"{spec.name} on {machine()}: {len(entrants)} candidates, {len(texts)} texts, {rounds} rounds")
    running = entrants
    for number in range(rounds):
        base, reference = _measure(settings, BASELINE, texts)
        for candidate in running:
            _run_round(settings, candidate, texts, base, reference)
            ratio = f"{candidate.ratios[-1]:5.2f} x" if not candidate.error else candidate.error
            say(f"round {number + 1}  {candidate.choice!s:40} {ratio}")
        running = _remaining(running)
    trials = sorted((candidate.trial() for candidate in entrants), key=lambda trial: (bool(trial.error), -trial.ratio))
    if not trials or trials[0].error:
        raise UnavailableError("no device computes correct vectors; see `npu-proxy doctor`")
    profile = TuningProfile(model=spec.name, fingerprint=spec.fingerprint, machine=machine(), trials=trials, unix=time.time())
    try:
        say(f"profile: {save_profile(settings.store, profile)}")
    except OSError as error:
        raise PullError(f"the store cannot be written: {error.strerror or error}; free space or set `store`") from error
    return profile


def _remaining(running: Sequence[_Candidate]) -> list[_Candidate]:
    """Candidates nearly as fast as the best of their device and precision, whose best streams and batch sizes differ."""
    best: dict[tuple[str, str], float] = {}
    for candidate in running:
        key = candidate.choice.device, candidate.choice.precision
        best[key] = max(best.get(key, 0.0), 0.0 if candidate.error else candidate.ratios[-1])
    return [
        candidate
        for candidate in running
        if not candidate.error and candidate.ratios[-1] >= _CLOSE_ENOUGH * best[candidate.choice.device, candidate.choice.precision]
    ]


def _run_round(settings: Settings, candidate: _Candidate, texts: Sequence[str], base: float, reference: Vectors) -> None:
    """Measure one candidate in a round, and record its speed or error."""
    try:
        speed, vectors = _measure(settings, candidate.choice, texts)
    except NpuProxyError as error:
        candidate.error = str(error)
        return
    cosines = (vectors * reference).sum(1)
    candidate.speeds.append(speed)
    candidate.ratios.append(speed / base)
    candidate.cosines = float(cosines.mean()), float(cosines.min())
    if not candidate.cosines[0] >= _LEAST_COSINE[candidate.choice.precision]:
        candidate.error = f"vectors differ: mean cosine {candidate.cosines[0]:.6f}"


def _measure(settings: Settings, choice: TuningChoice, texts: Sequence[str]) -> tuple[float, Vectors]:
    """Tokens per second and the vectors, with only this device, after warm-up. Raises NpuProxyError."""
    alone = replace(
        settings,
        device=choice.device,
        precision=choice.precision,  # type: ignore[arg-type]
        streams=choice.streams,
        row_tokens=choice.row_tokens or ROW_TOKENS,
        profile=False,
        fallback=False,
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
    """Whether the device's arithmetic can be set to half precision."""
    target = TARGETS[name]
    if "fp16" not in target.hints or target.kind.isolated:  # an accelerator's plugin is not loaded in this process
        return "fp16" in target.hints
    try:
        return "FP16" in ov.Core().get_property(target.openvino, "OPTIMIZATION_CAPABILITIES")
    except RuntimeError:
        return False
