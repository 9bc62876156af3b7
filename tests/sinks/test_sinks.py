"""Databases and indexes as outputs, each against the real library: right vectors, rows by id, and what is gone is deleted.

They need the packages of the dependency group `bulk` (`make bulk`); those that are not installed are skipped.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from conftest import GOLDEN, golden
from npu_proxy import Chunking, Engine, InputError
from npu_proxy.bulk.columns import ColumnOptions, columns_of
from npu_proxy.bulk.files import find_inputs
from npu_proxy.bulk.job import Job, Progress, run
from npu_proxy.bulk.rows import RowOptions
from npu_proxy.bulk.sinks.table import as_target
from npu_proxy.bulk.texts import TextSource
from npu_proxy.types import EmbedResult, TextInput

TEXTS = ["the cat", "the dog", "the cat", "sea", "", "a 'quoted' \"text\"\0"]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(golden("mean")[0]) as made:
        yield made


class Killed(BaseException):
    """As sudden as a kill."""


def embed(
    engine: Engine, output: str, rows: Iterable[dict[str, Any]], *, stop_after: int | None = None, **changes: Any
) -> Progress:
    """Write rows to an output. stop_after: be killed after so many results."""
    source = Path("in.jsonl")
    content = "".join(json.dumps(row) + "\n" for row in rows)
    if not source.exists() or source.read_text() != content:  # a file that was written again is another input
        source.write_text(content)
    options: Any = changes.pop("options", {})
    kind: Any = changes.pop("kind", "dense")
    columns = columns_of(kind, engine.spec, options, ColumnOptions(per_chunk="chunking" in options))
    row_options = RowOptions(
        text=TextSource(),
        columns=columns,
        id_field=changes.pop("id_field", None),
        hash_rows=":" in output,
        keep=changes.pop("keep", None),
    )
    metadata = {"fingerprint": engine.spec.fingerprint, "dtype": str(options.get("dtype", "float32"))}
    job = Job(
        files=find_inputs([str(source)]), rows=row_options, metadata=metadata, target=as_target(output), max_errors=9, **changes
    )

    def compute(texts: Iterable[TextInput]) -> Iterator[EmbedResult]:
        for count, result in enumerate(engine.results(texts, batch_size=2, output_type=columns.output_type, **options)):
            if count == stop_after:
                raise Killed
            yield result

    return run(job, compute)


Read = Callable[[], dict[str, tuple[str, Any]]]
"""The rows of a database: id to text and vector."""


def lancedb_rows(key: str = "row_id") -> dict[str, tuple[str, Any]]:
    import lancedb

    rows = lancedb.connect("lance").open_table("texts").to_arrow().to_pylist()
    return {str(row[key]): (row["text"], row["embedding"]) for row in rows}


def duckdb_rows(key: str = "row_id", text: str = "text") -> dict[str, tuple[str, Any]]:
    import duckdb

    with duckdb.connect("file.duckdb") as connection:
        return {
            str(row[0]): (row[1], row[2]) for row in connection.execute(f"SELECT {key}, {text}, embedding FROM texts").fetchall()
        }


def qdrant_rows(key: str = "row_id") -> dict[str, tuple[str, Any]]:
    from qdrant_client import QdrantClient

    client = QdrantClient(path="qdrant")
    points, _ = client.scroll("texts", limit=10_000, with_vectors=True)
    client.close()
    return {str(point.payload[key]): (point.payload["text"], point.vector["dense"]) for point in points if key in point.payload}


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pgserver = pytest.importorskip("pgserver")
    with pgserver.get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="stop") as server:
        yield server.get_uri()


def check(engine: Engine, output: str, read: Callable[..., dict[str, tuple[str, Any]]]) -> None:
    rows = [{"n": number, "text": text} for number, text in enumerate(TEXTS)]
    assert embed(engine, output, rows).failed == 1
    found = read()
    assert sorted(text for text, _ in found.values()) == sorted(
        text.replace("\0", "\ufffd") if "postgres" in output else text for text in TEXTS if text
    )
    vectors = np.array([vector for _, vector in found.values()], np.float32)
    expected = engine.embed([text for text, _ in found.values()])
    assert (vectors * expected).sum(axis=1) == pytest.approx(1, abs=1e-5)
    with pytest.raises(InputError, match="exists; bring it up to date with --update, or replace it with --overwrite"):
        embed(engine, output, rows)

    changed = [{"n": 7, "text": "new"}, *rows[1:]]
    done = embed(engine, output, changed, start="update")
    after = read()
    assert sorted(text for text, _ in after.values()).count("new") == 1
    assert len(after) == 5
    assert done.deleted == 1
    assert done.unchanged == 3  # the second row of `the cat` is now the first
    assert embed(engine, output, changed, start="update").unchanged == 5
    assert read().keys() == after.keys()
    with pytest.raises(InputError, match="was made with dtype=float32, and now it is float16"):
        embed(engine, output, changed, start="update", options={"dtype": "float16"})
    embed(engine, output, rows[:1], start="overwrite", id_field="n")
    assert list(read("n")) == ["0"]

    many = [{"n": number, "text": f"cat {number}"} for number in range(60)]
    with pytest.raises(Killed):
        embed(engine, output, many, start="overwrite", id_field="n", stop_after=20)
    embed(engine, output, many, start="resume" if list(Path.cwd().glob("*.job/part*")) else "overwrite", id_field="n")
    assert {int(key): text for key, (text, _) in read("n").items()} == {row["n"]: row["text"] for row in many}
    assert not list(Path.cwd().glob("*.job"))


def test_lancedb(engine: Engine) -> None:
    pytest.importorskip("lancedb")
    check(engine, "lancedb:lance", lancedb_rows)


def test_duckdb(engine: Engine) -> None:
    pytest.importorskip("duckdb")
    check(engine, "duckdb:file.duckdb", duckdb_rows)


def test_qdrant(engine: Engine) -> None:
    pytest.importorskip("qdrant_client")
    check(engine, "qdrant:qdrant", qdrant_rows)


def test_postgresql(engine: Engine, postgres: str) -> None:
    psycopg = pytest.importorskip("psycopg")

    def rows(key: str = "row_id") -> dict[str, tuple[str, Any]]:
        with psycopg.connect(postgres) as connection:
            found = connection.execute(f"SELECT {key}, text, embedding::text FROM texts").fetchall()
        return {str(row[0]): (row[1], json.loads(row[2])) for row in found}

    check(engine, postgres, rows)
    with psycopg.connect(postgres) as connection:
        query = str(engine.embed(["cat 7"])[0].tolist())
        best = connection.execute("SELECT text FROM texts ORDER BY embedding <=> %s::vector LIMIT 1", [query]).fetchone()
    assert best == ("cat 7",)


@pytest.mark.parametrize("at", ["first", "last"])
def test_a_job_killed_while_it_delivers_goes_on(engine: Engine, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("duckdb")
    from npu_proxy.bulk import parts
    from npu_proxy.bulk.sinks.duckdb import DuckSink

    monkeypatch.setattr(parts, "PART_ROWS", 5)
    rows = [{"n": number, "text": f"cat {number}"} for number in range(30)]
    whole, calls = DuckSink.upsert, 0

    def dying(sink: Any, table: Any) -> None:
        nonlocal calls
        calls += 1
        whole(sink, table)
        if at == "first" or table["n"].to_pylist()[-1] == 29:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(DuckSink, "upsert", dying)
        with pytest.raises(Killed):
            embed(engine, "duckdb:file.duckdb", rows, id_field="n")
    assert calls
    embed(engine, "duckdb:file.duckdb", rows, id_field="n", start="resume")
    assert sorted(map(int, duckdb_rows("n"))) == list(range(30))


def test_chunks_in_postgresql_are_vectors(engine: Engine, postgres: str) -> None:
    psycopg = pytest.importorskip("psycopg")
    options = {"truncate": "chunk", "chunking": Chunking(spans=True)}
    embed(engine, f"{postgres}#chunks", [{"text": "the cat. " * 60}], options=options)
    with psycopg.connect(postgres) as connection:
        kind = connection.execute("SELECT pg_typeof(embedding)::text, count(*) FROM chunks GROUP BY 1").fetchone()
    assert kind is not None
    assert (kind[0], kind[1] > 1) == ("vector", True)


def test_a_row_per_chunk_has_a_key_of_its_own(engine: Engine) -> None:
    pytest.importorskip("duckdb")
    options = {"truncate": "chunk", "chunking": Chunking(spans=True)}
    rows = [{"n": 1, "text": "the cat. " * 60}, {"n": 2, "text": "sea"}]
    embed(engine, "duckdb:file.duckdb", rows, options=options, id_field="n")
    keys = sorted(duckdb_rows("chunk_id", "chunk_text"))
    assert keys[:2] == ["1:0", "1:1"]
    assert keys[-1] == "2:0"
    rows[0]["text"] = "the cat. " * 3
    done = embed(engine, "duckdb:file.duckdb", rows, options=options, id_field="n", start="update")
    assert sorted(duckdb_rows("chunk_id", "chunk_text")) == ["1:0", "2:0"]
    assert (done.unchanged, done.deleted) == (1, len(keys) - 2)


def test_qdrant_has_sparse_and_token_vectors() -> None:
    client = pytest.importorskip("qdrant_client")
    for model, kind in (("bert_splade", "sparse"), ("colbert", "tokens")):
        with Engine(GOLDEN / model) as engine:
            embed(engine, f"qdrant:{kind}#texts", [{"text": "the cat"}, {"text": "sea"}], kind=kind)
            expected: Any = engine.embed_sparse(["the cat"])[0] if kind == "sparse" else engine.embed_tokens(["the cat"])[0]
        opened = client.QdrantClient(path=kind)
        points = [point for point in opened.scroll("texts", with_vectors=True)[0] if "text" in point.payload]
        vector = next(point.vector[kind] for point in points if point.payload["text"] == "the cat")
        if kind == "sparse":
            assert vector.indices == expected.indices.tolist()
            assert vector.values == pytest.approx(expected.values.tolist())
        else:
            assert np.array(vector) == pytest.approx(np.asarray(expected), abs=1e-5)
        opened.close()


def test_values_of_another_type_are_refused_by_name(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("duckdb")
    from npu_proxy.bulk import parts, readers

    monkeypatch.setattr(readers, "BLOCK_ROWS", 2)
    monkeypatch.setattr(parts, "PART_ROWS", 2)
    rows: list[dict[str, Any]] = [{"n": 1, "text": "a"}, {"n": 2, "text": "b"}, {"n": "three", "text": "c"}]
    with pytest.raises(InputError, match=r"column `n` is new or of another type from row 2 on .*--columns"):
        embed(engine, "duckdb:file.duckdb", rows)
    embed(engine, "duckdb:file.duckdb", rows, keep=["text"], start="overwrite")
    assert len(duckdb_rows()) == 3


@pytest.mark.parametrize("dtype", ["float32", "ubinary"])
def test_indexes_have_the_rows_numbers_as_keys(engine: Engine, dtype: str) -> None:
    rows = [{"text": text} for text in TEXTS]
    options: Any = {"dtype": dtype}
    query = engine.embed(["sea"], **options)
    faiss, usearch = pytest.importorskip("faiss"), pytest.importorskip("usearch.index")
    embed(engine, "out.faiss", rows, options=options)
    index = (faiss.read_index_binary if dtype == "ubinary" else faiss.read_index)("out.faiss")
    assert index.ntotal == 5
    assert index.search(query, 1)[1].tolist() == [[3]]
    assert pq.read_table("out.faiss.rows.parquet")["text"].to_pylist() == TEXTS
    embed(engine, "out.usearch", rows, options=options)
    found = usearch.Index.restore("out.usearch")
    assert len(found) == 5
    assert int(found.search(query[0], 1)[0].key) == 3
    with pytest.raises(InputError, match="an index takes no vectors of uint8"):
        embed(engine, "no.faiss", rows, options={"dtype": "uint8"})


def test_the_bulk_format_of_elasticsearch(engine: Engine) -> None:
    embed(engine, "out.bulk", [{"n": 5, "text": "the cat"}, {"n": 6, "text": ""}, {"n": 7, "text": "sea"}], id_field="n")
    lines = [json.loads(line) for line in Path("out.bulk").read_text().splitlines()]
    assert lines[0::2] == [{"index": {"_id": "5"}}, {"index": {"_id": "7"}}]
    assert [line["text"] for line in lines[1::2]] == ["the cat", "sea"]
    assert np.array([line["embedding"] for line in lines[1::2]]) == pytest.approx(engine.embed(["the cat", "sea"]), abs=1e-6)


def test_a_missing_package_is_named_before_any_work(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from npu_proxy.bulk import indexes
    from npu_proxy.bulk.sinks import table

    for module in (indexes, table):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    for output, extra in (
        ("out.faiss", "faiss"),
        ("qdrant:x", "qdrant"),
        ("postgresql://x/y", "postgresql"),
        ("lancedb:x#t", "lancedb"),
    ):
        with pytest.raises(InputError, match=rf"pip install npu-proxy\[{extra}\]"):
            embed(engine, output, [{"text": "a"}])
    assert not list(Path.cwd().glob("*.job"))


def test_outputs_that_are_tables(engine: Engine) -> None:
    target: Any = as_target("lancedb:s3://bucket/folder#mine")
    assert (target.scheme, target.location, target.table) == ("lancedb", "s3://bucket/folder", "mine")
    assert as_target("postgresql://me@host/db#t").location == "postgresql://me@host/db"  # type: ignore[union-attr]
    assert as_target("a/b.parquet") == Path("a/b.parquet")


@pytest.mark.slow
def test_the_example_that_searches_a_folder(default_model: str, tmp_path: Path) -> None:
    pytest.importorskip("lancedb")
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "examples" / "search_folder.py"), str(tmp_path / "texts"), "How are canaries used?"]
    (tmp_path / "texts").mkdir()
    for page in sorted((root / "docs" / "adr").glob("001*.md")):
        shutil.copy(page, tmp_path / "texts")
    first, again = (
        subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False) for _ in range(2)
    )
    for done in (first, again):
        assert done.returncode == 0, done.stderr
        assert "0013-canaries.md" in done.stdout
    assert "10 unchanged" in again.stderr
