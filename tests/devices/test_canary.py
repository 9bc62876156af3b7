"""Canaries and echoes: where they go, what they cost, and which corruptions of an output they notice."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from npu_proxy.batch import Batch, BatchLayout, BatchShape, Encoding, output_for
from npu_proxy.devices.canary import LARGEST_LOSS, check_guards, is_same, place_canaries, same_vectors
from npu_proxy.devices.failure import BatchError, Failure
from npu_proxy.engine.packing import BatchPlan, fill_bins, pack, plan_batch
from npu_proxy.types import OutputType, Pooling

SHAPES = [BatchShape(bins=b, positions=p, segments=max(1, p // 8)) for b, p in ((1, 32), (8, 64), (4, 128), (2, 256))]
LAYOUT = BatchLayout(pooling=Pooling.MEAN, width=8)
CANARIES = [Encoding(np.array([7, number, 8], np.int32), truncated=False) for number in range(4)]


def vector_of(ids: np.ndarray) -> np.ndarray:
    """The vector [8] of a text, unlike that of any other."""
    return np.random.default_rng(ids.astype(np.uint32)).standard_normal(8).astype(np.float32)


KNOWN = [vector_of(canary.ids)[None] for canary in CANARIES]
lengths_of_texts = st.lists(st.integers(1, 256), min_size=1, max_size=150)


def texts_of(lengths: list[int]) -> list[Encoding]:
    return [Encoding(np.arange(1, n + 1, dtype=np.int32) + 1000 * i, truncated=False) for i, n in enumerate(lengths)]


def batch_of(lengths: list[int], turn: int | None = 0, shapes: list[BatchShape] = SHAPES) -> Batch:
    return pack(texts_of(lengths), plan_batch(lengths, shapes, canary_tokens=3), LAYOUT, canaries=CANARIES, turn=turn)


def computed(batch: Batch) -> np.ndarray:
    """What a right device returns: every segment that pools anything has the vector of the text that it pools."""
    vectors = np.zeros((batch.shape.bins, batch.shape.segments, 8), np.float32)
    for bin in range(batch.shape.bins):
        for segment in range(batch.shape.segments):
            positions = np.flatnonzero(batch.inputs["pool"][bin, segment])
            if len(positions):
                vectors[bin, segment] = vector_of(batch.inputs["input_ids"][bin, positions])
    return vectors


def check(batch: Batch, vectors: np.ndarray) -> None:
    check_guards("fake", batch, vectors, KNOWN, 0.999)


def noticed(batch: Batch, vectors: np.ndarray) -> bool:
    try:
        check(batch, vectors)
    except BatchError as error:
        return error.failure is Failure.CANARY
    return False


# -- where they go -------------------------------------------------------------------------------------------------------


@given(lengths_of_texts, st.integers(0, 50))
def test_guards_are_beside_the_texts_and_change_none_of_them(lengths: list[int], turn: int) -> None:
    batch, bare = batch_of(lengths, turn), batch_of(lengths, None)
    assert [text.key for text in batch.encodings] == [text.key for text in bare.encodings]
    assert [slot.bin for slot in batch.slots] == [slot.bin for slot in bare.slots]
    assert not bare.canaries
    assert not bare.echoes
    segments: Any = batch.inputs["segment_ids"]
    taken = [(slot.bin, slot.segment) for slot in batch.slots]
    taken += [(canary.slot.bin, canary.slot.segment) for canary in batch.canaries]
    taken += [(bin, echo) for bin, _, echo in batch.echoes]
    assert len(taken) == len(set(taken))
    for encoding, slot in [*zip(batch.encodings, batch.slots, strict=True), *((c.encoding, c.slot) for c in batch.canaries)]:
        span = slice(slot.start, slot.start + encoding.tokens)
        assert (batch.inputs["input_ids"][slot.bin, span] == encoding.ids).all()
        assert (segments[slot.bin, span] == slot.segment).all()
        assert (batch.inputs["position_ids"][slot.bin, span] == np.arange(encoding.tokens)).all()
    assert (segments >= 0).sum() == batch.tokens + sum(canary.encoding.tokens for canary in batch.canaries)
    check(batch, computed(batch))


@given(lengths_of_texts)
def test_room_for_a_canary_costs_little_and_no_text_is_left_out_for_it_alone(lengths: list[int]) -> None:
    bare, roomy = plan_batch(lengths, SHAPES), plan_batch(lengths, SHAPES, canary_tokens=3)
    assert roomy.shape == bare.shape
    assert 0 in roomy.bins[0]
    kept, most = (sum(lengths[index] for index in plan.indices) for plan in (roomy, bare))
    assert kept >= (1 - LARGEST_LOSS) * most
    if not place_canaries(roomy.bins, lengths, (), roomy.shape, [3], 0):
        assert roomy.indices == bare.indices  # it would have cost too much


@given(lengths_of_texts, st.integers(1, 8))
def test_a_plan_with_spare_room_keeps_it(lengths: list[int], spare: int) -> None:
    shape = SHAPES[2]
    assume(lengths[0] <= shape.positions)
    plan = fill_bins(lengths, shape, (), spare)
    if len(plan.bins) == shape.bins:
        assert sum(lengths[index] for index in plan.bins[-1]) <= shape.positions - spare
        assert len(plan.bins[-1]) < shape.segments


def test_places_and_canaries_change_from_batch_to_batch() -> None:
    seen: set[tuple[int, int]] = set()
    for turn in range(40):
        places = place_canaries([[0, 1, 2]], [5, 5, 5], (), BatchShape(bins=1, positions=64, segments=8), [3, 3, 3, 3], turn)
        seen.add(places[0])
    assert seen == {(canary, place) for canary in range(4) for place in range(4)}


def test_a_bin_without_room_gets_none() -> None:
    shape = BatchShape(bins=3, positions=32, segments=2)
    assert place_canaries([[0], [1, 2]], [30, 5, 5], (), shape, [3], 0) == {2: (0, 0)}  # no positions; no segment; empty
    assert place_canaries([[0]], [10], [2], shape, [3], 0) == {1: (0, 0), 2: (0, 0)}  # a text of two vectors
    assert place_canaries([[0]], [10], (), shape, [], 0) == {}


def test_most_batches_of_a_deep_queue_carry_a_canary() -> None:
    lengths = [int(n) for n in np.clip(np.random.default_rng(0).lognormal(4, 0.9, 3000), 4, 256)]
    shapes = [BatchShape(bins=4, positions=128, segments=16), BatchShape(bins=2, positions=256, segments=32)]
    counts: dict[int, tuple[int, int]] = {}
    for room in (0, 3):
        waiting, batches, carrying = list(lengths), 0, 0
        while len(waiting) > 128:
            window = waiting[:128]
            plan = plan_batch(window, shapes, canary_tokens=room)
            batches += 1
            carrying += bool(place_canaries(plan.bins, window, (), plan.shape, [3], 0))
            chosen = set(plan.indices)
            waiting = [length for index, length in enumerate(window) if index not in chosen] + waiting[128:]
        counts[room] = batches, carrying
    assert counts[3][1] > 0.9 * counts[3][0]
    assert counts[3][0] <= 1.01 * counts[0][0]


# -- what they notice ----------------------------------------------------------------------------------------------------

several = st.lists(st.integers(1, 40), min_size=6, max_size=60)


@given(several, st.integers(0, 20), st.data())
def test_outputs_of_another_place_are_noticed(lengths: list[int], turn: int, data: st.DataObject) -> None:
    batch = batch_of(lengths, turn)
    right = computed(batch)
    assume(batch.echoes)
    bin = data.draw(st.sampled_from([bin for bin, _, _ in batch.echoes]))
    shifted = right.copy()
    shifted[bin] = np.roll(right[bin], 1, axis=0)
    texts = [slot.segment for slot in batch.slots if slot.bin == bin]
    guards = [canary for canary in batch.canaries if canary.slot.bin == bin]
    if texts and (len(texts) > 1 or guards):
        assert noticed(batch, shifted)


@given(several, several, st.integers(0, 20))
def test_outputs_of_another_batch_are_noticed(lengths: list[int], others: list[int], turn: int) -> None:
    shapes = [SHAPES[2]]
    batch, other = batch_of(lengths, turn, shapes), batch_of(others, turn + 1, shapes)
    assert noticed(batch, computed(other))


@given(several, st.integers(0, 20))
def test_what_was_not_written_is_noticed(lengths: list[int], turn: int) -> None:
    batch = batch_of(lengths, turn)
    assume(batch.canaries)  # one-token texts can take every segment
    assert noticed(batch, np.full_like(computed(batch), np.nan))


@given(several, st.integers(0, 20))
def test_other_weights_are_noticed(lengths: list[int], turn: int) -> None:
    batch = batch_of(lengths, turn)
    assume(batch.canaries)
    rotation, _ = np.linalg.qr(np.random.default_rng(turn).standard_normal((8, 8)))
    assert noticed(batch, (computed(batch) @ rotation).astype(np.float32))


def test_rounding_is_not_noticed() -> None:
    batch = batch_of([5, 9, 20])
    check(batch, computed(batch) * np.float32(1.0000001) + np.float32(1e-7))


# -- what is the same ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [OutputType.DENSE, OutputType.SPARSE, OutputType.TOKENS, OutputType.SCORES])
def test_equal_outputs_are_the_same_even_if_they_have_no_cosine(kind: OutputType) -> None:
    zeros = np.zeros((2, 5), np.float32)
    nan = np.full((2, 5), np.nan, np.float32)
    ones = np.ones((2, 5), np.float32)
    assert is_same(kind, zeros, zeros, 0.999)
    assert is_same(kind, nan, nan, 0.999)
    assert not is_same(kind, nan, ones, 0.999)
    assert not is_same(kind, ones, nan, 0.999)
    assert not is_same(kind, np.array([[1, -1.0]], np.float32), np.array([[-1, 1.0]], np.float32), 0.999)


def test_two_computations_are_compared_text_by_text() -> None:
    batch = batch_of([5, 9, 10])
    right = computed(batch)
    assert same_vectors(batch, right, right, 0.999)
    for index in range(3):
        wrong = right.copy()
        output_for(batch, index, wrong)[:] *= -1
        assert not same_vectors(batch, right, wrong, 0.999)


def test_a_plan_without_canaries_packs_as_before() -> None:
    encodings = texts_of([4, 4])
    batch = pack(encodings, BatchPlan(SHAPES[0], [[0, 1]]), LAYOUT)
    assert (batch.canaries, batch.echoes) == ([], [])
