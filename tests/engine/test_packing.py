"""Packing is a pure function: nothing is lost, nothing overflows, the oldest goes, little is wasted."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_proxy.batch import BatchLayout, BatchShape, Encoding
from npu_proxy.devices.shapes import dynamic_shapes
from npu_proxy.engine.packing import BatchPlan, aligned, fill_bins, full_shape, pack, plan_batch
from npu_proxy.types import Pooling

SHAPES = [
    BatchShape(bins=b, positions=p, segments=max(1, p // 8)) for b, p in ((1, 32), (16, 32), (1, 64), (8, 64), (1, 256), (2, 256))
]
lengths_of_texts = st.lists(st.integers(1, 256), min_size=1, max_size=200)


def encodings_of(lengths: list[int]) -> list[Encoding]:
    return [Encoding(np.arange(1, n + 1, dtype=np.int32) + 1000 * i, truncated=False) for i, n in enumerate(lengths)]


@given(lengths_of_texts)
def test_a_batch_holds_its_limits_and_the_first_text(lengths: list[int]) -> None:
    plan = plan_batch(lengths, SHAPES)
    chosen = plan.indices
    assert 0 in chosen
    assert len(chosen) == len(set(chosen))
    assert len(plan.bins) <= plan.shape.bins
    for bin in plan.bins:
        assert sum(lengths[index] for index in bin) <= plan.shape.positions
        assert len(bin) <= plan.shape.segments


@given(lengths_of_texts, st.data())
def test_texts_of_several_vectors_find_room(lengths: list[int], data: st.DataObject) -> None:
    vectors = [data.draw(st.integers(1, max(1, length // 16 + 1))) for length in lengths]
    waiting, taken = list(range(len(lengths))), []
    while waiting:
        plan = plan_batch([lengths[i] for i in waiting], SHAPES, [vectors[i] for i in waiting])
        bins = [[waiting[index] for index in bin] for bin in plan.bins]
        assert waiting[0] in bins[0]
        for bin in bins:
            assert sum(lengths[i] for i in bin) <= plan.shape.positions
            assert sum(vectors[i] for i in bin) <= plan.shape.segments
        taken += [i for bin in bins for i in bin]
        waiting = [i for i in waiting if i not in set(taken)]
    assert sorted(taken) == list(range(len(lengths)))


@given(lengths_of_texts)
def test_repeated_batches_take_every_text_once(lengths: list[int]) -> None:
    waiting = list(range(len(lengths)))
    taken: list[int] = []
    while waiting:
        plan = plan_batch([lengths[i] for i in waiting], SHAPES)
        batch = [waiting[index] for index in plan.indices]
        assert batch
        taken += batch
        waiting = [i for i in waiting if i not in set(batch)]
    assert sorted(taken) == list(range(len(lengths)))


@given(lengths_of_texts, st.sampled_from(list(Pooling)))
def test_the_arrays_say_what_the_plan_says(lengths: list[int], pooling: Pooling) -> None:
    encodings = encodings_of(lengths)
    layout = BatchLayout(pooling=pooling)
    plan = plan_batch([aligned(length, layout.align) for length in lengths], SHAPES)
    batch = pack(encodings, plan, layout)
    assert all(slot.start % layout.align == 0 for slot in batch.slots)
    assert batch.tokens == int((batch.inputs["segment_ids"] >= 0).sum())
    assert batch.encodings == [encodings[index] for index in plan.indices]
    for encoding, slot in zip(batch.encodings, batch.slots, strict=True):
        here = batch.inputs["segment_ids"][slot.bin] == slot.segment
        np.testing.assert_array_equal(batch.inputs["input_ids"][slot.bin][here], encoding.ids)
        np.testing.assert_array_equal(batch.inputs["position_ids"][slot.bin][here], np.arange(encoding.tokens))
        if pooling is Pooling.MEAN:
            weights = batch.inputs["pool"][slot.bin, slot.segment]
            np.testing.assert_allclose(weights[here], 1 / encoding.tokens)
            assert weights[~here].sum() == 0


def test_a_single_short_text_takes_the_smallest_batch() -> None:
    assert str(plan_batch([10], SHAPES).shape) == "1x32"
    assert str(plan_batch([40, 20], SHAPES).shape) == "1x64"


def test_a_deep_queue_fills_batches() -> None:
    rng = random.Random(0)
    waiting = [min(256, max(3, int(rng.lognormvariate(3.9, 0.9)))) for _ in range(4000)]
    tokens = sum(waiting)
    positions = 0
    while len(waiting) > 200:
        window = waiting[:512]
        plan = plan_batch(window, SHAPES)
        gone = set(plan.indices)
        positions += plan.shape.tokens
        waiting = [n for i, n in enumerate(window) if i not in gone] + waiting[512:]
    assert positions / (tokens - sum(waiting)) < 1.06


def test_the_shape_for_a_deep_queue_is_not_that_of_one_long_text() -> None:
    shapes = dynamic_shapes(8192, 512, packed=True)
    assert max(shape.tokens for shape in shapes) == 8192
    assert full_shape(shapes).tokens == 512
    assert full_shape(SHAPES[:1]) is SHAPES[0]


def test_a_text_longer_than_every_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="257 tokens does not fit into any batch"):
        plan_batch([257], SHAPES)


def test_fill_bins_prefers_the_longest_that_fits() -> None:
    plan = fill_bins([30, 5, 34, 20, 60], BatchShape(bins=2, positions=64, segments=8))
    assert plan == BatchPlan(plan.shape, [[0, 2], [4]])
