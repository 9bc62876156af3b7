"""A local Ray cluster of two nodes: the same output as one process, also when actors and nodes die. Needs Ray (`make bulk`)."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import golden
from npu_proxy import DeviceError, Engine, InputError, ModelError, Settings
from npu_proxy.bulk.columns import ColumnOptions, columns_of
from npu_proxy.bulk.files import find_inputs
from npu_proxy.bulk.job import Job, run
from npu_proxy.bulk.rows import RowOptions
from npu_proxy.bulk.texts import TextSource
from npu_proxy.ray import deployment, embed_dataset
from npu_proxy.ray.cluster import Cluster, ClusterOptions
from npu_proxy.ray.serve import replicas_for
from npu_proxy.ray.worker import units
from npu_proxy.types import EmbedResult, OutputType, TextInput

ray = pytest.importorskip("ray")
MODEL = str(golden("mean")[0])
DEBUG = Settings(model=(MODEL,), device="debug")
CPU = Settings(model=(MODEL,), device="cpu")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A cluster whose head has no processors, and two nodes with two each."""
    from ray.cluster_utils import Cluster as Nodes

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.workers = [cluster.add_node(num_cpus=2) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def make_job(engine: Engine, source: Path, target: Path) -> Job:
    columns = columns_of("dense", engine.spec, {}, ColumnOptions())
    rows = RowOptions(text=TextSource(), columns=columns)
    metadata = {"fingerprint": engine.spec.fingerprint}
    return Job(files=find_inputs([str(source)]), rows=rows, metadata=metadata, target=target, max_errors=100)


def write_rows(path: Path, count: int) -> Path:
    rows = [{"text": "" if number == 77 else f"cat {number % (count - 99)} " + "sea " * (number % 30)} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_same_output_as_one_process_though_an_actor_and_a_node_die(nodes: Any, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", 60_000)
    with Engine(settings=DEBUG) as engine:
        run(make_job(engine, source, tmp_path / "one.parquet"), engine.results)
        options = ClusterOptions(address="auto", workers=(2, 3))
        with Cluster(options, DEBUG, OutputType.DENSE, {}) as cluster:
            deaths: list[str] = []

            def disturb() -> None:
                time.sleep(1)
                process = int(ray.get(next(iter(cluster._actors)).describe.remote())["process"])
                os.kill(process, signal.SIGKILL)
                deaths.append("actor")
                time.sleep(2)
                nodes.remove_node(nodes.workers[0], allow_graceful=False)
                deaths.append("node")

            thread = threading.Thread(target=disturb)
            results = 0

            def compute(texts: Iterable[TextInput]) -> Iterator[EmbedResult]:
                nonlocal results
                for result in cluster(texts):
                    results += 1
                    if results == 3:
                        thread.start()
                    time.sleep(0.05)
                    yield result

            done = run(make_job(engine, source, tmp_path / "two.parquet"), compute)
            thread.join()
    assert deaths == ["actor", "node"]
    assert (done.rows, done.failed) == (60_000, 1)
    assert (tmp_path / "two.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()


def test_a_dataset_with_vectors(nodes: Any, tmp_path: Path) -> None:
    rows = [{"id": number, "text": None if number == 5 else "" if number == 6 else f"cat {number}"} for number in range(600)]
    dataset = ray.data.from_arrow(pa.Table.from_pylist(rows))
    made = embed_dataset(dataset, settings=CPU, workers=(1, 2), batch_size=100, dtype="float16", dimensions=16)
    made.write_parquet(str(tmp_path / "out"))
    found = pq.read_table(tmp_path / "out").sort_by("id")
    with Engine(settings=CPU) as engine:
        good = [row["text"] for row in rows if row["text"]]
        expected = engine.embed(good, dimensions=16)
    assert found["embedding"].type == pa.list_(pa.float16(), 16)
    assert [row for row, error in enumerate(found["error"].to_pylist()) if error] == [5, 6]
    vectors = np.array([vector for vector in found["embedding"].to_pylist() if vector], np.float32)
    assert (vectors * expected).sum(axis=1) == pytest.approx(1, abs=2e-3)
    labels = embed_dataset(
        ray.data.from_items([{"text": "the cat"}]),
        settings=Settings(model=(str(golden("mean")[0].parent / "roberta_labels"),)),
        output="labels",
    )
    assert labels.take_all()[0]["label"].startswith("LABEL_")
    clash = embed_dataset(ray.data.from_items([{"text": "a", "tokens": 1}]), settings=CPU)
    with pytest.raises(Exception, match="has a column `tokens`"):
        clash.take_all()


def test_replicas_serve_every_api(nodes: Any) -> None:
    import urllib.request

    serve: Any = pytest.importorskip("ray.serve")
    serve.start(http_options={"port": 18123})
    serve.run(deployment(CPU, replicas=(1, 2)), name="embeddings")
    try:
        with Engine(settings=CPU) as engine:
            expected = engine.embed(["the cat"])[0].tolist()

        def ask(path: str, body: dict[str, Any]) -> Any:
            request = urllib.request.Request(
                f"http://127.0.0.1:18123{path}", json.dumps(body).encode(), {"content-type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)

        assert ask("/v1/embeddings", {"model": "mean", "input": "the cat"})["data"][0]["embedding"] == pytest.approx(
            expected, abs=1e-6
        )
        assert ask("/embed", {"inputs": ["the cat"]})[0] == pytest.approx(expected, abs=1e-6)
        assert ask("/api/embed", {"model": "mean", "input": "the cat"})["embeddings"][0] == pytest.approx(expected, abs=1e-6)
        status = serve.status().applications["embeddings"].deployments["npu-proxy"]
        assert status.replica_states == {"RUNNING": 1}
    finally:
        serve.shutdown()


def test_what_is_wrong_is_said_before_any_work(nodes: Any) -> None:
    with pytest.raises(InputError, match="workers must be 1 or more"):
        Cluster(ClusterOptions(address="auto", workers=(3, 2)), CPU, OutputType.DENSE, {})
    missing = Settings(model=("/no/such/model",))
    with (
        pytest.raises((ModelError, InputError, DeviceError), match="does not exist"),
        Cluster(ClusterOptions(address="auto"), missing, OutputType.DENSE, {}),
    ):
        pass


def test_units_hold_about_equal_work() -> None:
    texts = ["a" * 150_000, "b" * 150_000, *["c"] * 3000]
    found = list(units(texts))
    assert [text for unit in found for text in unit] == texts
    assert [len(unit) for unit in found] == [2, 1024, 1024, 952]


@pytest.mark.parametrize(
    ("waiting", "current", "expected"), [(0, 1, 1), (0, 4, 3), (100, 1, 1), (101, 1, 2), (950, 2, 10), (950, 12, 11)]
)
def test_replicas_follow_the_tokens_that_wait(waiting: float, current: int, expected: int) -> None:
    assert replicas_for(waiting, 100, current) == expected
