"""Jobs as processes: killed without warning, ended by signals, and with worker processes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import GOLDEN

COMMAND = [sys.executable, "-m", "npu_proxy"]
MODEL = ["--model", str(GOLDEN / "mean")]


def write_rows(path: Path, count: int, words: int = 1) -> None:
    path.write_text(
        "".join(json.dumps({"text": f"cat {number % (count - 50)} " + "sea " * words}) + "\n" for number in range(count))
    )


def embed(folder: Path, *arguments: str, **options: object) -> subprocess.Popen[str]:
    command = [*COMMAND, "embed", "--input", "a.jsonl", *MODEL, *arguments]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]


def finished(process: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str]:
    _, told = process.communicate(timeout=seconds)
    return process.returncode, told


def until_parts(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until a job has finished so many parts."""
    end = time.monotonic() + 60
    while len(list(folder.glob("*.job/part-*.arrow"))) < count and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_a_job_killed_again_and_again_ends_with_the_same_output(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 100_000)
    assert finished(embed(tmp_path, "--output", "whole.parquet", "--device", "debug"))[0] == 0
    numbers = random.Random(7)
    for kill in range(4):
        process = embed(tmp_path, "--output", "out.parquet", "--device", "debug", "--resume")
        until_parts(tmp_path, kill + 1, process)
        time.sleep(numbers.random() / 2)
        process.kill()
        process.communicate()
    code, told = finished(embed(tmp_path, "--output", "out.parquet", "--device", "debug", "--resume"))
    assert code == 0, told
    assert "of them done before" in told
    assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out.parquet", "whole.parquet"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_ends_a_job_soon_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals, code: int) -> None:
    write_rows(tmp_path / "a.jsonl", 100_000)
    process = embed(tmp_path, "--output", "out.npy", "--device", "debug")
    until_parts(tmp_path, 1, process)
    began = time.monotonic()
    process.send_signal(number)
    ended, told = finished(process)
    assert ended == code
    assert time.monotonic() - began < 10
    assert "what is done is kept in `out.npy.job`; --resume continues" in told
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.slow
def test_ctrl_c_ends_worker_processes_at_once(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 40_000, 40)
    process = embed(tmp_path, "--output", "out.npy", "--device", "cpu", "--parallel", "2", start_new_session=True)
    end = time.monotonic() + 60
    while len(children(process.pid)) < 3 and time.monotonic() < end:  # two workers and the tracker of their resources
        time.sleep(0.05)
    time.sleep(4)
    assert process.poll() is None
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    code, told = finished(process)
    assert code == 130, told
    assert time.monotonic() - began < 5
    assert not children(process.pid)


def children(parent: int) -> list[str]:
    """Process ids of the children of a process."""
    try:
        return Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except FileNotFoundError:
        return []


def test_standard_input_of_any_format_becomes_a_file(tmp_path: Path) -> None:
    command = [*COMMAND, "embed", "--input", "-", "--format", "jsonl", "--output", "out.npy", "--device", "debug", *MODEL]
    given = b'{"text": "the cat"}\n{"text": "caf\xe9"}\n'
    done = subprocess.run(command, cwd=tmp_path, input=given, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert np.isnan(np.load(tmp_path / "out.npy")).all(axis=1).tolist() == [False, True]
    assert "not UTF-8" in (tmp_path / "out.npy.errors.jsonl").read_text()
    refused = subprocess.run([*COMMAND, "embed", *MODEL], input=b"caf\xe9\n", capture_output=True, timeout=60, check=False)
    assert refused.returncode == 2
    assert b"not UTF-8" in refused.stderr


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 300)
    command = [*COMMAND, "embed", "--input", "a.jsonl", "--output", "out.npy", "--dry-run", "--device", "debug", *MODEL]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "300 rows in 1 file, 250 different texts, 0 bad rows" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.slow
def test_labels_and_relevance_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("q,text\nthe cat,the cat sleeps\nthe cat,sea\n")
    for arguments, model in ((["rerank", "--query-field", "q"], "bert_rerank"), (["classify"], "roberta_labels")):
        command = [*COMMAND, *arguments, "--input", "a.csv", "--output", f"{model}.jsonl", "--model", str(GOLDEN / model)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
    scores = [json.loads(line)["score"] for line in (tmp_path / "bert_rerank.jsonl").read_text().splitlines()]
    ask = [*COMMAND, "rerank", "the cat", "the cat sleeps", "sea", "--json", "--model", str(GOLDEN / "bert_rerank")]
    asked = subprocess.run(ask, capture_output=True, text=True, timeout=60, check=False).stdout.splitlines()
    assert {json.loads(line)["index"]: json.loads(line)["score"] for line in asked} == pytest.approx(dict(enumerate(scores)))
    labels = [json.loads(line)["labels"] for line in (tmp_path / "roberta_labels.jsonl").read_text().splitlines()]
    assert [len(found) for found in labels] == [1, 1]
