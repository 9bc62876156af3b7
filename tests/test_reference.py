"""The real default model against sentence-transformers' own vectors, awkward texts included."""

import random

import numpy as np
import pytest

from conftest import smallest_cosine
from npu_proxy import Engine, Settings


@pytest.mark.slow
def test_every_reference_text(real_engine: Engine, reference: tuple[list[dict], np.ndarray]) -> None:
    rows, vectors = reference
    found = real_engine.embed([row["text"] for row in rows])
    assert found.dtype == np.float32
    assert found.shape == (319, 384)
    assert smallest_cosine(found, vectors) >= 0.99999


@pytest.mark.slow
def test_alone_padded_and_in_other_company_agree(
    real_engine: Engine, reference: tuple[list[dict], np.ndarray], default_model: str
) -> None:
    rows, vectors = reference
    texts = [row["text"] for row in rows]
    order = random.Random(3).sample(range(len(texts)), 60) + list(range(300, 319))
    shuffled = real_engine.embed([texts[i] for i in order])
    alone = np.stack([real_engine.embed([texts[i]])[0] for i in order])
    with Engine(default_model, settings=Settings(packing=False)) as padded:
        one_per_bin = padded.embed([texts[i] for i in order])
    for found in (shuffled, alone, one_per_bin):
        assert smallest_cosine(found, vectors[order]) >= 0.99999


def test_token_counts_are_exact(real_engine: Engine, reference: tuple[list[dict], np.ndarray]) -> None:
    rows, _ = reference
    (result,) = real_engine.results([row["text"] for row in rows], batch_size=400)
    assert list(result.tokens) == [min(row["tokens"], 256) for row in rows]
    assert list(result.truncated) == [row["tokens"] > 256 for row in rows]
    assert result.device == "cpu"
