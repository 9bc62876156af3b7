"""Files as people have them: the right rows, or an error that names the file, the row and the cure."""
# ruff: noqa: E501 (a case is one line)

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from npu_proxy import InputError
from npu_proxy.bulk.files import find_inputs
from npu_proxy.bulk.readers import BLOCK_ROWS, Inputs, ReadOptions
from npu_proxy.bulk.texts import TextSource

Write = Callable[[Path], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """name: of the input. expected: its texts, an error per row as a part of the message. refused: what refuses the whole input."""

    name: str
    content: bytes | str | Write
    expected: list[Any] = field(default_factory=list)
    refused: str = ""
    text: TextSource = field(default_factory=TextSource)
    columns: Any = "needed"
    format: str | None = None
    delimiter: str | None = None


class Bad(str):
    """A part of the message about a row."""

    __slots__ = ()


def table(**columns: Any) -> Write:
    return lambda path: pq.write_table(pa.table(columns), path)


def arrow_file(path: Path) -> None:
    with pa.ipc.new_file(path, pa.schema([("text", pa.string())])) as writer:
        writer.write_table(pa.table({"text": ["a", "b"]}))


def arrow_stream(path: Path) -> None:
    with pa.ipc.new_stream(path, pa.schema([("text", pa.string())])) as writer:
        writer.write_table(pa.table({"text": ["a", "b"]}))


def folder_of(**files: str) -> Write:
    def write(path: Path) -> None:
        for name, content in files.items():
            file = path / name.replace("__", "/").replace("_dot_", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)

    return write


def two_columns_of_one_name(path: Path) -> None:
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)


def dotted(path: Path) -> None:
    pq.write_table(pa.table({"data.text": ["column"], "data": [{"text": "struct"}]}), path)


def compressed(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def csv_of(*rows: list[str]) -> str:
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows(rows)
    return stream.getvalue()


JSONL = '{"text": "a"}\n{"text": "b"}\n'
LONG_NUMBER, DEEP = "9" * 5000, "[" * 100_000 + "]" * 100_000
CASES = [
    # txt: \n and \r\n end a line, and nothing else does
    Case(name="plain.txt", content="a\nb\n", expected=["a", "b"]),
    Case(name="no-end.txt", content="a\nb", expected=["a", "b"]),
    Case(name="windows.txt", content="a\r\nb\r\n", expected=["a", "b"]),
    Case(name="old-mac.txt", content="a\rb\r", expected=["a", "b"]),
    Case(name="blank.txt", content="a\n\nb\n", expected=["a", "", "b"]),
    Case(name="bom.txt", content=b"\xef\xbb\xbfa\nb\n", expected=["a", "b"]),
    Case(name="separators.txt", content="a\fb\nc\x85d\ne\u2028f\x1cg\n", expected=["a\fb", "c\x85d", "e\u2028f\x1cg"]),
    Case(name="empty.txt", content="", expected=[]),
    Case(name="latin1.txt", content=b"ok\ncaf\xe9\nok\n", expected=["ok", Bad("not UTF-8"), "ok"]),
    Case(name="utf16.txt", content="a\nb\n".encode("utf-16"), refused="is UTF-16; convert it: iconv -f utf-16 -t utf-8"),
    Case(name="nul.txt", content="a\0b\n", expected=["a\0b"]),
    Case(name="other-field.txt", content="a\n", text=TextSource(field="body"), refused="no column `body`; its columns: text"),
    # jsonl
    Case(name="plain.jsonl", content=JSONL, expected=["a", "b"]),
    Case(name="plain.ndjson", content=JSONL, expected=["a", "b"]),
    Case(name="blank-lines.jsonl", content='{"text": "a"}\n\n  \n{"text": "b"}', expected=["a", "b"]),
    Case(name="crlf-bom.jsonl", content=b"\xef\xbb\xbf" + JSONL.replace("\n", "\r\n").encode(), expected=["a", "b"]),
    Case(name="broken.jsonl", content='{"text": "a"}\n{"text"\n{"text": "b"}\n', expected=["a", Bad("line 2: the row is not valid JSON"), "b"]),
    Case(name="two-per-line.jsonl", content='{"text": "a"}{"text": "b"}\n', expected=[Bad("not valid JSON: Extra data")]),
    Case(name="no-object.jsonl", content='[1]\n"x"\n', expected=[Bad("not a JSON object"), Bad("not a JSON object")]),
    Case(name="no-field.jsonl", content='{"body": "a"}\n', expected=[Bad("has no field `text`; set --text-field")]),
    Case(name="null.jsonl", content='{"text": null}\n{"text": "a"}\n', expected=[Bad("has null in field `text`"), "a"]),
    Case(name="number.jsonl", content='{"text": 5}\n', expected=[Bad("has a number in field `text`, not a text")]),
    Case(name="list.jsonl", content='{"text": ["a"]}\n', expected=[Bad("has a list in field `text`")]),
    Case(name="boolean.jsonl", content='{"text": true}\n', expected=[Bad("has a boolean")]),
    Case(name="twice.jsonl", content='{"text": "a", "text": "b"}\n', expected=[Bad("has the field `text` twice")]),
    Case(name="inside.jsonl", content='{"text": "a", "meta": {"text": "b"}}\n', expected=["a"]),
    Case(name="long-number.jsonl", content='{"n": ' + LONG_NUMBER + ', "text": "a"}\n', expected=["a"], columns=None),
    Case(name="deep.jsonl", content='{"n": ' + DEEP + ', "text": "a"}\n{"text": "b"}\n', expected=[Bad("nested too deeply"), "b"]),
    Case(name="nan.jsonl", content='{"n": NaN, "text": "a"}\n', expected=["a"], columns=None),
    Case(name="surrogate.jsonl", content='{"text": "a\\ud800b"}\n', expected=["a\ufffdb"]),
    Case(name="pair.jsonl", content='{"text": "\\ud83d\\ude00"}\n', expected=["\U0001f600"]),
    Case(name="latin1.jsonl", content=b'{"text": "caf\xe9"}\n{"text": "b"}\n', expected=[Bad("not UTF-8"), "b"]),
    Case(name="latin1-elsewhere.jsonl", content=b'{"o": "\xe9", "text": "a"}\n', expected=[Bad("not UTF-8")]),
    Case(name="date.jsonl", content='{"text": "2020-01-01 00:00:00"}\n', expected=["2020-01-01 00:00:00"]),
    Case(name="nested.jsonl", content='{"data": {"text": "a"}}\n{"data": 1}\n', text=TextSource(field="data.text"), expected=["a", Bad("has no field")]),
    Case(name="dotted.jsonl", content='{"data.text": "a"}\n', text=TextSource(field="data.text"), expected=["a"]),
    Case(name="mixed.jsonl", content='{"y": 1, "text": "a"}\n{"y": "x", "text": "b"}\n', expected=["a", "b"], columns=None),
    # one array
    Case(name="array.json", content='[{"text": "a"},\n {"text": "b"}]\n', expected=["a", "b"]),
    Case(name="empty.json", content="[]", expected=[]),
    Case(name="lines.json", content=JSONL, expected=["a", "b"]),
    Case(name="pretty.json", content=json.dumps([{"text": "a"}, {"text": "b"}], indent=4), expected=["a", "b"]),
    Case(name="cut.json", content='[{"text": "a"}, {"te', refused="item 2 is not valid JSON"),
    Case(name="no-end.json", content='[{"text": "a"}', refused="after item 1, a comma or ] is missing"),
    Case(name="more.json", content='[{"text": "a"}] x', refused="something after its array of 1 items"),
    Case(name="strings.json", content='["a"]', expected=[Bad("item 1: the row is not a JSON object")]),
    Case(name="scalar.json", content="5", refused="neither a JSON array nor a JSON object per line"),
    # csv
    Case(name="plain.csv", content="id,text\n1,a\n2,b\n", expected=["a", "b"]),
    Case(name="quoted.csv", content=csv_of(["id", "text"], ["1", 'a "b", c\nd'], ["2", "e"]), expected=['a "b", c\nd', "e"]),
    Case(name="bom-crlf.csv", content=b"\xef\xbb\xbftext,id\r\na,007\r\nb,1\r\n", expected=["a", "b"]),
    Case(name="unclosed.csv", content='id,text\n1,"hello\n' + "".join(f"{n},abc\n" for n in range(1000)), refused="a quote that opens in line 2 is not closed"),
    Case(name="swallowed.csv", content='id,text\n1,"hello\n2,"b"\n', refused="lines 2 to 3 cannot be read as CSV"),
    Case(name="after-quote.csv", content='id,text\n1,"hello"x\n2,b\n', expected=[Bad("line 2: the row is not valid CSV"), "b"]),
    Case(name="unquoted-comma.csv", content="id,text\n1,hello, world\n2,b\n", expected=[Bad("has 3 fields, but the header has 2"), "b"]),
    Case(name="short-row.csv", content="id,text\n1\n2,b\n", expected=[Bad("has 1 fields, but the header has 2"), "b"]),
    Case(name="inches.csv", content='id,text\n1,a 5" pipe\n', expected=['a 5" pipe']),
    Case(name="twice.csv", content="id,text,text\n1,a,b\n", refused="has 2 columns of the name `text`"),
    Case(name="semicolons.csv", content="id;text\n1;a\n", refused="no column `text`; its columns: id;text"),
    Case(name="told.csv", content="id;text\n1;a\n", delimiter=";", expected=["a"]),
    Case(name="blank-lines.csv", content="id,text\n\n1,a\n\n", expected=["a"]),
    Case(name="empty.csv", content="", refused="has no header line"),
    Case(name="header-only.csv", content="id,text\n", expected=[]),
    Case(name="latin1.csv", content=b"id,text\n1,caf\xe9\n2,b\n", expected=[Bad("not UTF-8"), "b"]),
    Case(name="none.csv", content="id,text\n1,\n2,NA\n", expected=["", "NA"]),
    Case(name="tabs.tsv", content="id\ttext\n1\ta, b\n", expected=["a, b"]),
    # tables
    Case(name="plain.parquet", content=table(id=[1, 2], text=["a", "b"]), expected=["a", "b"]),
    Case(name="nulls.parquet", content=table(text=["a", None]), expected=["a", Bad("row 2: the row has null")]),
    Case(name="numbers.parquet", content=table(text=[1, 2]), expected=[Bad("has a number"), Bad("has a number")]),
    Case(name="large.parquet", content=table(text=pa.array(["a"], pa.large_string())), expected=["a"]),
    Case(name="categories.parquet", content=table(text=pa.array(["a", "b", "a"]).dictionary_encode()), expected=["a", "b", "a"]),
    Case(name="other.parquet", content=table(body=["a"]), refused="no column `text`; its columns: body. Set --text-field"),
    Case(name="twice.parquet", content=two_columns_of_one_name, refused="has 2 columns of the name `text`"),
    Case(name="dotted.parquet", content=dotted, text=TextSource(field="data.text"), expected=["column"]),
    Case(name="struct.parquet", content=table(data=[{"text": "a"}, None]), text=TextSource(field="data.text"), expected=["a", Bad("has null")]),
    Case(name="empty.parquet", content=table(text=pa.array([], pa.string())), expected=[]),
    Case(name="no.parquet", content=b"nothing of the kind", refused="cannot be read"),
    Case(name="plain.arrow", content=arrow_file, expected=["a", "b"]),
    Case(name="stream.arrow", content=arrow_stream, expected=["a", "b"]),
    Case(name="v2.feather", content=lambda path: feather.write_feather(pa.table({"text": ["a"]}), path), expected=["a"]),
    Case(name="no.arrow", content=b"nothing", refused="cannot be read"),
    # compressed
    Case(name="plain.jsonl.gz", content=gzip.compress(JSONL.encode()), expected=["a", "b"]),
    Case(name="two.txt.gz", content=gzip.compress(b"a\n") + gzip.compress(b"b\n"), expected=["a", "b"]),
    Case(name="cut.txt.gz", content=gzip.compress(b"a\n" * 9999)[:-12], refused="cut.txt.gz` cannot be read"),
    Case(name="plain.csv.zst", content=compressed(b"text\na\n"), expected=["a"]),
    Case(name="cut.csv.zst", content=compressed(b"text\na\n")[:-4], refused="cannot be read"),
    Case(name="plain.txt.bz2", content=bz2.compress(b"a\nb\n"), expected=["a", "b"]),
    Case(name="cut.txt.bz2", content=bz2.compress(b"a\nb\n" * 9999)[:-9], refused="is cut short"),
    Case(name="plain.txt.xz", content=lzma.compress(b"a\nb\n"), expected=["a", "b"]),
    Case(name="cut.txt.xz", content=lzma.compress(b"a\nb\n" * 9999)[:-9], refused="is cut short"),
    Case(name="no.txt.gz", content=b"plain text\n", refused="cannot be read"),
    Case(name="twice.parquet.gz", content=b"", refused="parquet is read from its end; decompress it first"),
    # several files
    Case(name="folder", content=folder_of(b_dot_txt="b\n", a_dot_txt="a\n", sub__c_dot_jsonl='{"text": "c"}\n'), expected=["a", "b", "c"]),
    Case(name="spark", content=folder_of(_SUCCESS="", part_dot_txt="a\n", _dot_crc="x"), expected=["a"]),
    Case(name="mixed", content=folder_of(a_dot_txt="a\n", readme_dot_md="# b"), refused=r"also has `readme.md`, which is in no known format.*--input '.*\*\.txt'"),
    Case(name="hollow", content=lambda path: path.mkdir(exist_ok=True), refused="has no files"),
    Case(name="*.txt", content=lambda path: folder_of(y_dot_txt="y", x_dot_txt="x")(path.parent), expected=["x", "y"]),
    Case(name="*.none", content=lambda path: None, refused="matches no file"),
    Case(name="nowhere.txt", content=lambda path: None, refused="is not a file"),
    Case(name="notes.docx", content=b"", refused=r"unknown file format; supported: \.jsonl.*set --format"),
    Case(name="notes.md", content="# a\n", format="txt", expected=["# a"]),
    # templates
    Case(name="t.jsonl", content='{"a": "x", "n": 5}\n{"n": null}\n', text=TextSource(template="{a}\\n{n}"), expected=["x\n5", Bad("none of the fields")]),
    Case(name="t.csv", content="a,b\nx,y\n", text=TextSource(template="{{{a}}}: {b}"), expected=["{x}: y"]),
    Case(name="t.parquet", content=table(a=["x"], d=pa.array([1.5])), text=TextSource(template="{a} {d}"), expected=["x 1.5"]),
    Case(name="t2.txt", content="a\n", text=TextSource(template="{text"), refused="the template .* is wrong"),
    Case(name="t3.txt", content="a\n", text=TextSource(template="{}"), refused="needs names of fields"),
    Case(name="t4.txt", content="a\n", text=TextSource(template="text"), refused="names no field"),
    Case(name="t5.csv", content="text\na\n", text=TextSource(template="{text} {title}"), refused="no column `title`"),
]  # fmt: skip


def read(case: Case, folder: Path) -> list[Any]:
    """The texts of an input, and what is wrong with the others, with their places."""
    path = folder / case.name
    if isinstance(case.content, bytes | str):
        path.write_bytes(case.content.encode() if isinstance(case.content, str) else case.content)
    else:
        case.content(path)
    columns = case.text.fields() if case.columns == "needed" else case.columns
    options = ReadOptions(columns=columns, delimiter=case.delimiter)
    found: list[Any] = []
    for block in Inputs(find_inputs([str(path)], case.format), options):
        for row, text in enumerate(case.text.texts(block)):
            found.append(text if isinstance(text, str) else f"{block.place(row)}: {text}")
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_kind_of_input_gives_the_right_rows_or_is_refused(case: Case, tmp_path: Path) -> None:
    if case.refused:
        with pytest.raises(InputError, match=case.refused):
            read(case, tmp_path)
        return
    found = read(case, tmp_path)
    assert len(found) == len(case.expected), found
    for text, expected in zip(found, case.expected, strict=True):
        if isinstance(expected, Bad):
            assert expected in text
            assert case.name in text
        else:
            assert text == expected


def test_values_of_other_columns_are_kept_as_they_are(tmp_path: Path) -> None:
    content = f'{{"n": {LONG_NUMBER}, "text": "a", "f": 1.10}}\n{{"text": "b", "n": null}}\n'
    (tmp_path / "a.jsonl").write_text(content)
    (block,) = Inputs(find_inputs([str(tmp_path / "a.jsonl")]), ReadOptions())
    assert block.table.column("n").to_pylist() == [LONG_NUMBER, "null"]
    assert block.table.column("f").to_pylist() == ["1.10", None]


def test_blocks_are_bounded_and_numbered_across_files(tmp_path: Path) -> None:
    count = BLOCK_ROWS + 10
    (tmp_path / "a.txt").write_text("".join(f"{number}\n" for number in range(count)))
    pq.write_table(pa.table({"text": [str(number) for number in range(count)]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("x" * 9_000_000 + "\nlast\n")
    inputs = Inputs(find_inputs([str(tmp_path / name) for name in ("a.txt", "b.parquet", "c.txt")]), ReadOptions())
    blocks = list(inputs)
    assert inputs.fraction() == pytest.approx(1.0)
    blocks = [block for block in blocks if len(block)]
    assert [block.first for block in blocks] == [0, BLOCK_ROWS, count, count + BLOCK_ROWS, 2 * count, 2 * count + 1]
    assert blocks[3].place(9).endswith(f"b.parquet` row {count}")
    assert max(map(len, blocks)) == BLOCK_ROWS


def test_a_pipe_is_read_once_and_needs_a_format(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="set --format"):
        find_inputs([str(pipe)])
    with pytest.raises(InputError, match="write it to a file first"):
        find_inputs([str(pipe)], "parquet")
    with pytest.raises(InputError, match="can be read only once"):
        find_inputs([str(pipe), str(pipe)], "txt")
    writer = threading.Thread(target=lambda: pipe.write_text(JSONL))
    writer.start()
    inputs = Inputs(find_inputs([str(pipe)], "jsonl"), ReadOptions(columns=["text"]))
    assert [text for block in inputs for text in TextSource().texts(block)] == ["a", "b"]
    assert inputs.fraction() is None
    writer.join()


def test_urls_are_opened_by_fsspec() -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    with system.open("/texts/a.jsonl", "wb") as file:
        file.write(JSONL.encode())
    with system.open("/texts/b.parquet", "wb") as file:
        pq.write_table(pa.table({"text": ["c"]}), file)
    names = ["memory://texts/a.jsonl", "memory://texts/*.parquet"]
    inputs = Inputs(find_inputs(names), ReadOptions(columns=["text"]))
    assert [text for block in inputs for text in TextSource().texts(block)] == ["a", "b", "c"]
    with pytest.raises(InputError, match="is a folder"):
        find_inputs(["memory://texts"])
    with pytest.raises(InputError, match="cannot be read"):
        find_inputs(["memory://texts/none.txt"])
    with pytest.raises(InputError, match="nosuch"):
        find_inputs(["nosuch://bucket/a.txt"])
