"""A closed loop of concurrent requests over an engine whose first device can be made to fail, and the outcome of each."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from npu_proxy import EmbedRequest, EmbedResult, Engine, NpuProxyError, Settings
from npu_proxy.devices.accelerator.accelerator import Accelerator
from npu_proxy.devices.chain import open_devices
from npu_proxy.devices.fallback import Fallback
from npu_proxy.devices.worker.faults import Fault
from npu_proxy.engine.components import EngineComponents
from npu_proxy.engine.golden import GoldenBatches
from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.models.resolve import resolve

WORDS = "the cat dog house red green blue runs sleeps eats one two three four five moon star".split()
SAME = 0.99999


def faulty_engine(**settings: Any) -> Engine:
    """An engine on npu-sim,cpu (or the device given) whose npu-sim obeys `inject`; started, npu-sim serving."""
    chosen = Settings(**{"device": "npu-sim,cpu", "profile": False, **settings})
    engine = Engine(settings=chosen, components=faulty_components()).start()
    accelerator(engine).wait_decided(120)
    return engine


def faulty_components(first: Fault = Fault.NONE) -> Callable[[Settings, threading.Event], EngineComponents]:
    """How such an engine is loaded; the fault ``first`` happens from the start."""

    def components(settings: Settings, stopping: threading.Event) -> EngineComponents:
        settings, spec = resolve(settings)
        tokenizer = RequestTokenizer(spec)
        golden = GoldenBatches(tokenizer, spec)
        device = open_devices(settings, spec, golden, stopping, fault=first)
        canaries = golden.canaries if settings.canaries else None
        return EngineComponents(spec=spec, tokenizer=tokenizer, device=device, canaries=canaries)

    return components


def accelerator(engine: Engine) -> Accelerator:
    assert isinstance(engine.device, Fallback)
    first = engine.device._devices[0]
    assert isinstance(first, Accelerator)
    return first


def texts(count: int, seed: int = 0) -> list[str]:
    """Distinct texts of 2 to 40 words."""
    random = np.random.default_rng(seed)
    return [" ".join([*random.choice(WORDS, random.integers(1, 40)), str(number)]) for number in range(count)]


@dataclass
class Figures:
    """The outcome of a load. Seconds: of the slowest answer, beyond the timeout, and until the device serves again."""

    requests: int = 0
    right: int = 0
    wrong: int = 0
    twice: int = 0
    lost: int = 0
    errors: Counter[str] = field(default_factory=Counter[str])
    devices: Counter[str] = field(default_factory=Counter[str])
    reasons: Counter[str] = field(default_factory=Counter[str])
    least_cosine: float = 1.0
    slowest: float = 0.0
    late: float = 0.0
    back: float = 0.0


class Load:
    """``concurrent`` requests of one text under way at any time, until ``finish``."""

    def __init__(self, engine: Engine, expected: dict[str, np.ndarray], *, concurrent: int = 1000, timeout: float = 30.0) -> None:
        self.figures = Figures()
        self._engine = engine
        self._expected = expected
        self._texts = list(expected)
        self._timeout = timeout
        self._lock = threading.Lock()
        self._open = 0
        self._going = True
        self._answers: Counter[int] = Counter()
        for _ in range(concurrent):
            self._submit()

    def _submit(self) -> None:
        with self._lock:
            number = self.figures.requests
            self.figures.requests += 1
            self._open += 1
        text, start = self._texts[number % len(self._texts)], time.monotonic()
        request = EmbedRequest(texts=[text], deadline=start + self._timeout)
        self._engine.submit(request).add_done_callback(lambda future: self._done(number, text, start, future))

    def _done(self, number: int, text: str, start: float, future: Future[EmbedResult]) -> None:
        result, took, figures = future.result(), time.monotonic() - start, self.figures
        with self._lock:
            self._open -= 1
            self._answers[number] += 1
            figures.twice += self._answers[number] > 1
            figures.slowest = max(figures.slowest, took)
            figures.late = max(figures.late, took - self._timeout)
            error = result.errors[0]
            if error is not None:
                figures.errors[type(error).__name__] += 1
                figures.reasons[str(error)] += 1
            else:
                cosine = float(result.embeddings[0] @ self._expected[text])
                figures.least_cosine = min(figures.least_cosine, cosine)
                figures.right += cosine >= SAME
                figures.wrong += not cosine >= SAME
                figures.devices[result.device] += 1
                if result.fallback:
                    figures.reasons[result.fallback] += 1
            going = self._going
        if going:
            try:
                self._submit()
            except NpuProxyError as refused:
                with self._lock:
                    self._open -= 1
                    figures.errors[type(refused).__name__] += 1

    def answered(self) -> int:
        with self._lock:
            return sum(self._answers.values())

    def wait_for(self, more: int, seconds: float = 60.0) -> None:
        """Wait for so many more answers."""
        goal, pause, end = self.answered() + more, threading.Event(), time.monotonic() + seconds
        while self.answered() < goal and time.monotonic() < end:
            pause.wait(0.01)

    def wait_back(self, seconds: float = 60.0) -> float:
        """Wait until the first device serves again; returns how long it took, infinity when it did not."""
        start, pause = time.monotonic(), threading.Event()
        while time.monotonic() - start < seconds:
            if accelerator(self._engine).ready:
                took = time.monotonic() - start
                self.figures.back = max(self.figures.back, took)
                return took
            pause.wait(0.01)
        self.figures.back = float("inf")
        return float("inf")

    def wait_down(self, seconds: float = 30.0) -> None:
        """Wait until the first device is known to have failed."""
        pause, end = threading.Event(), time.monotonic() + seconds
        while accelerator(self._engine).ready and time.monotonic() < end:
            pause.wait(0.002)

    def finish(self) -> Figures:
        """Send no further requests, and wait for those under way."""
        with self._lock:
            self._going = False
        pause, end = threading.Event(), time.monotonic() + self._timeout + 10
        while self._open and time.monotonic() < end:
            pause.wait(0.01)
        self.figures.lost = self._open
        return self.figures


def expected_vectors(model: str | Path, store: Path, texts: list[str]) -> dict[str, np.ndarray]:
    """The CPU's vectors, by text."""
    with Engine(model, device="cpu", settings=Settings(store=store, profile=False)) as engine:
        return dict(zip(texts, engine.embed(texts), strict=True))
