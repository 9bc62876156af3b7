"""Jobs over files: right outputs in every format, nothing destroyed, and any of them can be killed and resumed."""

import errno
import json
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import feather

from conftest import GOLDEN, fake_engine, golden, smallest_cosine
from npu_proxy import Chunking, DType, Engine, InputError
from npu_proxy.bulk import parts, rows, work_folder, writers
from npu_proxy.bulk.columns import ColumnOptions, columns_of
from npu_proxy.bulk.duplicates import DigestIndex, digests, occurrences
from npu_proxy.bulk.files import find_inputs
from npu_proxy.bulk.job import Job, Progress, run
from npu_proxy.bulk.readers import Inputs, ReadOptions
from npu_proxy.bulk.rows import RowOptions
from npu_proxy.bulk.texts import TextSource
from npu_proxy.errors import DeadlineError, JobError
from npu_proxy.types import EmbedResult, TextInput

TEXTS = ["the cat", 'a "quoted", text\nof two lines', "naïve café", "sea " * 70, "the cat"]


def make(engine: Engine, source: Path, target: Path | None, output: Any = "dense", **changes: Any) -> Job:
    options = changes.pop("options", {})
    per_chunk = changes.pop("per_chunk", False)
    columns = columns_of(output, engine.spec, options, ColumnOptions(per_chunk=per_chunk))
    settings: dict[str, Any] = {"metadata": {"fingerprint": engine.spec.fingerprint}, "max_errors": 100} | changes
    of_rows = {name: settings.pop(name) for name in ("text", "keep", "id_field") if name in settings}
    options = RowOptions(**{"text": TextSource(), "columns": columns, **of_rows})
    return Job(files=find_inputs([str(source)]), rows=options, target=target, **settings)


def start(engine: Engine, job: Job, **options: Any) -> Progress:
    def compute(texts: Iterable[TextInput]) -> Iterator[EmbedResult]:
        return engine.results(texts, batch_size=3, output_type=job.rows.columns.output_type, **options)

    return run(job, compute)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with fake_engine() as made:
        yield made


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows and parts of a few blocks, so that short files have many."""
    from npu_proxy.bulk import readers

    monkeypatch.setattr(readers, "BLOCK_ROWS", 7)
    monkeypatch.setattr(parts, "PART_ROWS", 20)


def write_rows(path: Path, texts: Iterable[str]) -> Path:
    path.write_text("".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(texts)))
    return path


# -- outputs -------------------------------------------------------------------------------------------------------------


def test_all_formats_have_the_engines_vectors_and_the_columns_of_the_input(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", TEXTS)
    with Engine(golden("mean")[0]) as engine:
        expected = engine.embed(TEXTS)
        for suffix in ("npy", "jsonl", "parquet", "arrow", "feather"):
            report = start(engine, make(engine, source, tmp_path / f"out.{suffix}"))
            assert (report.rows, report.truncated, report.failed) == (5, 1, 0)
    array = np.load(tmp_path / "out.npy", mmap_mode="r")
    assert (array.dtype, array.shape) == (np.float32, (5, 32))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["index"], row["id"], row["text"], row["truncated"]) for row in rows][3] == (3, 3, "sea " * 70, True)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["id"].to_pylist() == list(range(5))
    assert table["text"].to_pylist() == TEXTS
    assert table["embedding"].type == pa.list_(pa.float32(), 32)
    assert table.cast(feather.read_table(tmp_path / "out.feather").schema) == feather.read_table(tmp_path / "out.feather")
    for found in (array, [row["embedding"] for row in rows], table["embedding"].to_pylist()):
        assert smallest_cosine(np.array(found), expected) >= 0.99999
    assert table["tokens"].to_pylist() == [row["tokens"] for row in rows]
    assert json.loads(table.schema.metadata[b"npu_proxy"])["fingerprint"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.jsonl",
        *(f"out.{name}" for name in ("arrow", "feather", "jsonl", "npy", "parquet")),
    ]


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("float16", pa.float16()), ("int8", pa.int8()), ("uint8", pa.uint8()), ("binary", pa.int8()), ("ubinary", pa.uint8())],
)
def test_number_formats(tmp_path: Path, engine: Engine, dtype: str, kind: pa.DataType) -> None:
    source = write_rows(tmp_path / "a.jsonl", ["the cat", "the dog"])
    options: Any = {"dtype": DType(dtype), "dimensions": 8}
    for suffix in ("parquet", "npy"):
        start(engine, make(engine, source, tmp_path / f"out.{suffix}", options=options, on_error="skip"), **options)
    width = 1 if "binary" in dtype else 8
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["embedding"].type == pa.list_(kind, width)
    expected = engine.embed(["the cat", "the dog"], **options)
    assert np.array_equal(np.load(tmp_path / "out.npy"), expected)
    assert np.array_equal(np.array(table["embedding"].to_pylist(), expected.dtype), expected)


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "jsonl", "npy"])
def test_no_rows_have_the_same_schema_as_some(tmp_path: Path, engine: Engine, suffix: str) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string()), "year": pa.array([], pa.int32())}), tmp_path / "none.parquet")
    pq.write_table(pa.table({"text": ["a"], "year": pa.array([1], pa.int32())}), tmp_path / "one.parquet")
    for name in ("none", "one"):
        assert start(engine, make(engine, tmp_path / f"{name}.parquet", tmp_path / f"{name}.out.{suffix}")).rows == (name == "one")
    if suffix == "npy":
        assert np.load(tmp_path / "none.out.npy").shape == (0, 32)
    elif suffix == "jsonl":
        assert (tmp_path / "none.out.jsonl").read_bytes() == b""
    else:
        read = pq.read_schema if suffix == "parquet" else feather.read_table
        none, one = (read(tmp_path / f"{name}.out.{suffix}") for name in ("none", "one"))
        assert getattr(none, "schema", none) == getattr(one, "schema", one)


def test_base64_is_text_even_if_the_first_texts_failed(tmp_path: Path, engine: Engine) -> None:
    source = write_rows(tmp_path / "a.jsonl", [*[""] * 300, "the cat"])
    options: Any = {"dtype": DType.BASE64}
    start(engine, make(engine, source, tmp_path / "out.parquet", options=options, max_errors=300), **options)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["embedding"].type == pa.string()
    assert table["embedding"].null_count == 300
    assert table["embedding"][300].as_py() == engine.embed(["the cat"], **options)[0]


def test_values_of_several_types_become_text_and_others_keep_theirs(tmp_path: Path, engine: Engine) -> None:
    rows = [
        {"text": "a", "n": 1, "m": 1, "t": ["x"], "o": {"k": 1}, "b": "9" * 30},
        {"text": "b", "n": 2.5, "m": "two", "t": [], "o": {"k": None, "l": "z"}, "b": 10**30},
        {"text": "c", "n": None, "m": ["x"]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start(engine, make(engine, tmp_path / "a.jsonl", tmp_path / "out.parquet"))
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["n"].to_pylist() == [1.0, 2.5, None]
    assert table["m"].to_pylist() == ["1", "two", '["x"]']
    assert table["t"].to_pylist() == [["x"], [], None]
    assert table["o"].to_pylist() == [{"k": 1, "l": None}, {"k": None, "l": "z"}, None]
    assert table["b"].to_pylist() == ["9" * 30, str(10**30), None]
    start(engine, make(engine, tmp_path / "a.jsonl", tmp_path / "out.jsonl"))
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written[1]["b"] == 10**30
    assert [row["m"] for row in written] == [1, "two", ["x"]]
    start(engine, make(engine, tmp_path / "out.parquet", tmp_path / "again.jsonl", keep=["m", "n"]))
    assert json.loads((tmp_path / "again.jsonl").read_text().splitlines()[1])["m"] == "two"


def test_columns_of_one_name_in_input_and_output_are_refused(tmp_path: Path, engine: Engine) -> None:
    pq.write_table(pa.table({"text": ["a"], "tokens": [5]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"has a column `tokens`, and so has the output.*--columns text"):
        start(engine, make(engine, tmp_path / "a.parquet", tmp_path / "out.parquet"))
    start(engine, make(engine, tmp_path / "a.parquet", tmp_path / "out.parquet", keep=["text"]))
    assert pq.read_table(tmp_path / "out.parquet")["tokens"].to_pylist() != [5]


def test_files_of_several_formats_have_one_schema(tmp_path: Path, engine: Engine) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), folder / "a.parquet")
    (folder / "b.jsonl").write_text('{"text": "b", "n": 2.5, "x": true}\n')
    (folder / "c.csv").write_text("text,n\nc,three\n")
    start(engine, make(engine, folder, tmp_path / "out.parquet"))
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["text"].to_pylist() == ["a", "b", "c"]
    assert table["n"].to_pylist() == ["1", "2.5", "three"]
    assert table["x"].to_pylist() == [None, True, None]


def test_a_row_per_chunk_has_its_span(tmp_path: Path) -> None:
    long = "the cat sat on the mat. " * 40
    source = write_rows(tmp_path / "a.jsonl", ["the cat", long, ""])
    options: Any = {"truncate": "chunk", "chunking": Chunking(spans=True)}
    with Engine(golden("mean")[0]) as engine:
        for suffix in ("parquet", "npy", "jsonl"):
            start(engine, make(engine, source, tmp_path / f"out.{suffix}", options=options, per_chunk=True), **options)
        table = pq.read_table(tmp_path / "out.parquet")
        rows = table.to_pylist()
        assert [row["index"] for row in rows] == [0, *[1] * (len(rows) - 2), 2]
        assert [row["chunk"] for row in rows] == [0, *range(len(rows) - 2), None]
        assert len(rows) > 4
        assert (rows[0]["start"], rows[0]["stop"]) == (0, 7)
        assert (rows[1]["start"], rows[-2]["stop"]) == (0, len(long.rstrip()))
        parts = [row["chunk_text"] for row in rows[:-1]]
        assert parts[1] == long[: rows[1]["stop"]]
        assert "text" not in table.schema.names
        assert smallest_cosine(np.array([row["embedding"] for row in rows[:-1]]), engine.embed(parts)) > 0.9999
    assert rows[-1]["embedding"] is None
    assert "empty" in rows[-1]["error"]
    assert np.load(tmp_path / "out.npy").shape == (len(rows), 32)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(rows)


def test_sparse_token_label_and_relevance_columns(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", ["the cat", "", "sea"])
    for model, output, check in (
        ("bert_splade", "sparse", lambda engine: engine.embed_sparse(["the cat"])[0].values),
        ("colbert", "tokens", lambda engine: np.asarray(engine.embed_tokens(["the cat"])[0]).reshape(-1)),
        ("roberta_labels", "labels", lambda engine: [label.score for label in engine.classify(["the cat"])[0]]),
    ):
        with Engine(GOLDEN / model) as engine:
            target = tmp_path / f"{model}.parquet"
            assert start(engine, make(engine, source, target, output)).failed == 1
            with pytest.raises(InputError, match="this format stores one vector"):
                start(engine, make(engine, source, tmp_path / "out.npy", output))
            expected = check(engine)
        row, bad, _ = pq.read_table(target).to_pylist()
        if output == "sparse":
            assert row["embedding"]["values"] == pytest.approx(list(expected))
        elif output == "tokens":
            assert np.array(row["embedding"]).reshape(-1) == pytest.approx(expected)
        else:
            assert row["label"] == row["labels"][0]["label"]
            assert [label["score"] for label in row["labels"]] == pytest.approx(expected)
        assert bad["labels" if output == "labels" else "embedding"] is None


# -- rows that fail ------------------------------------------------------------------------------------------------------


def test_rows_that_fail_are_null_or_skipped_and_listed(tmp_path: Path, engine: Engine) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "the cat"}\n{"text": 5}\n{"text": ""}\nno\n{"text": "the cat"}\n{"text": ""}\n')
    for suffix in ("npy", "jsonl", "parquet"):
        assert start(engine, make(engine, tmp_path / "a.jsonl", tmp_path / f"out.{suffix}")).failed == 4
    assert np.isnan(np.load(tmp_path / "out.npy")).all(axis=1).tolist() == [False, True, True, True, False, True]
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["embedding"] is None for row in rows] == [False, True, True, True, False, True]
    assert ["error" in row for row in rows] == [False, True, True, True, False, True]
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["embedding"].is_null().to_pylist() == [False, True, True, True, False, True]
    assert table["embedding"][0] == table["embedding"][4]
    errors = [json.loads(line) for line in (tmp_path / "out.parquet.errors.jsonl").read_text().splitlines()]
    assert [(error["index"], error["place"].split("` ")[1]) for error in errors] == [
        (1, "line 2"),
        (2, "line 3"),
        (3, "line 4"),
        (5, "line 6"),
    ]
    assert "has a number in field `text`" in errors[0]["error"]
    assert "the text is empty" in errors[1]["error"]
    for dtype in ("int8", "binary"):
        options: Any = {"dtype": DType(dtype)}
        with pytest.raises(InputError, match="has no value for a row that failed"):
            start(engine, make(engine, tmp_path / "a.jsonl", tmp_path / f"{dtype}.npy", options=options), **options)
        skipping = make(engine, tmp_path / "a.jsonl", tmp_path / "i.npy", options=options, on_error="skip", start="overwrite")
        start(engine, skipping, **options)
        assert len(np.load(tmp_path / "i.npy")) == 2
    start(engine, make(engine, write_rows(tmp_path / "b.jsonl", ["a"]), tmp_path / "out.npy", start="overwrite"))
    assert not (tmp_path / "out.npy.errors.jsonl").exists()


@pytest.mark.parametrize(
    ("on_error", "max_errors", "message"), [("stop", 100, "line 12: the text is empty"), ("null", 0, "more than 0 rows failed")]
)
def test_a_job_that_stops_at_a_bad_row_keeps_the_rows_before(
    tmp_path: Path, engine: Engine, small_parts: None, on_error: str, max_errors: int, message: str
) -> None:
    source = write_rows(tmp_path / "a.jsonl", ["" if number == 11 else f"cat {number}" for number in range(40)])
    with pytest.raises(InputError, match=message):
        start(engine, make(engine, source, tmp_path / "out.npy", on_error=on_error, max_errors=max_errors))
    assert not (tmp_path / "out.npy").exists()
    done = start(engine, make(engine, source, tmp_path / "out.npy", start="resume"))
    assert (done.rows, done.resumed, done.failed) == (40, 7, 1)


def test_errors_that_are_not_the_texts_own_are_tried_again_and_never_null(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_PAUSES", (0.0, 0.0))
    source = write_rows(tmp_path / "a.jsonl", ["the cat", "the dog"])
    failures = iter([True, True])

    def compute(texts: Iterable[TextInput]) -> Iterator[EmbedResult]:
        for result in engine.results(texts):
            yield replace(result, errors=[DeadlineError("too late")] * len(result.errors)) if next(failures, False) else result

    assert run(make(engine, source, tmp_path / "out.npy"), compute).failed == 0
    failures = iter([True] * 9)
    with pytest.raises(JobError, match="too late; tried 3 times"):
        run(make(engine, source, tmp_path / "two.npy"), compute)
    assert not (tmp_path / "two.npy").exists()


# -- what must not be destroyed ------------------------------------------------------------------------------------------


def test_an_output_that_is_an_input_or_no_file_is_refused_before_any_work(tmp_path: Path, engine: Engine) -> None:
    source = write_rows(tmp_path / "a.jsonl", ["the cat"])
    content = source.read_bytes()
    os.link(source, tmp_path / "hard.jsonl")
    (tmp_path / "soft.jsonl").symlink_to(source)
    (tmp_path / "folder.npy").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "old.npy").write_bytes(b"precious")
    for name, message in (
        ("a.jsonl", "is also an input"),
        ("hard.jsonl", "is also an input"),
        ("soft.jsonl", "is also an input"),
        ("folder.npy", "is a folder"),
        ("pipe.jsonl", "neither a file nor a folder"),
        ("old.npy", "exists; replace it with --overwrite"),
        ("out.xml", r"supported: \.parquet"),
        ("no/out.npy", "is not a folder"),
    ):
        with pytest.raises(InputError, match=message):
            start(engine, make(engine, source, tmp_path / name, start="overwrite" if name != "old.npy" else "new"))
    assert source.read_bytes() == content
    assert (tmp_path / "old.npy").read_bytes() == b"precious"
    assert not list(tmp_path.glob("*.job"))


def test_a_symbolic_link_stays_one(tmp_path: Path, engine: Engine) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link.npy").symlink_to(tmp_path / "there" / "out.npy")
    start(engine, make(engine, write_rows(tmp_path / "a.jsonl", ["the cat"]), tmp_path / "link.npy"))
    assert (tmp_path / "link.npy").is_symlink()
    assert len(np.load(tmp_path / "there" / "out.npy")) == 1


def test_an_earlier_output_survives_a_failed_run(tmp_path: Path, engine: Engine) -> None:
    (tmp_path / "out.npy").write_bytes(b"precious")
    with pytest.raises(InputError):
        start(
            engine, make(engine, write_rows(tmp_path / "a.jsonl", [""]), tmp_path / "out.npy", on_error="stop", start="overwrite")
        )
    assert (tmp_path / "out.npy").read_bytes() == b"precious"


def test_two_jobs_do_not_share_an_output(tmp_path: Path, engine: Engine) -> None:
    source = write_rows(tmp_path / "a.jsonl", ["the cat"])
    with work_folder.open_work(tmp_path / "out.npy"), pytest.raises(InputError, match="another process is writing"):
        start(engine, make(engine, source, tmp_path / "out.npy"))


# -- resuming ------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As sudden as a kill: nothing may catch it."""


def random_texts(count: int, seed: int) -> list[str]:
    numbers = random.Random(seed)
    words = ["the", "cat", "sea", "dog", "sat", ""]
    return [" ".join(numbers.choices(words, k=numbers.randint(0, 7))) for _ in range(count)]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "npy"])
def test_a_job_killed_at_any_point_ends_with_the_output_of_an_undisturbed_one(
    tmp_path: Path, engine: Engine, small_parts: None, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    source = write_rows(tmp_path / "a.jsonl", random_texts(300, 1))
    start(engine, make(engine, source, tmp_path / f"whole.{suffix}"))
    numbers, kills = random.Random(2), 0
    functions = (("replace", Path), ("fsync", os), ("open", Path), ("unlink", Path))

    def compute(texts: Iterable[TextInput]) -> Iterator[EmbedResult]:
        for result in engine.results(texts, batch_size=3):
            if numbers.random() < 0.15:
                raise Killed
            yield result

    while not (tmp_path / f"out.{suffix}").exists():
        with monkeypatch.context() as patched:
            name, owner = functions[kills % len(functions)]
            left, whole = numbers.randint(0, 12), getattr(owner, name)

            def dying(*arguments: Any, whole: Any = whole, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    raise Killed
                return whole(*arguments, **options)

            patched.setattr(owner, name, dying)
            try:
                run(make(engine, source, tmp_path / f"out.{suffix}", start="resume"), compute)
            except Killed:
                kills += 1
            finally:
                patched.undo()
    assert kills > 3
    assert (tmp_path / f"out.{suffix}").read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()
    errors = [(tmp_path / f"{name}.{suffix}.errors.jsonl").read_bytes() for name in ("out", "whole")]
    assert errors[0] == errors[1]


def test_what_changed_since_a_job_began_is_refused_by_name(tmp_path: Path, engine: Engine, small_parts: None) -> None:
    source = write_rows(tmp_path / "a.jsonl", [f"cat {number}" for number in range(60)])
    known = source.stat()

    def begin(**changes: Any) -> None:
        def compute(texts: Iterable[TextInput]) -> Iterator[EmbedResult]:
            for count, result in enumerate(engine.results(texts, batch_size=3)):
                if count == 15:
                    raise Killed
                yield result

        with pytest.raises(Killed):
            run(make(engine, source, tmp_path / "out.npy", start="overwrite", **changes), compute)

    begin()
    with pytest.raises(InputError, match="holds an unfinished job; continue it with --resume, or start again with --overwrite"):
        start(engine, make(engine, source, tmp_path / "out.npy"))
    for changes, words in (
        ({"metadata": {"fingerprint": "0" * 16}}, "fingerprint was"),
        ({"keep": ["id"]}, "columns was null and is now"),
        ({"limit": 30}, "limit was null and is now 30"),
        ({"options": {"dimensions": 8}}, "output was"),
        ({"text": TextSource(template="{text}!")}, "text changed"),
    ):
        with pytest.raises(InputError, match=f"a job that was different: {words}.*--overwrite"):
            start(engine, make(engine, source, tmp_path / "out.npy", start="resume", **changes))
    changed = source.read_text()
    source.write_text(changed + '{"text": "more"}\n')
    with pytest.raises(InputError, match=r"inputs changed: .*a\.jsonl"):
        start(engine, make(engine, source, tmp_path / "out.npy", start="resume"))
    source.write_text(changed.replace("cat 5", "dog 5"))
    os.utime(source, ns=(known.st_atime_ns, known.st_mtime_ns))
    with pytest.raises(InputError, match=r"the texts of rows 0 to 20 .* are not what they were"):
        start(engine, make(engine, source, tmp_path / "out.npy", start="resume"))
    source.write_text(changed)
    os.utime(source, ns=(known.st_atime_ns, known.st_mtime_ns))
    part = next((tmp_path / "out.npy.job").glob("part-000001*"))
    part.write_bytes(part.read_bytes()[:-9] + b"corrupted")
    done = start(engine, make(engine, source, tmp_path / "out.npy", start="resume"))
    assert (done.resumed, done.rows) == (21, 60)
    begin()
    start(engine, make(engine, source, tmp_path / "out.npy", start="overwrite"))
    assert not (tmp_path / "out.npy.job").exists()


def test_a_full_disk_keeps_what_is_done(tmp_path: Path, engine: Engine, small_parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_rows(tmp_path / "a.jsonl", random_texts(200, 3))
    start(engine, make(engine, source, tmp_path / "whole.parquet"))
    room = 60_000

    class Full:
        """A file on a disk that is nearly full."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, content: Any) -> int:
            nonlocal room
            room -= len(content)
            if room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(content)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

    def compute(texts: Iterable[TextInput]) -> Iterator[EmbedResult]:
        return engine.results(texts, batch_size=3)

    whole = Path.open

    def opened(path: Path, *arguments: Any, **options: Any) -> Any:
        file = whole(path, *arguments, **options)
        return Full(file) if "b" in "".join(arguments) and "r" not in arguments[0] else file

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", opened)
        with pytest.raises(JobError, match=r"no space left for .*[1-9]\d* rows are done and kept.*--resume"):
            run(make(engine, source, tmp_path / "out.parquet"), compute)
    assert not list((tmp_path / "out.parquet.job").glob("*.tmp"))
    assert start(engine, make(engine, source, tmp_path / "out.parquet", start="resume")).resumed > 0
    assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_shards_and_limits_cover_everything_once(tmp_path: Path, engine: Engine, small_parts: None) -> None:
    source = write_rows(tmp_path / "a.jsonl", random_texts(100, 4))
    start(engine, make(engine, source, tmp_path / "whole.parquet", limit=90))
    found: list[dict[str, Any]] = []
    for number in (1, 2, 3):
        start(engine, make(engine, source, tmp_path / f"{number}.parquet", shard=(number, 3), limit=90))
        found += pq.read_table(tmp_path / f"{number}.parquet").to_pylist()
    whole = pq.read_table(tmp_path / "whole.parquet").to_pylist()
    assert len(whole) == 90
    own = [{name: row[name] for name in ("index", "text", "embedding")} for row in sorted(found, key=lambda row: row["index"])]
    assert own == [{name: row[name] for name in ("index", "text", "embedding")} for row in whole]


# -- duplicates and ids --------------------------------------------------------------------------------------------------


def test_equal_texts_are_computed_once_and_have_ids_of_their_own(tmp_path: Path, engine: Engine, small_parts: None) -> None:
    texts = random_texts(300, 5)
    source = write_rows(tmp_path / "a.jsonl", texts)
    asked: list[TextInput] = []

    def compute(given: Iterable[TextInput]) -> Iterator[EmbedResult]:
        return engine.results((asked.append(text) or text for text in given), batch_size=3)

    run(make(engine, source, tmp_path / "out.parquet"), compute)
    assert sorted(map(str, asked)) == sorted(set(texts))
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert len({row["row_id"] for row in rows}) == 300
    first = {text: number for number, text in reversed(list(enumerate(texts)))}
    expected = engine.embed([text for text in first if text])
    vectors = dict(zip([text for text in first if text], expected.tolist(), strict=True))
    assert all(row["embedding"] == vectors.get(row["text"]) for row in rows)
    write_rows(tmp_path / "a.jsonl", ["something new", *texts])
    run(make(engine, source, tmp_path / "again.parquet"), compute)
    again = pq.read_table(tmp_path / "again.parquet").to_pylist()
    assert [row["row_id"] for row in again[1:]] == [row["row_id"] for row in rows]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("per_chunk", [False, True])
def test_an_output_is_brought_up_to_date(tmp_path: Path, small_parts: None, suffix: str, per_chunk: bool) -> None:
    asked: list[TextInput] = []
    target = tmp_path / f"out.{suffix}"
    options: Any = {"truncate": "chunk", "chunking": Chunking(spans=True)} if per_chunk else {}
    long = "the cat sat on the mat. " * 20

    with Engine(golden("mean")[0]) as engine:

        def compute(given: Iterable[TextInput]) -> Iterator[EmbedResult]:
            return engine.results((asked.append(text) or text for text in given), batch_size=3, **options)

        def rows_after(start: Any, texts: list[str], name: Path = target) -> list[dict[str, Any]]:
            source = write_rows(tmp_path / "a.jsonl", texts)
            asked.clear()
            run(make(engine, source, name, start=start, per_chunk=per_chunk, options=options), compute)
            return (pq.read_table(name) if suffix == "parquet" else feather.read_table(name)).to_pylist()

        texts = [*(f"cat {number}" for number in range(50)), "", long, *(f"dog {number}" for number in range(50))]
        rows_after("update", texts)
        assert len(asked) == 102
        changed = ["new", *texts[10:60], "newer", long + "more", *texts[55:]]
        found = rows_after("update", changed)
        assert sorted(map(str, asked)) == sorted(["", "new", "newer", long + "more"])
        whole = rows_after("new", changed, tmp_path / f"whole.{suffix}")
        vectors = [[row.pop("embedding") or [1.0] * 32 for row in rows] for rows in (found, whole)]
        assert found == whole
        assert smallest_cosine(*map(np.array, vectors)) > 0.999999
        assert rows_after("update", changed[::-1])[0]["embedding"] == pytest.approx(vectors[0][-1])
        assert asked == [""]
        with pytest.raises(InputError, match=r"was made with fingerprint=.*--overwrite"):
            run(make(engine, tmp_path / "a.jsonl", target, start="update", metadata={"fingerprint": "0"}, options=options), compute)
        pq.write_table(pa.table({"text": ["a"]}), tmp_path / "other.parquet")
        with pytest.raises(InputError, match="is no output of npu-proxy embed"):
            run(make(engine, tmp_path / "a.jsonl", tmp_path / "other.parquet", start="update"), compute)
        np.save(tmp_path / "other.npy", np.zeros([1, 2]))
        with pytest.raises(InputError, match=r"only \.parquet and \.arrow and \.feather outputs can be brought up to date"):
            run(make(engine, tmp_path / "a.jsonl", tmp_path / "other.npy", start="update"), compute)


@given(st.lists(st.integers(0, 30), max_size=200), st.integers(1, 9))
def test_the_index_is_a_dictionary(numbers: list[int], step: int) -> None:
    index, counts, expected = DigestIndex(1 << 20), DigestIndex(1 << 20), {}
    for begin in range(0, len(numbers), step):
        keys = digests(map(str, numbers[begin : begin + step]))
        found = occurrences(counts, keys, np.zeros(len(keys), np.int64))
        assert found is not None
        for number, count in zip(numbers[begin : begin + step], found.tolist(), strict=True):
            assert count == expected.get(number, 0)
            expected[number] = count + 1
    distinct = list(dict.fromkeys(numbers))
    assert index.put(digests(map(str, distinct)), np.array(distinct, np.int64))
    assert index.find(digests(map(str, range(40)))).tolist() == [number if number in distinct else -1 for number in range(40)]


def test_an_index_grows_up_to_its_bound() -> None:
    index = DigestIndex(5_000_000)
    for begin in range(0, 60_000, 5000):
        index.put(digests(map(str, range(begin, begin + 5000))), np.arange(begin, begin + 5000))
    assert len(index) == 60_000
    assert (index.find(digests(map(str, range(60_000)))) == np.arange(60_000)).all()
    assert not index.put(digests(map(str, range(100_000, 140_000))), np.arange(40_000))
    assert len(index) == 60_000


def test_ids_of_the_input_must_be_unique(tmp_path: Path, engine: Engine, small_parts: None) -> None:
    source = tmp_path / "a.jsonl"
    for last, words in (
        ({"n": 3}, "line 21: the id 3 in field `n` has occurred before"),
        ({}, "line 21: the row has no id"),
        ({"n": 1.5}, "no id"),
    ):
        rows = [*({"n": number, "text": f"cat {number}"} for number in range(20)), {"text": "x", **last}]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(InputError, match=words):
            start(engine, make(engine, source, tmp_path / "out.jsonl", id_field="n", start="overwrite"))
    start(engine, make(engine, source, tmp_path / "out.jsonl", id_field="n", keep=[], limit=20, start="overwrite"))
    first = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert list(first) == ["index", "n", "embedding", "tokens", "truncated"]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_groups_of_an_output_are_bounded_and_do_not_depend_on_parts(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(writers, "_GROUP_BYTES", 10_000)
    numbers = random.Random(9)
    source = write_rows(tmp_path / "a.jsonl", ["cat " * numbers.choice([1, 10, 4000]) for _ in range(150)])
    outputs: list[bytes] = []
    for rows_per_part in (1, 20, 10_000):
        monkeypatch.setattr(parts, "PART_ROWS", rows_per_part)
        start(engine, make(engine, source, tmp_path / f"out.{suffix}", start="overwrite"))
        outputs.append((tmp_path / f"out.{suffix}").read_bytes())
    assert len(set(outputs)) == 1
    if suffix == "parquet":
        file = pq.ParquetFile(tmp_path / "out.parquet")
        sizes = [file.read_row_group(group)["text"].nbytes for group in range(file.num_row_groups)]
        assert max(sizes) < 10_000 + 16_000
        assert file.num_row_groups > 20
    assert len((pq if suffix == "parquet" else feather).read_table(tmp_path / f"out.{suffix}")) == 150


def test_blocks_of_tables_with_long_texts_are_small(tmp_path: Path) -> None:
    table = pa.table({"text": ["x" * 100_000] * 300})
    pq.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    feather.write_feather(table, tmp_path / "a.arrow", compression="uncompressed")
    for name in ("a.parquet", "a.arrow"):
        sizes = [len(block) for block in Inputs(find_inputs([str(tmp_path / name)]), ReadOptions())]
        assert sum(sizes) == 300
        assert max(sizes) <= 42
