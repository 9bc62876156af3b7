"""Compiled models on disk: keyed by versions, bounded, and no obstacle when they are damaged or cannot be written."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import golden
from npu_proxy import Engine, Settings
from npu_proxy.devices.worker.blobs import read_blob, write_blob
from npu_proxy.devices.worker.compile_cache import CompileCache


def test_folders_are_those_of_the_versions_and_none_where_nothing_can_be_written(tmp_path: Path) -> None:
    cache = CompileCache(root=tmp_path, limit=1)
    first, second = cache.folder(["2026.4", "driver 1"]), cache.folder(["2026.4", "driver 2"])
    assert first is not None
    assert second is not None
    assert first != second
    assert cache.folder(["2026.4", "driver 1"]) == first
    assert not list(first.iterdir())
    (tmp_path / "file").write_text("")
    assert CompileCache(root=tmp_path / "file", limit=1).folder(["x"]) is None


def test_the_least_recently_used_blobs_are_removed_first(tmp_path: Path) -> None:
    cache = CompileCache(root=tmp_path, limit=250)
    folder = cache.folder(["x"])
    assert folder is not None
    for age, name in enumerate(("new", "middle", "old", "oldest")):
        (folder / name).write_bytes(b"0" * 100)
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    assert cache.prune() == 200
    assert sorted(file.name for file in folder.iterdir()) == ["middle", "new"]
    assert cache.prune() == 0


def test_a_blob_is_read_only_if_it_is_undamaged(tmp_path: Path) -> None:
    path = tmp_path / "a.blob"
    content = os.urandom(10_000)
    assert write_blob(path, content) == path.stat().st_size == 10_032
    found = read_blob(path)
    assert found is not None
    assert found.tobytes() == content
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", b"x" * 32, whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]):
        path.write_bytes(damaged)
        assert read_blob(path) is None
        assert not path.exists()  # the next start finds none, and compiles
    with pytest.raises(FileNotFoundError):
        read_blob(path)
    write_blob(path, content)
    assert [file.name for file in tmp_path.iterdir()] == ["a.blob"]


@pytest.mark.slow
def test_a_worker_compiles_once_and_goes_on_when_the_disk_is_full(tmp_path: Path) -> None:
    folder, texts, vectors = golden("mean")
    settings = Settings(
        model=(str(folder),), device="npu-sim", fallback=False, store=tmp_path / "store", compile_cache=tmp_path / "cache"
    )

    def check_vectors(settings: Settings) -> None:
        with Engine(settings=settings) as engine:
            np.testing.assert_allclose(engine.embed(texts, normalize=False), vectors, atol=2e-5)

    check_vectors(settings)
    blobs = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert blobs
    before = {file: file.stat().st_mtime_ns for file in blobs}
    check_vectors(settings)
    assert {file: file.stat().st_mtime_ns for file in blobs} == before  # read, not written again
    for file in blobs:
        file.write_bytes(b"damaged")
    check_vectors(settings)
    full = Path("/dev/full") if Path("/dev/full").exists() else tmp_path / "cache" / blobs[0].name
    check_vectors(replace(settings, compile_cache=full))
