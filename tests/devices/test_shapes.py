"""The shapes of devices: every text fits one, they are few, and their costs are ordered as devices are."""

import pytest

from npu_proxy.devices.shapes import CPU_COST, NPU_COST, Cost, dynamic_shapes, static_shapes


@pytest.mark.parametrize(("limit", "longest"), [(256, 256), (512, 512), (128, 128), (100, 128), (20, 32), (8192, 8192)])
def test_shapes_hold_every_text_and_are_few(limit: int, longest: int) -> None:
    for shapes, most in ((dynamic_shapes(limit, 512, packed=True), 12), (static_shapes(limit, 512, packed=True), 3)):
        assert max(shape.positions for shape in shapes) == longest
        assert len(shapes) <= most
        assert len(set(shapes)) == len(shapes)
    for shapes in (dynamic_shapes(limit, 512, packed=False), static_shapes(limit, 512, packed=False)):
        assert all(shape.segments == 1 for shape in shapes)


@pytest.mark.parametrize("cost", [CPU_COST, NPU_COST])
def test_longer_bins_and_smaller_batches_cost_more_per_token(cost: Cost) -> None:
    assert cost.work(8, 64) < cost.work(4, 128) < cost.work(2, 256)
    assert cost.work(1, 64) / 64 > cost.work(8, 64) / 512


def test_a_fixed_cost_matters_more_on_an_npu() -> None:
    assert NPU_COST.work(1, 128) / NPU_COST.work(4, 128) > CPU_COST.work(1, 128) / CPU_COST.work(4, 128)
