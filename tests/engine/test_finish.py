"""Output arithmetic: slices, norms, types."""

import base64

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from npu_proxy.engine.finish import cast
from npu_proxy.engine.similarity import normalize
from npu_proxy.types import DType

vectors = arrays(np.float32, st.tuples(st.integers(1, 5), st.just(16)), elements=st.floats(-1e3, 1e3, width=32))


@given(vectors)
def test_norms_are_one_or_zero(given: np.ndarray) -> None:
    lengths = np.linalg.norm(normalize(given).astype(np.float64), axis=1)
    zero = np.linalg.norm(given, axis=1) == 0
    assert np.all((np.abs(lengths - 1) < 1e-5) | zero | (np.abs(given).max(axis=1) < 1e-18))


@given(vectors)
def test_a_vector_is_cast_as_it_would_be_alone(given: np.ndarray) -> None:
    unit = normalize(given)
    for dtype in DType:
        together = cast(unit, dtype)
        for number in range(len(unit)):
            np.testing.assert_array_equal(np.asarray(together)[number], np.asarray(cast(unit[number : number + 1], dtype))[0])


def numbers(vectors: np.ndarray, dtype: DType) -> np.ndarray:
    found = cast(vectors, dtype)
    assert isinstance(found, np.ndarray)
    return found


def test_types_mean_what_they_say() -> None:
    vector = np.array([[0.6, -0.8, 0, 0, 0, 0, -0.0, 1e-9]], np.float32)
    assert numbers(vector, DType.INT8).tolist() == [[76, -102, 0, 0, 0, 0, 0, 0]]
    assert numbers(vector, DType.UINT8).tolist() == [[204, 26, 128, 128, 128, 128, 128, 128]]
    assert numbers(vector, DType.UBINARY).tolist() == [[0b10111111]]
    assert numbers(vector, DType.BINARY).tolist() == [[0b10111111 - 128]]
    (text,) = cast(vector, DType.BASE64)
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(text), "<f4"), vector[0])
    assert numbers(vector, DType.FLOAT16).dtype == np.float16
