"""The models in examples/models do what their page says, on any device, and the examples run."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from npu_proxy import Engine, Settings

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "examples" / "models"
BANKING = ROOT.parent / "shared" / "data" / "banking77"


@pytest.mark.parametrize("device", ["cpu", "npu-sim"])
def test_the_reranker_puts_what_answers_a_claim_first(device: str, tmp_path: Path) -> None:
    documents = [
        "Mitochondria divide before the cell does.",
        "Calcium and vitamin D supplementation reduced the number of hip fractures in a randomized trial.",
        "Statins lower cholesterol in patients with coronary disease.",
        "Zebrafish hearts regenerate after injury.",
    ]
    settings = Settings(device=device, fallback=False, compile_cache=tmp_path, store=tmp_path)
    with Engine(MODELS / "scifact-reranker", settings=settings) as engine:
        ranked = engine.rerank("Vitamin D lowers the risk of fractures.", documents)
    assert ranked[0].index == 1
    assert ranked[0].score > 0.5 > ranked[1].score


def test_the_classifier_knows_what_customers_want() -> None:
    with Engine(MODELS / "banking77-classifier", device="cpu") as engine:
        found = engine.classify(["I still have not received my new card, where is it?", "How do I change my PIN?"])
    assert [labels[0].label for labels in found] == ["card_arrival", "change_pin"]


@pytest.mark.skipif(not BANKING.is_dir(), reason="the data of ../shared is not here")
def test_the_accuracy_on_held_out_queries_is_the_stated_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    from banking import banking

    train, held = banking(BANKING)
    assert (len(train), len(held)) == (2310, 770)
    assert not {text for text, _ in train} & {text for text, _ in held}
    with Engine(MODELS / "banking77-classifier", device="cpu") as engine:
        found = engine.classify([text for text, _ in held])
    right = sum(labels[0].label == name for labels, (_, name) in zip(found, held, strict=True))
    assert right / len(held) > 0.88
    assert "torch" not in sys.modules


@pytest.mark.slow
def test_semantic_deduplication(default_model: str, tmp_path: Path) -> None:
    texts = ["My card was declined.", "The cat sleeps.", "My card got declined!", "The cat sleeps.", "Interest rates rose."]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    embed = [sys.executable, "-m", "npu_proxy", "embed", "--input", "texts.txt", "--output", "vectors.parquet"]
    subprocess.run(embed, cwd=tmp_path, check=True, timeout=120, capture_output=True)
    command = [sys.executable, str(ROOT / "examples" / "deduplicate.py"), "vectors.parquet", "kept.parquet", "--least", "0.85"]
    done = subprocess.run(command, cwd=tmp_path, check=True, timeout=120, capture_output=True, text=True)
    assert done.stdout == "3 of 5 texts kept\n"
    assert pq.read_table(tmp_path / "kept.parquet")["text"].to_pylist() == [texts[0], texts[1], texts[4]]


def test_rows_that_are_kept_are_unlike_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    import deduplicate

    monkeypatch.setattr(deduplicate, "BLOCK", 7)
    vectors = np.random.default_rng(1).normal(size=[200, 3]).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    kept = deduplicate.kept_rows(vectors, 0.9)
    cosines = vectors @ vectors.T
    assert not [(i, j) for i in kept for j in kept if i < j and cosines[i, j] >= 0.9]
    assert all(any(cosines[row, other] >= 0.9 for other in kept if other < row) for row in set(range(200)) - set(kept.tolist()))
