"""What callers pass as texts: every collection of texts works, at every length; everything else is refused by name, at once."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from conftest import fake_engine
from npu_proxy import AsyncEngine, EmbedRequest, Engine, InputError, Pair
from npu_proxy.devices.fake import FakeDevice

COLLECTIONS: dict[str, Callable[[list[str]], Any]] = {
    "list": list,
    "tuple": tuple,
    "generator": lambda texts: (text for text in texts),
    "dict keys": lambda texts: dict.fromkeys(texts).keys(),
    "dict values": lambda texts: dict(enumerate(texts)).values(),
    "numpy strings": np.array,
    "numpy objects": lambda texts: np.array(texts, object),
    "pandas Series": pd.Series,
    "pandas Index": pd.Index,
    "pandas Series with another index": lambda texts: pd.Series(texts, index=range(5, 5 + len(texts))),
    "pandas arrow strings": lambda texts: pd.Series(texts, dtype="string[pyarrow]"),
    "pandas categories": lambda texts: pd.Series(texts, dtype="category"),
    "polars Series": pl.Series,
    "pyarrow array": pa.array,
    "pyarrow chunked array": lambda texts: pa.chunked_array([texts[:1], texts[1:]]),
    "pyarrow scalars": lambda texts: list(pa.array(texts)),
    "map": lambda texts: map(str, texts),
}
TEXTS = ["the cat", "the dog", "one two three", "the moon"]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with fake_engine(FakeDevice(width=32)) as made:
        yield made


@pytest.mark.parametrize("name", COLLECTIONS)
@pytest.mark.parametrize("batch_size", [2, 3, 256], ids=["more than a batch", "a batch and one", "less"])
def test_every_collection_of_texts_works_whatever_its_length(engine: Engine, name: str, batch_size: int) -> None:
    make, expected = COLLECTIONS[name], engine.embed(TEXTS)
    np.testing.assert_array_equal(engine.embed(make(TEXTS), batch_size=batch_size), expected)
    np.testing.assert_array_equal(list(engine.stream(make(TEXTS), batch_size=batch_size)), expected)
    assert sum(len(result.tokens) for result in engine.results(make(TEXTS), batch_size=batch_size)) == len(TEXTS)


def test_sets_work_in_their_own_order(engine: Engine) -> None:
    for texts in (set(TEXTS), frozenset(TEXTS)):
        np.testing.assert_array_equal(engine.embed(texts), engine.embed(list(texts)))


@pytest.mark.parametrize("ids", [[5, 6], (5, 6), np.array([5, 6]), np.array([5, 6], np.uint16), [np.int64(5), np.int32(6)]])
def test_token_ids_are_lists_of_integers(engine: Engine, ids: Any) -> None:
    np.testing.assert_array_equal(engine.embed([ids]), engine.embed([[5, 6]]))
    np.testing.assert_array_equal(engine.embed(np.array([[5, 6], [5, 6]])), engine.embed([[5, 6]] * 2))


WRONG: dict[str, tuple[Any, str]] = {
    "string": ("abc", r"\[text\]"),
    "pair": (Pair("a", "b"), "a pair"),
    "bytes": (b"abc", "decode"),
    "None": (None, "pass a list"),
    "number": (3, "pass a list"),
    "dict": ({"a": "b"}, r"texts.values\(\)"),
    "pandas DataFrame": (pd.DataFrame({"text": TEXTS}), 'table\\["text"\\]'),
    "polars DataFrame": (pl.DataFrame({"text": TEXTS}), 'table\\["text"\\]'),
    "polars LazyFrame": (pl.LazyFrame({"text": TEXTS}), 'table\\["text"\\]'),
    "pyarrow Table": (pa.table({"text": TEXTS}), 'table\\["text"\\]'),
    "vectors": (np.zeros([2, 4], np.float32), "float32 array of shape"),
    "scalar array": (np.array("abc"), "array of shape"),
    "list of vectors": ([[0.1, 0.2]], "vectors cannot be embedded"),
    "list of arrays": ([np.zeros(4)], "vectors cannot be embedded"),
    "list of numbers": ([1, 2, 3], "text 0 is of type int"),
    "array of numbers": (np.array([1, 2, 3]), "text 0 is of type int"),
    "booleans": ([[True, False]], "list of bool"),
    "tuple of strings": ([("a", "b")], "Pair"),
    "bytes in a list": (["a", b"b"], "text 1 is of type bytes"),
    "None in a list": (["a", None], "text 1 is missing"),
    "NaN in a Series": (pd.Series(["a", float("nan")]), "text 1 is missing"),
    "NA in a Series": (pd.Series(["a", pd.NA]), "text 1 is missing"),
    "null in polars": (pl.Series(["a", None]), "text 1 is missing"),
    "null in pyarrow": (pa.array(["a", None]), "text 1 is missing"),
    "objects": ([object()], "text 0 is of type object"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_text_is_refused_before_anything_runs(name: str) -> None:
    texts, message = WRONG[name]
    device = FakeDevice(width=32)
    with fake_engine(device, cache_mb=0) as engine:
        with pytest.raises(InputError, match=message):
            engine.embed(texts)
        with pytest.raises(InputError, match=message):
            list(engine.stream(texts))
        if not isinstance(texts, str | Pair):
            with pytest.raises(InputError):
                engine.submit(EmbedRequest(texts=texts))

        async def run() -> None:
            with pytest.raises(InputError, match=message):
                await AsyncEngine(engine=engine).embed(texts)

        asyncio.run(run())
        assert device.batches == []


def test_the_index_of_a_wrong_text_counts_from_the_first_batch(engine: Engine) -> None:
    with pytest.raises(InputError, match="text 3, counted from 0"):
        engine.embed(["a", "b", "c", ""], batch_size=2)
    with pytest.raises(InputError, match="text 3, counted from 0"):
        list(engine.stream(["a", "b", "c", ""], batch_size=2))


@pytest.mark.parametrize("documents", ["a", [b"a"], [["a"]], [1], [[1, 2]], {"a": "b"}])
def test_rerank_takes_strings_only(engine: Engine, documents: Any) -> None:
    with pytest.raises(InputError):
        engine.rerank("query", documents)


def test_a_wrong_option_is_refused_before_the_first_of_many_texts() -> None:
    device = FakeDevice(width=32)
    with fake_engine(device, cache_mb=0) as engine:
        with pytest.raises(InputError, match="batchsize"):
            engine.embed(["a"] * 600, batchsize=3)  # type: ignore[call-arg]
        for wrong in (0, -1):
            with pytest.raises(InputError, match="batch_size"):
                engine.embed(["a"], batch_size=wrong)
        assert device.batches == []
