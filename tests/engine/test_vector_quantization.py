"""Small vectors as sentence-transformers makes them (quantized.npz holds what its version 6.2 made), and rescoring."""

from pathlib import Path

import numpy as np
import pytest

from npu_proxy import InputError
from npu_proxy.engine.vector_quantization import Precision, calibrate, dequantize, quantize_embeddings, rescore

STORED = np.load(Path(__file__).parent / "quantized.npz")
VECTORS, CALIBRATION = STORED["vectors"], STORED["calibration"]


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_numbers_are_those_of_sentence_transformers(precision: Precision) -> None:
    found = quantize_embeddings(VECTORS, precision, calibration=CALIBRATION)
    assert found.dtype == STORED[precision].dtype
    np.testing.assert_array_equal(found, STORED[precision])
    alone = [quantize_embeddings(vector[None], precision, ranges=calibrate(CALIBRATION))[0] for vector in VECTORS]
    np.testing.assert_array_equal(alone, found)


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_what_they_stand_for_is_within_a_step(precision: Precision) -> None:
    ranges = calibrate(CALIBRATION)
    inside = np.clip(VECTORS, ranges[0], ranges[1])
    back = dequantize(quantize_embeddings(inside, precision, ranges=ranges), ranges=ranges)
    assert (np.abs(back - inside) <= (ranges[1] - ranges[0]) / 255 + 1e-5).all()


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
def test_bits_come_back(precision: Precision) -> None:
    vectors = VECTORS[:, :21]  # no whole bytes
    back = dequantize(quantize_embeddings(vectors, precision), width=21)
    np.testing.assert_array_equal(back, vectors > 0)


def test_rescoring_orders_by_the_vectors_as_they_were() -> None:
    rng = np.random.default_rng(0)
    corpus, queries = rng.normal(size=(500, 32)).astype(np.float32), rng.normal(size=(20, 32)).astype(np.float32)
    exact = np.argsort(-(queries @ corpus.T), axis=1)[:, :5]
    small = quantize_embeddings(corpus, "binary")
    bits, query_bits = dequantize(small, width=32), dequantize(quantize_embeddings(queries, "binary"), width=32)
    distances = np.abs(query_bits[:, None] - bits[None]).sum(-1)
    first = np.argsort(distances, axis=1, kind="stable")[:, :100]
    found, scores = rescore(queries, corpus[first], first, top_n=5)

    def recall(indices: np.ndarray) -> float:
        return float(np.mean([len(set(a) & set(b)) / 5 for a, b in zip(indices, exact, strict=True)]))

    assert recall(found) > recall(first[:, :5])
    assert (np.diff(scores, axis=1) <= 0).all()


def test_what_cannot_be_is_refused() -> None:
    for call in (
        lambda: quantize_embeddings(VECTORS, "int8"),
        lambda: quantize_embeddings(VECTORS[0], "binary"),
        lambda: quantize_embeddings(VECTORS.astype(np.int8), "binary"),
        lambda: quantize_embeddings(VECTORS, "int8", ranges=np.zeros([2, 3])),
        lambda: quantize_embeddings(VECTORS, "int4"),  # pyright: ignore[reportArgumentType]
        lambda: quantize_embeddings(np.full([1, 4], np.nan), "binary"),
        lambda: calibrate(np.zeros([0, 4])),
        lambda: rescore(VECTORS, VECTORS, np.zeros([9, 2], int), top_n=1),
    ):
        with pytest.raises(InputError):
            call()
