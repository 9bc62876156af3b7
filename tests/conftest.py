"""Fixtures: tiny golden models, the real default model, real data, and engines over a fake device."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings as hypothesis_settings
from starlette.types import ASGIApp

from npu_proxy import Engine, Settings
from npu_proxy.batch import Batch, BatchShape
from npu_proxy.devices.fake import FakeDevice
from npu_proxy.engine.components import EngineComponents
from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.models import tuning
from npu_proxy.models.layout import read_spec
from npu_proxy.models.store import ModelStore
from npu_proxy.server.http.app import create_app
from npu_proxy.server.models.loaded import LoadedModels
from npu_proxy.settings import DEFAULT_MODEL

# How long an example takes says nothing on a shared machine.
hypothesis_settings.register_profile("untimed", deadline=None)
hypothesis_settings.load_profile("untimed")

# What somebody tuned on this machine is not what is tested.
os.environ["NPU_PROXY_PROFILE"] = "off"
tuning.machine = lambda: "the tests' own"

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_NAMES = sorted(folder.name for folder in GOLDEN.iterdir() if (folder / "vectors.npy").exists())
DATA = Path(os.environ.get("TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def golden(name: str) -> tuple[Path, list[str], np.ndarray]:
    """Folder, texts and vectors [n, width] of a golden model."""
    folder = GOLDEN / name
    return folder, json.loads((folder / "texts.json").read_text()), np.load(folder / "vectors.npy")


def smallest_cosine(left: np.ndarray, right: np.ndarray) -> float:
    """The smallest cosine of two vectors with the same index."""
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return float(((left * right).sum(1) / lengths).min())


def fake_engine(device: FakeDevice | None = None, **settings: Any) -> Engine:
    """An engine with the golden tokenizer and a fake device; not started."""
    spec = read_spec(GOLDEN / "mean")
    device = device or FakeDevice(width=spec.width)

    def components(settings: Settings, _stopping: threading.Event) -> EngineComponents:
        tokenizer = RequestTokenizer(spec, sanitize=settings.sanitize, on_empty=settings.on_empty)
        return EngineComponents(spec=spec, tokenizer=tokenizer, device=device)

    return Engine(settings=Settings(**settings), components=components)


def until_set(event: threading.Event, seconds: float = 20) -> Callable[[Batch], None]:
    """A fake device's script: every batch waits for the event."""

    def script(_batch: Batch) -> None:
        event.wait(seconds)

    return script


def app_of(engine: Engine, settings: Settings) -> ASGIApp:
    """The server's application over an engine that the test starts and stops."""
    return create_app(LoadedModels(settings, make=lambda _settings, _cache: engine), settings)


SMALL_SHAPES = (BatchShape(bins=1, positions=64, segments=4), BatchShape(bins=2, positions=64, segments=4))


@pytest.fixture(scope="session")
def default_model() -> str:
    """The default model, which `make test` has put into the store."""
    if ModelStore(Settings().store).find(DEFAULT_MODEL) is None:
        pytest.skip("the default model is not in the store; `make weights` fetches it")
    return DEFAULT_MODEL


@pytest.fixture(scope="session")
def real_engine(default_model: str) -> Iterator[Engine]:
    with Engine(default_model) as engine:
        yield engine


@pytest.fixture(scope="session")
def reference() -> tuple[list[dict], np.ndarray]:
    """The reference texts and their vectors [319, 384] from sentence-transformers."""
    if not DATA.is_dir():
        pytest.skip(f"the reference data is not at {DATA.name}; set TEST_DATA")
    rows = [json.loads(line) for line in (DATA / "reference_minilm.jsonl").read_text(encoding="utf-8").split("\n") if line]
    return rows, np.load(DATA / "reference_minilm.npy")


class Server:
    """A server in its own process, as users run it."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        command = [sys.executable, "-m", "npu_proxy", "serve", "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
        self.log: list[str] = []
        self.url = ""

    def wait_ready(self, pattern: str = r"npu-proxy ready: (http://\S+)") -> "Server":
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(pattern, line):
                self.url = found[1]
                return self
        raise AssertionError(f"the server ended: {self.log}")

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=30)
        finally:
            self.process.kill()
            assert self.process.stderr is not None
            self.process.stderr.close()


@pytest.fixture(scope="session")
def server(default_model: str) -> Iterator[Server]:
    running = Server().wait_ready()
    yield running
    assert running.stop() == 0


NAMES = ("text-embedding-3-small", "text-embedding-ada-002", "embed-english-v3.0", "chroma/all-minilm-l6-v2-f32")
"""Names that clients insist on."""


@pytest.fixture(scope="session")
def many_names(default_model: str) -> Iterator[Server]:
    running = Server(*(part for name in NAMES for part in ("--served-model-name", name))).wait_ready()
    yield running
    assert running.stop() == 0
