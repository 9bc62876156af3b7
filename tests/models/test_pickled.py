"""Torch's own files: their tensors are read correctly, and no code in them is run."""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from conftest import GOLDEN
from npu_proxy.errors import ModelError
from npu_proxy.models.pickled import read_pickled


def archive(file: Path, content: bytes, numbers: bytes = b"") -> Path:
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("model/data.pkl", content)
        made.writestr("model/data/0", numbers)
    return file


def test_tensors_are_read_as_torch_wrote_them() -> None:
    found = read_pickled(GOLDEN / "bge_m3" / "colbert_linear.pt")
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in found.items()} == {
        "weight": ((32, 32), np.float32),
        "bias": ((32,), np.float32),
    }
    assert found["weight"].flags.writeable
    assert 0 < np.abs(found["weight"]).max() < 1


def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(mark),)

    with pytest.raises(ModelError, match="which is not part of a tensor"):
        read_pickled(archive(tmp_path / "evil.bin", pickle.dumps({"weight": Evil()})))
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps([1]), pickle.dumps({"a": 1})])
def test_what_is_no_state_dict_is_an_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ModelError):
        read_pickled(archive(tmp_path / "wrong.bin", content))
    (tmp_path / "plain.bin").write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read"):
        read_pickled(tmp_path / "plain.bin")


def asking_for(numbers: int, stride: int) -> bytes:
    """A tensor written as opcodes, because torch writes no such files: so many numbers of the storage `0`."""
    return (
        b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n(("
        b"X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x00"
        b"K%c\x85K%c\x85\x89}tRs." % (numbers, stride)
    )


@pytest.mark.parametrize(("stride", "message"), [(1, "beyond its storage"), (0, "more numbers than its storage")])
def test_a_tensor_has_no_more_numbers_than_are_there(tmp_path: Path, stride: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_pickled(archive(tmp_path / "wide.bin", asking_for(99, stride), np.zeros(4, np.float32).tobytes()))


def test_packed_numbers_are_refused(tmp_path: Path) -> None:
    """They may unpack to any size, and torch packs none."""
    plain = archive(tmp_path / "plain.bin", asking_for(4, 1), bytes(1_000_000))
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(tmp_path / "packed.bin", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in source.namelist():
            packed.writestr(name, source.read(name))
    assert read_pickled(plain)["a"].shape == (4,)
    with pytest.raises(ModelError, match="compressed"):
        read_pickled(tmp_path / "packed.bin")
