"""The npm clients of OpenAI, Azure, Ollama, Cohere, Voyage, Mistral, Google and Hugging Face against a running server."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from conftest import Server

FOLDER = Path(__file__).parent / "npm"


def test_npm_clients(many_names: Server, reference: tuple[list[dict], np.ndarray]) -> None:
    if shutil.which("node") is None or not (FOLDER / "node_modules").is_dir():
        pytest.skip("the npm clients are not installed; `make clients` does it")
    rows, vectors = reference
    chosen = [0, 1, 2, 150, 299]
    given = {
        "url": many_names.url,
        "texts": [rows[index]["text"] for index in chosen],
        "vectors": vectors[chosen].astype(float).tolist(),
    }
    done = subprocess.run(
        ["node", "clients.mjs"], cwd=FOLDER, input=json.dumps(given), capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 21, done.stdout
