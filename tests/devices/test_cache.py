"""Compiled models on disk: keyed by versions, bounded, and never in the way."""

import os
from pathlib import Path

import numpy as np

from conftest import golden
from npu_proxy import Engine, Settings
from npu_proxy.devices.cache import Cache


def test_folders_are_those_of_the_versions_and_none_where_nothing_can_be_written(tmp_path: Path) -> None:
    cache = Cache(root=tmp_path, limit=1)
    one, other = cache.folder(["2026.4", "driver 1"]), cache.folder(["2026.4", "driver 2"])
    assert one is not None
    assert other is not None
    assert one != other
    assert cache.folder(["2026.4", "driver 1"]) == one
    assert not list(one.iterdir())
    (tmp_path / "file").write_text("")
    assert Cache(root=tmp_path / "file", limit=1).folder(["x"]) is None


def test_the_blobs_used_longest_ago_go_first(tmp_path: Path) -> None:
    cache = Cache(root=tmp_path, limit=250)
    folder = cache.folder(["x"])
    assert folder is not None
    for age, name in enumerate(("new", "middle", "old", "oldest")):
        (folder / name).write_bytes(b"0" * 100)
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    assert cache.prune() == 200
    assert sorted(file.name for file in folder.iterdir()) == ["middle", "new"]
    assert cache.prune() == 0


def test_a_worker_compiles_once_and_goes_on_when_the_disk_is_full(tmp_path: Path) -> None:
    folder, texts, vectors = golden("mean")
    settings = Settings(
        model=str(folder), device="npu-sim", fallback="off", store=tmp_path / "store", compile_cache=tmp_path / "cache"
    )

    def embedded(chosen: Settings) -> None:
        with Engine(settings=chosen) as engine:
            np.testing.assert_allclose(engine.embed(texts, normalize=False), vectors, atol=2e-5)

    embedded(settings)
    blobs = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert blobs
    before = {file: file.stat().st_mtime_ns for file in blobs}
    embedded(settings)
    assert {file: file.stat().st_mtime_ns for file in blobs} == before  # taken, not written anew
    for file in blobs:
        file.write_bytes(b"damaged")
    embedded(settings)
    full = Path("/dev/full") if Path("/dev/full").exists() else tmp_path / "cache" / blobs[0].name
    embedded(Settings(model=str(folder), device="npu-sim", fallback="off", store=tmp_path / "store", compile_cache=full))
