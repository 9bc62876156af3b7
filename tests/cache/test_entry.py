"""Keys know everything a vector depends on; bytes come back as they were or not at all."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from npu_proxy.cache.entry import KEY_BYTES, Keys, from_bytes, to_bytes
from npu_proxy.types import Embedded, Pair, Truncate

entries = st.builds(
    Embedded,
    st_numpy.arrays(np.float32, st.integers(1, 40), elements=st.floats(-4, 4, width=32)),
    st.integers(0, 2**31),
    st.booleans(),
    st.sampled_from(["cpu", "npu", "gpu.1", ""]),
)


@given(entries)
def test_an_entry_comes_back_from_its_bytes(entry: Embedded) -> None:
    back = from_bytes(to_bytes(entry))
    assert back is not None
    np.testing.assert_array_equal(back.vector, entry.vector)
    assert (back.tokens, back.truncated, back.device) == (entry.tokens, entry.truncated, entry.device)


@given(entries, st.data())
def test_damaged_bytes_are_no_entry(entry: Embedded, data: st.DataObject) -> None:
    value = to_bytes(entry)
    assert from_bytes(value[: data.draw(st.integers(0, len(value) - 1))]) is None
    place = data.draw(st.integers(0, len(value) - 1))
    wrong = value[:place] + bytes([value[place] ^ 1 << data.draw(st.integers(0, 7))]) + value[place + 1 :]
    assert from_bytes(wrong) is None


@given(st.lists(st.text() | st.lists(st.integers(0, 9)), min_size=2, max_size=2, unique_by=repr))
def test_different_texts_have_different_keys(texts: list) -> None:
    one, other = Keys("f" * 16, "none").of(texts, ("", Truncate.END, 256))
    assert one != other
    assert len(one) == len(other) == KEY_BYTES
    assert Keys("f" * 16, "none").of(texts, ("", Truncate.END, 256)) == [one, other]


@pytest.mark.parametrize(
    ("keys", "how"),
    [
        (Keys("e" * 16, "none"), ("", Truncate.END, 256)),
        (Keys("f" * 16, "nfkc"), ("", Truncate.END, 256)),
        (Keys("f" * 16, "none", "prefix"), ("", Truncate.END, 256)),
        (Keys("f" * 16, "none"), ("query: ", Truncate.END, 256)),
        (Keys("f" * 16, "none"), ("", Truncate.START, 256)),
        (Keys("f" * 16, "none"), ("", Truncate.END, 128)),
    ],
)
def test_whatever_changes_the_vector_changes_the_key(keys: Keys, how: tuple) -> None:
    assert keys.of(["text"], how) != Keys("f" * 16, "none").of(["text"], ("", Truncate.END, 256))


def test_a_prompt_and_its_text_are_not_run_together() -> None:
    keys = Keys("f" * 16)
    assert keys.of(["b"], ("a", Truncate.END, 9)) != keys.of(["ab"], ("", Truncate.END, 9))
    assert keys.of(["\ud800"], ("", Truncate.END, 9)) != keys.of(["?"], ("", Truncate.END, 9))
    assert keys.of([Pair("ab", "c")], ()) != keys.of([Pair("a", "bc")], ())
