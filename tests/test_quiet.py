"""No command reports to anyone: an audit hook in every process of each one, and a home that stays empty but for our folders."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import GOLDEN, Server, golden
from npu_proxy.commands.app import app

FOLDER, TEXTS, _ = golden("mean")
HOOK = r"""
import os, sys
log = os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
write = os.O_WRONLY | os.O_RDWR | os.O_CREAT
def hook(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"):
        if arguments[0] != "127.0.0.1":  # where our server listens
            os.write(log, f"{event} {arguments[-1 if event == 'socket.connect' else 0]!r}\n".encode())
    elif event == "os.fork":
        os.write(log, b"fork\n")
sys.addaudithook(hook)
"""
OURS = (".local/share/npu-proxy", ".cache/npu-proxy")


def commands(folder: Path) -> dict[str, list[str]]:
    """One call of each command, and of those that start processes of their own."""
    texts, vectors = str(folder / "in.txt"), str(folder / "out.npy")
    model, ranker, labels = ["--model", str(FOLDER)], str(GOLDEN / "bert_rerank"), str(GOLDEN / "distilbert_labels")
    return {
        "pull": ["pull", str(FOLDER)],
        "list": ["list"],
        "show": ["show", "mean"],
        "doctor": ["doctor", *model],
        "embed": ["embed", "a cat", *model],
        "embed-onnx": ["embed", "a cat", "--device", "onnx", "--onnx-file", "onnx/model.onnx", *model],
        "embed-sim": ["embed", "a cat", "--device", "npu-sim", *model],
        "embed-parallel": ["embed", "--input", texts, "--output", vectors, "--parallel", "2", *model],
        "verify": ["verify", str(FOLDER / "vectors.npy"), "--input", texts, *model],
        "similarity": ["similarity", "a cat", "a dog", *model],
        "rerank": ["rerank", "a cat", "a dog", "--model", ranker],
        "classify": ["classify", "a cat", "--model", labels],
        "certify": ["certify", str(FOLDER), "--device", "npu-sim"],
        "compile": ["compile", str(FOLDER), "--device", "npu-sim"],
        "quantize": ["quantize", str(FOLDER), "--pairs", str(folder / "pairs.jsonl")],
        "tune": ["tune", str(FOLDER), "--device", "cpu"],
        "cache-stats": ["cache", "stats", "--cache-disk-mb", "10"],
        "cache-clear": ["cache", "clear", "--cache-disk-mb", "10"],
        "convert": ["convert", str(FOLDER), "--output", str(folder / "converted")],
        "compare": ["compare", str(FOLDER)],
        "rm": ["rm", "mean"],
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    """A home, a working folder, and the environment of every command."""
    home, folder, hook = (tmp_path_factory.mktemp(name) for name in ("home", "work", "hook"))
    (hook / "sitecustomize.py").write_text(HOOK)
    (folder / "in.txt").write_text("\n".join(f"text {number}" for number in range(len(TEXTS))))
    scores = enumerate(["a", "b", "c"] * 9)
    pairs = [f'{{"sentence1": "{text}", "sentence2": "a cat", "score": {number}}}' for number, text in scores]
    (folder / "pairs.jsonl").write_text("\n".join(pairs))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NPU_PROXY", "XDG", "HF_", "COV"))}
    paths = os.pathsep.join([str(hook), *filter(None, [kept.get("PYTHONPATH", "")])])
    environment = {**kept, "HOME": str(home), "PYTHONPATH": paths, "AUDIT_LOG": str(folder / "audit.log"), "COLUMNS": "200"}
    pull = [sys.executable, "-m", "npu_proxy", *commands(folder)["pull"]]  # each process of the tests has a home of its own
    subprocess.run(pull, env=environment, check=True, capture_output=True, timeout=60)
    return home, folder, environment


def check(home: Path, folder: Path) -> None:
    log = folder / "audit.log"
    assert log.exists(), "the hook did not run"
    assert log.read_text() == ""
    files = [path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()]
    assert [file for file in files if not file.startswith(OURS)] == []


def test_every_command_is_called() -> None:
    names = {name for name in app.resolved_commands() if not name.startswith("-")} - {"serve"}
    assert names == {name.partition("-")[0] for name in commands(Path("/tmp"))}


@pytest.mark.slow
@pytest.mark.parametrize("name", commands(Path("/tmp")))
def test_a_command_connects_to_nobody_and_leaves_no_file_at_home(world: tuple[Path, Path, dict[str, str]], name: str) -> None:
    home, folder, environment = world
    command = [sys.executable, "-m", "npu_proxy", *commands(folder)[name]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, cwd=folder, check=False)
    check(home, folder)
    # The vectors of another device; too great a loss; no torch and no library to compare with here.
    may_fail = {"verify": 1, "quantize": 2, "convert": 2, "compare": 2}
    assert done.returncode in (0, may_fail.get(name, 0)), done.stderr[-2000:]


def test_a_server_connects_to_nobody(world: tuple[Path, Path, dict[str, str]]) -> None:
    home, folder, environment = world
    server = Server("--model", str(FOLDER), "--device", "npu-sim,cpu", **environment).wait_ready()
    assert server.stop() == 0
    check(home, folder)
