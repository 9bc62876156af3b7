"""The command line as users call it: exit codes, one clear line, settings from three places."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import golden

MODEL = str(golden("mean")[0])


def call(*arguments: str, stdin: str | None = None, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "npu_proxy", *arguments],
        input=stdin if stdin is not None else "",
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **environment},
        timeout=60,
        check=False,
    )


def test_texts_become_json_lines() -> None:
    done = call("embed", "the cat", "sea " * 60, "--model", MODEL)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["index"], row["tokens"], row["truncated"]) for row in rows] == [(0, 4, False), (1, 48, True)]
    assert np.linalg.norm(rows[0]["embedding"]) == pytest.approx(1, abs=1e-5)


def test_standard_input_and_options() -> None:
    done = call("embed", "--dimensions", "4", "--dtype", "base64", stdin="the cat\nthe dog\n", NPU_PROXY_MODEL=MODEL)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [len(row["embedding"]) for row in rows] == [24, 24]


def test_a_file_becomes_a_file(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("the cat\nthe dog\n")
    done = call("embed", "--input", "in.txt", "--output", "out.npy", "--model", MODEL, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "out.npy").shape == (2, 32)
    assert "2 texts, 8 tokens on cpu" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["embed", "--max-bacth", "3"], {}, "--max-bacth"),
        (["embed", "a", "--model", "no/such"], {}, "download it with `npu-proxy pull no/such`"),
        (["embed", "--input", "nowhere.jsonl"], {}, "`nowhere.jsonl` is not a file"),
        (["embed", "a", "--device", "toaster"], {}, "`device` names `toaster`"),
        (["embed", "a", "--timeout", "soon"], {}, "--timeout"),
        (["embed", "a"], {"NPU_PROXY_AGIN": "3"}, "unknown variable `NPU_PROXY_AGIN`; did you mean `NPU_PROXY_AGING`?"),
        (["embed", "a"], {"NPU_PROXY_CONFIG": "nowhere.toml"}, "nowhere.toml"),
        (["embed", "a", "--dimensions", "99"], {}, "dimensions must be between 1 and 32"),
        (["embed", ""], {}, "the text is empty"),
        (["pull", "a/b/c"], {}, "is not a valid model name"),
        (["rm", "not-there"], {}, "not in the local store"),
        (["frobnicate"], {}, "frobnicate"),
    ],
)
def test_mistakes_are_one_clear_line_and_exit_code_2(tmp_path: Path, arguments: list[str], environment: dict, message: str) -> None:
    settings = {"NPU_PROXY_MODEL": MODEL, "NPU_PROXY_STORE": str(tmp_path / "store")}
    done = call(*arguments, folder=tmp_path, **(settings | environment))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stdout == ""


@pytest.mark.slow
def test_toml_is_read_flags_win_and_unknown_keys_are_refused(tmp_path: Path) -> None:
    (tmp_path / "npu-proxy.toml").write_text(f'model = "{MODEL}"\nrow_tokens = 64\non_empty = "placeholder"\n')
    assert call("embed", "", folder=tmp_path).returncode == 0
    assert call("embed", "", "--on-empty", "error", folder=tmp_path).returncode == 2
    (tmp_path / "npu-proxy.toml").write_text("timeot = 3\n")
    done = call("embed", "a", folder=tmp_path)
    assert done.returncode == 2
    assert "timeout" in done.stderr


def test_several_values_are_separated_by_commas_and_names_may_have_spaces(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "my model")
    assert call("embed", "the cat", NPU_PROXY_MODEL=f"{tmp_path / 'my model'},{MODEL}").returncode == 0


@pytest.mark.slow
def test_cache_commands(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"NPU_PROXY_CACHE_FOLDER": str(tmp_path / "vectors"), "NPU_PROXY_STORE": str(tmp_path / "store")}
    assert "cache_disk_mb" in call("cache", "stats", **settings).stderr
    assert call("pull", MODEL, **settings).returncode == 0
    assert call("embed", "the cat", "the dog", "--model", "mean", "--cache-disk-mb", "9", **settings).returncode == 0
    shown = call("cache", "stats", **settings).stdout
    assert "disk: 2 vectors" in shown
    assert shown.split()[-1] == "mean"
    assert "removed 0 vectors" in call("cache", "clear", "--only", "0" * 16, **settings).stdout
    assert "removed 2 vectors" in call("cache", "clear", "--only", "mean", **settings).stdout


@pytest.mark.slow
def test_store_commands(tmp_path: Path) -> None:
    store: dict[str, Any] = {"NPU_PROXY_STORE": str(tmp_path / "store")}
    assert "download the default one" in call("list", **store).stderr
    assert call("pull", MODEL, **store).returncode == 0
    assert call("list", **store).stdout.splitlines()[1].split()[0] == "mean"
    assert call("embed", "the cat", "--model", "mean", **store).returncode == 0
    assert "removed mean" in call("rm", "mean", **store).stdout


def test_help_and_version() -> None:
    assert call("--version").stdout.strip() == "0.1.0"
    text = call("serve", "--help").stdout
    assert "NPU_PROXY_PORT" in text
    assert call("embed", "--help").returncode == 0


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m npu_proxy embed --model {MODEL} " + "the cat " * 50 + "| head -c 10"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr
