"""Every reader and writer, and what is wrong with a file."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import fake_engine, golden, smallest_cosine
from npu_proxy import DType, Engine, InputError
from npu_proxy.bulk.job import FileJob, run
from npu_proxy.bulk.readers import open_texts

TEXTS = ["the cat", 'a "quoted", text\nof two lines', "naïve café", "sea " * 70]


def write_inputs(folder: Path) -> dict[str, list[str]]:
    """A file of each format, and the texts it holds."""
    (folder / "a.jsonl").write_text("".join(json.dumps({"id": i, "text": text}) + "\n\n" for i, text in enumerate(TEXTS)))
    with (folder / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "text"], *([i, text] for i, text in enumerate(TEXTS))])
    lines = [text.replace("\n", " ") for text in TEXTS]
    (folder / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), folder / "a.parquet")
    return {"a.jsonl": TEXTS, "a.csv": TEXTS, "a.txt": lines, "a.parquet": TEXTS}


def job(source: Path, target: Path | None, **changes: Any) -> FileJob:
    settings = {"text_field": "text", "on_error": "stop", "batch_size": 3, "parallel": None} | changes
    return FileJob(source=source, target=target, **settings)


def test_readers(tmp_path: Path) -> None:
    for name, texts in write_inputs(tmp_path).items():
        with open_texts(tmp_path / name, "text") as source:
            assert list(source.items) == texts
            assert source.fraction() == pytest.approx(1.0)


def test_writers_agree_with_each_other_and_with_the_engine(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    folder, _, _ = golden("mean")
    with Engine(folder) as engine:
        expected = engine.embed(TEXTS)
        for suffix in ("npy", "jsonl", "parquet"):
            report = run(engine, job(tmp_path / "a.jsonl", tmp_path / f"out.{suffix}"), {})
            assert (report.texts, report.truncated, report.failed) == (4, 1, 0)
        run(engine, job(tmp_path / "a.jsonl", tmp_path / "b.parquet"), {"dtype": DType.INT8, "dimensions": 8})
    array = np.load(tmp_path / "out.npy")
    assert (array.dtype, array.shape) == (np.float32, (4, 32))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["index"], row["truncated"]) for row in rows] == [(0, False), (1, False), (2, False), (3, True)]
    table = pq.read_table(tmp_path / "out.parquet")
    for found in (array, [row["embedding"] for row in rows], table["embedding"].to_pylist()):
        assert smallest_cosine(np.array(found), expected) >= 0.99999
    assert table["tokens"].to_pylist() == [row["tokens"] for row in rows]
    assert pq.read_schema(tmp_path / "b.parquet").field("embedding").type == pa.list_(pa.int8(), 8)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text"\n', "line 2 is not valid JSON"),
        ("x.jsonl", b'{"body": "a"}\n', "no text in field `text`; its fields: body. Set --text-field"),
        ("x.jsonl", b"[1]\n", "is not a JSON object, so it has no fields"),
        ("x.csv", b"body\na\n", "no text in field `text`; its fields: body"),
        ("x.txt", b"ok\n\xff\xfe\n", "is not UTF-8"),
        ("x.parquet", b"nothing of the kind", "is not a parquet file"),
        ("x.docx", b"", "unknown file format; supported: .jsonl, .csv, .txt, .parquet"),
        ("x.jsonl", b'{"text": "a"}\n{"text": ""}\n', r"text 1 \(counted from 0\).*the text is empty"),
    ],
)
def test_bad_files_are_named_and_leave_no_output(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with fake_engine() as engine, pytest.raises(InputError, match=message):
        run(engine, job(tmp_path / name, tmp_path / "out.npy"), {})
    assert {path.name for path in tmp_path.iterdir()} == {name}


def test_an_earlier_output_survives_a_failed_run(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("ok\n\n")
    (tmp_path / "out.npy").write_bytes(b"precious")
    with fake_engine() as engine, pytest.raises(InputError):
        run(engine, job(tmp_path / "x.txt", tmp_path / "out.npy"), {})
    assert (tmp_path / "out.npy").read_bytes() == b"precious"


def test_bad_texts_may_be_null(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("the cat\n\nthe dog\n")
    with fake_engine() as engine:
        for suffix in ("npy", "jsonl", "parquet"):
            assert run(engine, job(tmp_path / "x.txt", tmp_path / f"out.{suffix}", on_error="null"), {}).failed == 1
    assert np.isnan(np.load(tmp_path / "out.npy")).all(axis=1).tolist() == [False, True, False]
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows[1]["embedding"] is None
    assert "empty" in rows[1]["error"]
    assert pq.read_table(tmp_path / "out.parquet")["embedding"].is_null().to_pylist() == [False, True, False]


def test_outputs_that_cannot_be_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a\n")
    with fake_engine() as engine:
        for target, dtype, message in (
            (tmp_path / "out.xml", DType.FLOAT32, "supported: .npy, .jsonl, .parquet"),
            (tmp_path / "no" / "out.npy", DType.FLOAT32, "is not a folder"),
            (tmp_path / "out.npy", DType.BASE64, "npy format cannot store base64"),
        ):
            with pytest.raises(InputError, match=message):
                run(engine, job(tmp_path / "x.txt", target), {"dtype": dtype})
