"""verify: vectors of this model and prompt are recognized in every format, all others are not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import GOLDEN
from npu_proxy import Engine, InputError, Settings
from npu_proxy.bulk.verify import verify
from npu_proxy.commands.app import main

MODEL = str(GOLDEN / "mean")
TEXTS = [f"the cat sleeps {number}" for number in range(60)]


@pytest.fixture(scope="module")
def engine() -> Any:
    with Engine(MODEL, "cpu", Settings(cache_mb=0)) as made:
        yield made


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS) + "\n")
    return file


def check(engine: Engine, vectors: Path, source: Path, sample: int = 20) -> Any:
    return verify(engine, vectors, source, text_field="text", vector_field="embedding", sample=sample)


@pytest.mark.parametrize("prompt", ["", "one two "])
@pytest.mark.parametrize("suffix", [".npy", ".jsonl", ".parquet"])
def test_vectors_are_recognized_with_their_prompt_in_every_format(
    engine: Engine, source: Path, tmp_path: Path, suffix: str, prompt: str
) -> None:
    vectors, file = engine.embed(TEXTS, prompt=prompt), tmp_path / f"vectors{suffix}"
    if suffix == ".npy":
        np.save(file, vectors)
    elif suffix == ".jsonl":
        file.write_text("".join(json.dumps({"embedding": vector.tolist()}) + "\n" for vector in vectors))
    else:
        pq.write_table(pa.table({"embedding": [vector.tolist() for vector in vectors]}), file)
    found = check(engine, file, source)
    assert found.same
    assert found.matches[0].text == prompt
    assert (found.sampled, found.count, found.dimensions) == (20, 60, 32)
    assert found.matches[1].mean < 0.999


@pytest.mark.parametrize(
    "options", [{"dimensions": 16}, {"normalize": False}, {"dtype": "float16"}, {"dtype": "int8"}, {"dtype": "uint8"}]
)
def test_cut_unnormalized_and_quantized_vectors_are_recognized_too(
    engine: Engine, source: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    np.save(tmp_path / "v.npy", engine.embed(TEXTS, **options))
    assert check(engine, tmp_path / "v.npy", source).same


def test_vectors_of_other_models_or_in_another_order_are_not(engine: Engine, source: Path, tmp_path: Path) -> None:
    with Engine(GOLDEN / "max", "cpu") as other:
        np.save(tmp_path / "other.npy", other.embed(TEXTS))
    vectors = engine.embed(TEXTS)
    np.save(tmp_path / "reversed.npy", vectors[::-1])
    vectors[7, ::2] *= -1
    np.save(tmp_path / "one.npy", vectors)
    assert not check(engine, tmp_path / "other.npy", source).same
    assert not check(engine, tmp_path / "reversed.npy", source).same
    assert not check(engine, tmp_path / "one.npy", source, sample=60).same


def test_files_that_do_not_belong_together_are_refused(engine: Engine, source: Path, tmp_path: Path) -> None:
    vectors = engine.embed(TEXTS)
    for name, array, message in (
        ("few", vectors[:-1], "more texts"),
        ("many", np.concatenate([vectors, vectors]), "more vectors"),
        ("wide", np.concatenate([vectors, vectors], axis=1), "64 dimensions"),
        ("flat", vectors.reshape(-1), "expected"),
        ("words", np.array(TEXTS), "expected"),
        ("nothing", np.full_like(vectors, np.nan), "no vectors"),
    ):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(InputError, match=message):
            check(engine, tmp_path / f"{name}.npy", source)
    (tmp_path / "a.jsonl").write_text('{"vector": [1]}\n' * 60)
    with pytest.raises(InputError, match="--vector-field"):
        check(engine, tmp_path / "a.jsonl", source)


def test_rows_without_a_vector_are_left_out(engine: Engine, source: Path, tmp_path: Path) -> None:
    rows = [None if number % 3 else vector.tolist() for number, vector in enumerate(engine.embed(TEXTS))]
    (tmp_path / "v.jsonl").write_text("".join(json.dumps({"embedding": row}) + "\n" for row in rows))
    found = check(engine, tmp_path / "v.jsonl", source, sample=100)
    assert found.same
    assert found.sampled == 20


def test_the_command_says_which_prompt_and_its_exit_code_is_the_answer(
    engine: Engine, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "v.npy", engine.embed(TEXTS, input_type="query"))
    np.save(tmp_path / "w.npy", engine.embed(TEXTS)[::-1])
    for name, code, words in (("v", 0, "with the prompt `query` ('one two ')"), ("w", 1, "not made by")):
        with pytest.raises(SystemExit) as ended:
            main(["verify", str(tmp_path / f"{name}.npy"), "--input", str(source), "--model", MODEL, "--device", "cpu"])
        assert ended.value.code == code
        assert words in capsys.readouterr().out
