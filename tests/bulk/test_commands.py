"""rerank, classify, similarity and show as users call them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import GOLDEN


def run(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "npu_proxy", *arguments, "--device", "cpu"]
    return subprocess.run(command, input=given, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.slow
def test_rerank_takes_documents_from_arguments_files_and_standard_input(tmp_path: Path) -> None:
    model, documents = str(GOLDEN / "bert_rerank"), ["the cat sleeps", "sea", "x"]
    file = tmp_path / "documents.txt"
    file.write_text("\n".join(documents[1:]) + "\n\n")
    ways = [
        run("rerank", "the cat", *documents, "--model", model, "--json"),
        run("rerank", "the cat", documents[0], "--model", model, "--input", str(file), "--json"),
        run("rerank", "the cat", "--model", model, "--json", given="\n".join(documents)),
    ]
    assert [way.returncode for way in ways] == [0, 0, 0], ways
    found = [json.loads(line) for line in ways[0].stdout.splitlines()]
    assert sorted(result["index"] for result in found) == [0, 1, 2]
    scores = [result["score"] for result in found]
    assert scores == sorted(scores, reverse=True)
    assert all(result["document"] == documents[result["index"]] for result in found)
    assert ways[1].stdout == ways[2].stdout == ways[0].stdout


@pytest.mark.slow
def test_classify_similarity_and_show() -> None:
    classified = run("classify", "the cat", "--model", str(GOLDEN / "roberta_labels"), "--top-n", "3", "--json")
    assert [label["label"] for label in json.loads(classified.stdout)["labels"]] == ["LABEL_1", "LABEL_0", "LABEL_2"]
    compared = run("similarity", "the cat", "sea", "the cat", "--model", str(GOLDEN / "mean"), "--json")
    found = [json.loads(line) for line in compared.stdout.splitlines()]
    assert found[0]["index"] == 1
    assert abs(found[0]["similarity"] - 1) < 1e-5
    shown = json.loads(run("show", str(GOLDEN / "colbert"), "--json").stdout)
    assert (shown["gives"], shown["width"], shown["tokens"], shown["similarity"]) == (["tokens"], 16, 48, "maxsim")
    assert shown["prompts"]["query"] == "[UNK] "
    assert len(shown["fingerprint"]) == 16


@pytest.mark.slow
def test_what_is_wrong_is_said_on_one_line() -> None:
    for arguments, words in (
        (["rerank", "q", "d", "--model", str(GOLDEN / "mean")], "has no head for ranking"),
        (["classify", "--model", str(GOLDEN / "roberta_labels")], "there are no texts to classify"),
        (["similarity", "a", "--model", str(GOLDEN / "mean")], "no text to compare with"),
        (["embed", "a", "--model", str(GOLDEN / "bert_rerank")], "has no head for dense vectors"),
    ):
        done = run(*arguments)
        assert done.returncode == 2
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
