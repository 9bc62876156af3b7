"""Packed and pruned against padded and whole, for models that read one token per text; reranking against sentence-transformers.

Pruned: the last layer is computed for the tokens that are read. `whole` computes it for every token, as others do.

The reranker and the CLS model are the default model's encoder with heads of random numbers: their scores mean nothing, their
cost is that of any reranker of that size (the scores are compared all the same). Texts: SciFact's claims and abstracts.
All systems take turns in one run; figures are pairs or texts per second, ratios are medians over the rounds.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from npu_proxy import EmbedRequest, Engine, OutputType, Pair, Pooling, Settings
from npu_proxy.engine import packing
from npu_proxy.models.store import ModelStore
from npu_proxy.settings import DEFAULT_MODEL
from peers import python_of, version_of

PEER = """
import json, sys, time
from sentence_transformers import CrossEncoder
import torch
model = CrossEncoder(sys.argv[1], device="cpu", max_length=512)
print("ready", flush=True)
for line in sys.stdin:
    pairs = json.load(open(line.strip()))
    start = time.perf_counter()
    scores = model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    print(json.dumps([time.perf_counter() - start, scores.tolist()]), flush=True)
"""


def folders(root: Path) -> tuple[Path, Path]:
    """A cross-encoder and a CLS embedder over the default model's encoder."""
    source = ModelStore(Settings().store).resolve(DEFAULT_MODEL)[1]
    ranker, reader = root / "ranker", root / "reader"
    for folder in (ranker, reader):
        folder.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
            if (source / name).is_file():
                shutil.copy(source / name, folder / name)
    config = json.loads((source / "config.json").read_text())
    tensors = {key: tensor for key, tensor in load_file(source / "model.safetensors").items() if "position_ids" not in key}
    save_file(tensors, reader / "model.safetensors")
    (reader / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    width = config["hidden_size"]
    made = {f"bert.{key}": tensor for key, tensor in tensors.items()}
    made |= {"bert.pooler.dense.weight": rng.normal(0, 0.05, [width, width]), "bert.pooler.dense.bias": np.zeros(width)}
    made |= {"classifier.weight": rng.normal(0, 0.5, [1, width]), "classifier.bias": np.zeros(1)}
    save_file({key: np.asarray(tensor, np.float32) for key, tensor in made.items()}, ranker / "model.safetensors", {"format": "pt"})
    head = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "score"}, "label2id": {"score": 0}}
    (ranker / "config.json").write_text(json.dumps({**config, **head}))
    return ranker, reader


def pairs_of(data: Path, queries: int, documents: int) -> dict[str, list[tuple[str, str]]]:
    """Claims with abstracts in the order of the corpus, and with texts of all lengths."""

    def read(name: str, limit: int, step: int = 1) -> list[dict]:
        with (data / name).open(encoding="utf-8") as file:
            return [json.loads(line) for _, line in zip(range(limit), islice(file, 0, None, step), strict=False)]

    count = queries * documents
    claims = [claim["text"] for claim in read("scifact/queries.jsonl", queries)]
    abstracts = [f"{abstract['title']} {abstract['text']}" for abstract in read("scifact/corpus.jsonl", count)]
    mixed = [entry["text"] for entry in read("corpus.jsonl", 4 * count, step=37)]
    return {
        "abstracts": [(claims[number // documents], text) for number, text in enumerate(abstracts)],
        "mixed": [(claims[number % queries], text) for number, text in enumerate(mixed)],
    }


@dataclass(frozen=True)
class System:
    """A process that computes scores of pairs, or vectors of their documents, when told to."""

    name: str
    command: Sequence[str]

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def systems(ranker: Path, reader: Path) -> list[System]:
    """Each is a process, so that it can build the graph differently."""
    ways = ("packed", "padded", "padded whole")
    own = [
        System(f"{kind}, {way}", [sys.executable, __file__, "--worker", kind, way, str(folder)])
        for kind, folder in (("rerank", ranker), ("CLS", reader))
        for way in ways
    ]
    python, why = python_of("sentence-transformers")
    if python is None:
        print(f"sentence-transformers is left out: {why}")
        return own
    print("sentence-transformers", version_of(python, "sentence-transformers"))
    return [*own, System("sentence-transformers", [python, "-c", PEER, str(ranker)])]


def worker(kind: str, way: str, folder: str) -> None:
    """For each line of standard input, a file of pairs, print the seconds it takes and the numbers."""
    if way.endswith("whole"):
        _compute_every_token()
    plain = Settings(device="cpu", cache_mb=0, packing=way == "packed", pooling=Pooling.CLS if kind == "CLS" else None)
    with Engine(folder, settings=plain) as engine:
        print("ready", flush=True)
        for line in sys.stdin:
            pairs = json.loads(Path(line.strip()).read_text())
            start = time.perf_counter()
            if kind == "CLS":
                found = engine.embed([document for _, document in pairs])[:, 0]
            else:
                request = EmbedRequest(texts=[Pair(*pair) for pair in pairs], output_type=OutputType.SCORES)
                found = np.asarray(engine.submit(request).result().raise_first().embeddings)[:, 0]
            print(json.dumps([time.perf_counter() - start, found.tolist()]), flush=True)


def _compute_every_token() -> None:
    """Make models compute the whole last layer: CLS is pooled by a product, as a mean is."""

    def fill_pooling(pooling: Pooling, pool: np.ndarray, segment: int, start: int, count: int, skip: int = 0) -> None:
        pool[segment, start] = 1

    Pooling.prunes = property(lambda _: False)  # pyright: ignore[reportAttributeAccessIssue]
    packing.fill_pooling = fill_pooling  # pyright: ignore[reportPrivateImportUsage]


def measure(ranker: Path, reader: Path, given: Sequence[Path], rounds: int) -> list[dict[str, list[float]]]:
    """For each file of pairs, the seconds of each round by system."""
    chosen = systems(ranker, reader)
    running = {system.name: system.start() for system in chosen}
    seconds: list[dict[str, list[float]]] = [{system.name: [] for system in chosen} for _ in given]
    numbers: dict[str, np.ndarray] = {}

    def ask(process: subprocess.Popen[str], file: Path) -> tuple[float, np.ndarray]:
        assert process.stdin
        assert process.stdout
        process.stdin.write(f"{file}\n")
        process.stdin.flush()
        took, found = json.loads(process.stdout.readline())
        return took, np.array(found)

    for process in running.values():
        assert process.stdout
        assert process.stdout.readline().strip() == "ready"
    for process in running.values():
        ask(process, given[0])  # warm
    for file, times in zip(given, seconds, strict=True):
        for _ in range(rounds):
            for name, process in running.items():
                took, numbers[name] = ask(process, file)
                times[name].append(took)
        for name, found in numbers.items():
            packed = "CLS, packed" if name.startswith("CLS") else "rerank, packed"
            print(f"{file.stem}: {name} to {packed}: largest difference {np.abs(found - numbers[packed]).max():.2g}")
    for process in running.values():
        assert process.stdin
        process.stdin.close()
        process.wait(timeout=60)
    return seconds


RATIOS = [
    (f"{kind}, packed", slower)
    for kind in ("rerank", "CLS")
    for slower in (f"{kind}, padded", f"{kind}, padded whole", "sentence-transformers")
    if kind == "rerank" or slower != "sentence-transformers"
]


def report(seconds: Mapping[str, dict[str, list[float]]], counts: Mapping[str, int], arguments: argparse.Namespace) -> None:
    lines = [
        "# Heads: packed and pruned against padded and whole, and reranking",
        "",
        f"`python bench/heads.py --rounds {arguments.rounds} --queries {arguments.queries} --documents {arguments.documents}`:"
        " limits 512 (pairs) and 512 (texts), fp32, systems in turn.",
    ]
    for name, times in seconds.items():
        lines += [
            "",
            f"## {counts[name]} pairs, {name}",
            "",
            "| system | per second, median | rounds (s) |",
            "| --- | --- | --- |",
        ]
        for system, took in times.items():
            rounds = ", ".join(f"{duration:.2f}" for duration in took)
            lines.append(f"| {system} | {counts[name] / statistics.median(took):.1f} | {rounds} |")
        lines.append("")
        for packed, slower in RATIOS:
            if slower in times:
                ratio = statistics.median(b / a for a, b in zip(times[packed], times[slower], strict=True))
                lines.append(f"- {packed} to {slower}: {ratio:.2f}")
    text = "\n".join(lines) + "\n"
    print(text)
    (Path(__file__).parent / "results" / "heads.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--queries", type=int, default=6)
    parser.add_argument("--documents", type=int, default=16)
    arguments = parser.parse_args()
    pairs = pairs_of(arguments.data, arguments.queries, arguments.documents)
    with tempfile.TemporaryDirectory() as root:
        ranker, reader = folders(Path(root))
        files = {name: Path(root) / f"{name}.json" for name in pairs}
        for name, file in files.items():
            file.write_text(json.dumps(pairs[name]))
        seconds = measure(ranker, reader, list(files.values()), arguments.rounds)
    report(dict(zip(pairs, seconds, strict=True)), {name: len(chosen) for name, chosen in pairs.items()}, arguments)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main()
