"""Jobs over files: what they cost beside the engine, what a cluster costs, and peers' own ways. Writes bench/results/bulk.json.

.venv/bin/python bench/bulk.py debug real kills      # rows through an engine that computes nothing; the corpus with the default model
.venv-bulk/bin/python bench/bulk.py cluster          # two workers of Ray against one process on the same cores
.venv/bin/python bench/bulk.py peers                 # sentence-transformers, FastEmbed, Infinity and Ray Data, each in its environment
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from npu_proxy import Engine, Settings
from npu_proxy.bulk.columns import ColumnOptions, columns_of
from npu_proxy.bulk.files import find_inputs
from npu_proxy.bulk.job import Job, run
from npu_proxy.bulk.rows import RowOptions
from npu_proxy.bulk.texts import TextSource
from npu_proxy.models.store import ModelStore
from npu_proxy.settings import DEFAULT_MODEL
from npu_proxy.types import EmbedResult, OutputType
from peers import ROOT, onnx_folder, python_of

RESULTS = ROOT / "bench" / "results" / "bulk.json"
SENTENCE = "the cat sat on a mat and saw dogs run in the big green park near my old house by a river with two boats"
WORDS = SENTENCE.split(" ")


def short_texts(path: Path, count: int) -> list[str]:
    """Short texts, 3 % of which occur twice."""
    numbers = random.Random(1)
    texts = [f"{n % int(count * 0.97)} " + " ".join(numbers.choices(WORDS, k=numbers.randint(3, 9))) for n in range(count)]
    path.write_text("".join(json.dumps({"id": n, "source": "x", "text": text}) + "\n" for n, text in enumerate(texts)))
    return texts


def job_of(engine: Engine, source: Path, target: Path) -> Job:
    rows = RowOptions(text=TextSource(), columns=columns_of("dense", engine.spec, {}, ColumnOptions()))
    return Job(files=find_inputs([str(source)]), rows=rows, metadata={}, target=target, start="overwrite")


def seconds_of(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def consume(results: Iterable[EmbedResult]) -> None:
    for _ in results:
        pass


class Memory(threading.Thread):
    """Samples the resident memory of a process and its children, in MB, every half second."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.process, self.samples, self.over = process, list[tuple[float, float]](), threading.Event()
        self.start()

    def run(self) -> None:
        begun = time.perf_counter()
        while not self.over.wait(0.5):
            self.samples.append((time.perf_counter() - begun, tree_mb(self.process)))

    def peak(self) -> float:
        self.over.set()
        self.join()
        return max((size for _, size in self.samples), default=0.0)


def tree_mb(process: int) -> float:
    """Proportional set size of a process tree, so that shared pages count once."""
    total, open_ = 0.0, [process]
    while open_:
        number = open_.pop()
        try:
            for task in Path(f"/proc/{number}/task").iterdir():
                open_ += map(int, (task / "children").read_text().split())
            rollup = Path(f"/proc/{number}/smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 1000
        except (OSError, StopIteration):
            continue
    return total


# -- sections ------------------------------------------------------------------------------------------------------------


def debug(folder: Path, count: int, data: Path) -> dict[str, object]:
    """A million short texts through an engine that computes nothing: the job's rate beside the engine's, and its memory."""
    texts = short_texts(folder / "short.jsonl", count)
    half = texts[: count // 4]
    short_texts(folder / "part.jsonl", count // 4)
    ratios: list[float] = []
    with Engine(settings=Settings(device="debug")) as plain, Engine(settings=Settings(device="debug", cache_mb=0)) as engine:
        for _ in range(3):
            own = seconds_of(lambda: consume(plain.results(half)))
            job = seconds_of(lambda: run(job_of(engine, folder / "part.jsonl", folder / "part.parquet"), engine.results))
            ratios.append(own / job)
            print(f"engine {len(half) / own:,.0f} texts/s, job {len(half) / job:,.0f} texts/s, {own / job:.2f}", flush=True)
    command = [
        sys.executable,
        "-m",
        "npu_proxy",
        "embed",
        "--input",
        "short.jsonl",
        "--output",
        "short.parquet",
        "--device",
        "debug",
    ]
    begun = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    memory = Memory(process.pid)
    _, told = process.communicate()
    seconds = time.perf_counter() - begun
    peak = memory.peak()
    tenth = next(size for at, size in memory.samples if at > seconds / 10)
    print(f"{count:,} texts in {seconds:.0f} s, {tenth:.0f} MB after a tenth, {peak:.0f} MB at most", flush=True)
    return {"ratios": ratios, "texts": count, "seconds": seconds, "mb_after_a_tenth": tenth, "mb_peak": peak, "told": told[-300:]}


def real(folder: Path, count: int, data: Path) -> dict[str, object]:
    """The corpus with the default model: the job beside the engine."""
    source = data / "corpus.jsonl"
    texts = [json.loads(line)["text"] for line in source.read_text().splitlines()]
    with Engine(settings=Settings(cache_mb=0)) as engine:
        consume(engine.results(texts[:500]))
        own = seconds_of(lambda: consume(engine.results(texts)))
        job = seconds_of(lambda: run(job_of(engine, source, folder / "real.parquet"), engine.results))
    print(f"engine {len(texts) / own:.1f} texts/s, job {len(texts) / job:.1f} texts/s, {own / job:.3f}", flush=True)
    return {"ratio": own / job, "texts": len(texts), "engine_seconds": own, "job_seconds": job}


def cluster(folder: Path, count: int, data: Path) -> dict[str, object]:
    """Two workers of a local Ray cluster, one thread each, against one process with two threads."""
    from npu_proxy.ray.cluster import Cluster, ClusterOptions

    texts = [json.loads(line)["text"] for line in (data / "corpus.jsonl").read_text().splitlines()][:3000]
    rates = list[tuple[float, float, float]]()
    least, most = (ClusterOptions(address="local", workers=(count, count)) for count in (1, 2))
    with Cluster(most, Settings(), OutputType.DENSE, {}) as workers, Engine(settings=Settings(cache_mb=0)) as engine:
        for compute in (workers, engine.results):
            consume(compute(texts[:300]))
        for _ in range(3):
            one = seconds_of(lambda: consume(engine.results(texts)))
            two = seconds_of(lambda: consume(workers(texts)))
            rates.append((0.0, len(texts) / one, len(texts) / two))
            print(f"one process {rates[-1][1]:.1f} texts/s, two workers {rates[-1][2]:.1f} texts/s, {one / two:.3f}", flush=True)
    with Cluster(least, Settings(), OutputType.DENSE, {}) as worker:
        consume(worker(texts[:300]))
        for place, (_, one, two) in enumerate(rates):
            rates[place] = (len(texts) / seconds_of(lambda: consume(worker(texts))), one, two)
            print(f"one worker {rates[place][0]:.1f} texts/s", flush=True)
    return {"rates": rates}


PEERS = {
    "npu-proxy embed": (
        "npu-proxy",
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'npu_proxy', 'embed', '--input', TEXTS, '--output', 'ours.npy', '--overwrite'], check=True)\n",
    ),
    "sentence-transformers, 2 processes": (
        "sentence-transformers",
        "from sentence_transformers import SentenceTransformer\n"
        "def go():\n"
        "    model = SentenceTransformer(MODEL, device='cpu')\n"
        "    pool = model.start_multi_process_pool(['cpu', 'cpu'])\n"
        "    model.encode(texts(), pool=pool)\n"
        "    model.stop_multi_process_pool(pool)\n"
        "if __name__ == '__main__':\n    go()\n",
    ),
    "sentence-transformers, 1 process": (
        "sentence-transformers",
        "from sentence_transformers import SentenceTransformer\nSentenceTransformer(MODEL, device='cpu').encode(texts())\n",
    ),
    "FastEmbed, parallel=2": (
        "fastembed",
        "from fastembed import TextEmbedding\n"
        "from fastembed.common.model_description import ModelSource, PoolingType\n"
        "def go():\n"
        "    TextEmbedding.add_custom_model(model='local/minilm', pooling=PoolingType.MEAN, normalization=True,\n"
        "        sources=ModelSource(hf='local/minilm'), dim=384)\n"
        "    list(TextEmbedding('local/minilm', specific_model_path=ONNX).embed(texts(), parallel=2))\n"
        "if __name__ == '__main__':\n    go()\n",
    ),
    "Infinity, engine": (
        "infinity",
        "import asyncio\n"
        "from infinity_emb import AsyncEmbeddingEngine, EngineArgs\n"
        "async def go():\n"
        "    args = EngineArgs(model_name_or_path=MODEL, engine='torch', device='cpu', model_warmup=False, bettertransformer=False)\n"
        "    engine = AsyncEmbeddingEngine.from_args(args)\n"
        "    await engine.astart()\n"
        "    await engine.embed(sentences=texts())\n"
        "    await engine.astop()\n"
        "asyncio.run(go())\n",
    ),
}


def peers(folder: Path, count: int, data: Path) -> dict[str, object]:
    """The same texts, from a file to vectors, each library's own way, in turn; texts per second and memory of the whole tree."""
    model = str(ModelStore(Settings().store).resolve(DEFAULT_MODEL)[1])
    onnx = str(onnx_folder(Path(model)))
    texts = (data / "corpus.jsonl").read_text().splitlines()[:1500]
    (folder / "texts.jsonl").write_text("\n".join(texts) + "\n")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in PEERS}
    for _ in range(2):
        for name, (system, code) in PEERS.items():
            python, why = python_of(system)
            if python is None:
                print(f"{name}: {why}", flush=True)
                continue
            head = (
                f"import json\nMODEL, ONNX, TEXTS = {model!r}, {onnx!r}, {str(folder / 'texts.jsonl')!r}\n"
                "def texts():\n    return [json.loads(line)['text'] for line in open(TEXTS)]\n"
            )
            (folder / "peer.py").write_text(head + code)
            clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "MKL_"))}
            begun = time.perf_counter()
            process = subprocess.Popen(
                [python, "peer.py"], cwd=folder, env=clean | {"HF_HUB_OFFLINE": "1"}, stderr=subprocess.PIPE, text=True
            )
            memory = Memory(process.pid)
            _, told = process.communicate()
            seconds = time.perf_counter() - begun
            if process.returncode:
                print(f"{name}: failed: {told.strip().splitlines()[-1:]}", flush=True)
                continue
            found[name].append((len(texts) / seconds, memory.peak()))
            print(f"{name}: {len(texts) / seconds:.1f} texts/s, {found[name][-1][1]:.0f} MB", flush=True)
    return {name: rounds for name, rounds in found.items() if rounds}


def kills(folder: Path, count: int, data: Path) -> dict[str, object]:
    """A job that is killed twenty times at random moments, and one that is not: the same bytes."""
    short_texts(folder / "short.jsonl", 400_000)
    numbers = random.Random(3)
    base = [
        sys.executable,
        "-m",
        "npu_proxy",
        "embed",
        "--input",
        "short.jsonl",
        "--device",
        "debug",
        "--progress",
        "none",
        "--output",
    ]
    subprocess.run([*base, "whole.parquet"], cwd=folder, check=True, stderr=subprocess.DEVNULL)
    killed = 0
    while killed < 20:
        process = subprocess.Popen([*base, "out.parquet", "--resume"], cwd=folder, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=2 + 4 * numbers.random())
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    if not (folder / "out.parquet").exists():
        subprocess.run([*base, "out.parquet", "--resume"], cwd=folder, check=True, stderr=subprocess.DEVNULL)
    same = (folder / "out.parquet").read_bytes() == (folder / "whole.parquet").read_bytes()
    print(f"killed {killed} times; the output is {'the same' if same else 'NOT the same'}", flush=True)
    return {"killed": killed, "same": same}


SECTIONS = {"debug": debug, "real": real, "cluster": cluster, "peers": peers, "kills": kills}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("sections", nargs="+", choices=SECTIONS)
    arguments.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    arguments.add_argument("--texts", type=int, default=1_000_000)
    given = arguments.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for section in given.sections:
        with tempfile.TemporaryDirectory() as folder:
            results[section] = SECTIONS[section](Path(folder), given.texts, given.data)
        RESULTS.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
