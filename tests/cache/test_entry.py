"""Keys know everything a vector depends on; bytes come back as they were or not at all."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from npu_proxy.cache.entry import KEY_BYTES, CacheKeys, from_bytes, to_bytes
from npu_proxy.types import Pair, TextResult, Truncate

entries = st.builds(
    TextResult,
    st_numpy.arrays(np.float32, st.integers(1, 40), elements=st.floats(-4, 4, width=32)),
    st.integers(0, 2**31),
    st.booleans(),
    st.sampled_from(["cpu", "npu", "gpu.1", ""]),
)


@given(entries)
def test_an_entry_comes_back_from_its_bytes(entry: TextResult) -> None:
    back = from_bytes(to_bytes(entry))
    assert back is not None
    np.testing.assert_array_equal(back.vector, entry.vector)
    assert (back.tokens, back.truncated, back.device) == (entry.tokens, entry.truncated, entry.device)


@given(entries, st.data())
def test_damaged_bytes_are_no_entry(entry: TextResult, data: st.DataObject) -> None:
    value = to_bytes(entry)
    assert from_bytes(value[: data.draw(st.integers(0, len(value) - 1))]) is None
    place = data.draw(st.integers(0, len(value) - 1))
    wrong = value[:place] + bytes([value[place] ^ 1 << data.draw(st.integers(0, 7))]) + value[place + 1 :]
    assert from_bytes(wrong) is None


@given(st.lists(st.text() | st.lists(st.integers(0, 9)), min_size=2, max_size=2, unique_by=repr))
def test_different_texts_have_different_keys(texts: list) -> None:
    left, right = CacheKeys("f" * 16, "none").make(texts, ("", Truncate.END, 256))
    assert left != right
    assert len(left) == len(right) == KEY_BYTES
    assert CacheKeys("f" * 16, "none").make(texts, ("", Truncate.END, 256)) == [left, right]


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        (CacheKeys("e" * 16, "none"), ("", Truncate.END, 256)),
        (CacheKeys("f" * 16, "nfkc"), ("", Truncate.END, 256)),
        (CacheKeys("f" * 16, "none", "prefix"), ("", Truncate.END, 256)),
        (CacheKeys("f" * 16, "none"), ("query: ", Truncate.END, 256)),
        (CacheKeys("f" * 16, "none"), ("", Truncate.START, 256)),
        (CacheKeys("f" * 16, "none"), ("", Truncate.END, 128)),
    ],
)
def test_whatever_changes_the_vector_changes_the_key(keys: CacheKeys, options: tuple) -> None:
    assert keys.make(["text"], options) != CacheKeys("f" * 16, "none").make(["text"], ("", Truncate.END, 256))


def test_a_prompt_and_its_text_are_not_run_together() -> None:
    keys = CacheKeys("f" * 16)
    assert keys.make(["b"], ("a", Truncate.END, 9)) != keys.make(["ab"], ("", Truncate.END, 9))
    assert keys.make(["\ud800"], ("", Truncate.END, 9)) != keys.make(["?"], ("", Truncate.END, 9))
    assert keys.make([Pair("ab", "c")], ()) != keys.make([Pair("a", "bc")], ())
