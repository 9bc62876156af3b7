"""Packed against padded for models that read one token a text, and reranking against sentence-transformers' CrossEncoder.

The reranker and the CLS model are the default model's encoder with heads of random numbers: their answers mean nothing, their
cost is that of any reranker of that size (the answers are compared all the same). Texts: SciFact's claims and abstracts.
All systems take turns in one run; figures are pairs or texts a second, ratios are medians over the rounds.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from npu_proxy import EmbedRequest, Engine, Kind, Pair, Settings
from npu_proxy.models.catalog import DEFAULT_MODEL
from npu_proxy.models.store import Store
from peers import python_of, version_of

PEER = """
import json, sys, time
from sentence_transformers import CrossEncoder
import torch
model = CrossEncoder(sys.argv[1], device="cpu", max_length=512)
pairs = json.load(open(sys.argv[2]))
print("ready", flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    scores = model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    print(json.dumps([time.perf_counter() - start, scores.tolist()]), flush=True)
"""


def folders(root: Path) -> tuple[Path, Path]:
    """A cross-encoder and a CLS embedder over the default model's encoder."""
    source = Store(Settings().store).resolve(DEFAULT_MODEL)[1]
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
    one = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "score"}, "label2id": {"score": 0}}
    (ranker / "config.json").write_text(json.dumps({**config, **one}))
    return ranker, reader


def pairs_of(data: Path, queries: int, documents: int) -> list[tuple[str, str]]:
    """Claims with abstracts that lie behind each other in the corpus."""

    def read(name: str, limit: int) -> list[dict]:
        with (data / "scifact" / name).open(encoding="utf-8") as file:
            return [json.loads(line) for _, line in zip(range(limit), file, strict=False)]

    found = read("corpus.jsonl", queries * documents)
    claims = read("queries.jsonl", queries)
    return [(claims[number // documents]["text"], f"{one['title']} {one['text']}") for number, one in enumerate(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--documents", type=int, default=20)
    arguments = parser.parse_args()
    pairs = pairs_of(arguments.data, arguments.queries, arguments.documents)
    with tempfile.TemporaryDirectory() as root:
        ranker, reader = folders(Path(root))
        given = Path(root) / "pairs.json"
        given.write_text(json.dumps(pairs))
        report(measure(ranker, reader, given, pairs, arguments.rounds), arguments, pairs)


def measure(ranker: Path, reader: Path, given: Path, pairs: Sequence[tuple[str, str]], rounds: int) -> dict[str, list[float]]:
    """Seconds a round, a system."""
    plain = {"device": "cpu", "cache_mb": 0}
    engines = {
        "rerank, packed": Engine(ranker, settings=Settings(**plain)),
        "rerank, padded": Engine(ranker, settings=Settings(**plain, packing=False)),
        "CLS, packed": Engine(reader, settings=Settings(**plain, pooling="cls")),
        "CLS, padded": Engine(reader, settings=Settings(**plain, pooling="cls", packing=False)),
    }
    texts = [document for _, document in pairs]
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    answers: dict[str, np.ndarray] = {}

    def ask(name: str) -> np.ndarray:
        engine = engines[name]
        if name.startswith("CLS"):
            return engine.embed(texts)
        request = EmbedRequest(texts=[Pair(*pair) for pair in pairs], want=Kind.SCORES)
        return np.asarray(engine.submit(request).result().raise_first().embeddings)[:, 0]

    def timed(name: str, work: Callable[[], np.ndarray]) -> None:
        start = time.perf_counter()
        answers[name] = work()
        seconds[name].append(time.perf_counter() - start)

    python, why = python_of("sentence-transformers")
    peer = None
    if python is None:
        print(f"sentence-transformers is left out: {why}")
    else:
        print("sentence-transformers", version_of(python, "sentence-transformers"))
        command = [python, "-c", PEER, str(ranker), str(given)]
        peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert peer.stdin
        assert peer.stdout
        assert peer.stdout.readline().strip() == "ready"
        seconds["sentence-transformers"] = []
    for engine in engines.values():
        engine.start()
    for name in engines:
        ask(name)  # warm
    for _ in range(rounds):
        for name in engines:
            timed(name, lambda name=name: ask(name))
        if peer is not None:
            peer.stdin.write("go\n")
            peer.stdin.flush()
            took, scores = json.loads(peer.stdout.readline())
            seconds["sentence-transformers"].append(took)
            answers["sentence-transformers"] = np.array(scores)
    for engine in engines.values():
        engine.stop()
    if peer is not None:
        peer.stdin.close()
        peer.wait(timeout=30)
        far = np.abs(answers["rerank, packed"] - answers["sentence-transformers"]).max()
        print(f"largest difference of logits to sentence-transformers: {far:.2g}")
    print(f"largest difference packed to padded: {np.abs(answers['rerank, packed'] - answers['rerank, padded']).max():.2g}")
    return seconds


def report(seconds: dict[str, list[float]], arguments: argparse.Namespace, pairs: Sequence[tuple[str, str]]) -> None:
    lines = [
        "# Heads: packed against padded, and reranking",
        "",
        f"`python bench/heads.py --rounds {arguments.rounds} --queries {arguments.queries} --documents {arguments.documents}`:"
        f" {len(pairs)} pairs, limits 512 (pairs) and 512 (texts), fp32, systems in turn.",
        "",
        "| system | a second, median | rounds (s) |",
        "| --- | --- | --- |",
    ]
    for name, times in seconds.items():
        lines.append(f"| {name} | {len(pairs) / statistics.median(times):.1f} | {', '.join(f'{one:.2f}' for one in times)} |")
    lines.append("")
    ratios = [("rerank, packed", "rerank, padded"), ("CLS, packed", "CLS, padded"), ("rerank, packed", "sentence-transformers")]
    for one, other in ratios:
        if other in seconds:
            ratio = statistics.median(b / a for a, b in zip(seconds[one], seconds[other], strict=True))
            lines.append(f"- {one} to {other}: {ratio:.2f}")
    text = "\n".join(lines) + "\n"
    print(text)
    (Path(__file__).parent / "results" / "heads.md").write_text(text)


if __name__ == "__main__":
    main()
