"""Torch's own files: their tensors come out right, and nothing that they ask for is run."""

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


def test_tensors_come_out_as_torch_wrote_them() -> None:
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
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(mark),)

    with pytest.raises(ModelError, match="which is no tensor"):
        read_pickled(archive(tmp_path / "evil.bin", pickle.dumps({"weight": Evil()})))
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps([1]), pickle.dumps({"a": 1})])
def test_what_is_no_state_dict_is_an_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ModelError):
        read_pickled(archive(tmp_path / "wrong.bin", content))
    (tmp_path / "plain.bin").write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read"):
        read_pickled(tmp_path / "plain.bin")


def test_memory_is_not_made_of_nothing(tmp_path: Path) -> None:
    """A stride of 0 would make any number of numbers of one, and packed entries unpack to any size."""
    content = (
        b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n(("
        b"X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x00Kc\x85K\x00\x85\x89}tRs."
    )
    with pytest.raises(ModelError, match="more numbers than are stored"):
        read_pickled(archive(tmp_path / "wide.bin", content, np.zeros(4, np.float32).tobytes()))
    plain = archive(tmp_path / "plain.bin", content, bytes(1_000_000))
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(tmp_path / "packed.bin", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in source.namelist():
            packed.writestr(name, source.read(name))
    with pytest.raises(ModelError, match="compressed"):
        read_pickled(tmp_path / "packed.bin")


def test_a_tensor_beyond_its_numbers_is_an_error(tmp_path: Path) -> None:
    """Opcodes by hand, because no torch writes such a file: 99 numbers of a storage that holds 4."""
    content = (
        b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n(("
        b"X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x00Kc\x85K\x01\x85\x89}tRs."
    )
    with pytest.raises(ModelError, match="beyond its numbers"):
        read_pickled(archive(tmp_path / "beyond.bin", content, np.zeros(4, np.float32).tobytes()))
