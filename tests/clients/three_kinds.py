"""A server as `make clients` runs it: the default model, the example reranker and the example classifier; and what is right."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from conftest import Server
from npu_proxy import Engine, Settings
from npu_proxy.settings import DEFAULT_MODEL

EXAMPLES = Path(__file__).parents[2] / "examples" / "models"
RERANKER, CLASSIFIER = EXAMPLES / "scifact-reranker", EXAMPLES / "banking77-classifier"
NAMES = ["text-embedding-3-small", "voyage-3", "mistral-embed", "gemini-embedding-001", "embed-english-v3.0", "jina-embeddings-v3"]
QUERY = "does aspirin lower the risk of heart attacks"
DOCUMENTS = [
    "The stock market fell by two percent on Monday.",
    "Low doses of aspirin reduce the incidence of myocardial infarction.",
    "Aspirin is made from salicylic acid.",
]
PAYMENTS = ["My card has not arrived yet", "Why was I charged twice?"]


@pytest.fixture(scope="session")
def three(default_model: str) -> Iterator[Server]:
    flags = ["--model", default_model, "--model", str(RERANKER), "--model", str(CLASSIFIER)]
    names = [part for name in NAMES for part in ("--served-model-name", name)]
    running = Server(*flags, *names, "--served-model-name", f"rerank-2={RERANKER.name}").wait_ready()
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="session")
def ranked() -> list[tuple[int, float]]:
    """Index and score of each document, best first, from the library."""
    with Engine(RERANKER, settings=Settings(device="cpu")) as engine:
        return [(rank.index, rank.score) for rank in engine.rerank(QUERY, DOCUMENTS)]


@pytest.fixture(scope="session")
def logits() -> list[tuple[int, float]]:
    """Index and logit of each document, best first, from the library."""
    with Engine(RERANKER, settings=Settings(device="cpu")) as engine:
        return [(rank.index, rank.score) for rank in engine.rerank(QUERY, DOCUMENTS, raw=True)]


@pytest.fixture(scope="session")
def labelled() -> list[tuple[str, float]]:
    """The best label of each payment, and its probability, from the library."""
    with Engine(CLASSIFIER, settings=Settings(device="cpu")) as engine:
        return [(labels[0].label, labels[0].score) for labels in engine.classify(PAYMENTS)]


@pytest.fixture(scope="session")
def vectors(default_model: str) -> np.ndarray:
    """The vectors [3, 384] of the documents, from the library, which is held against sentence-transformers elsewhere."""
    assert default_model == DEFAULT_MODEL
    with Engine(settings=Settings(device="cpu")) as engine:
        return engine.embed(DOCUMENTS)
