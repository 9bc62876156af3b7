"""Torch's own files: their tensors are read correctly, nothing in them is run, and they cannot reach memory that is not theirs."""

import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from conftest import GOLDEN
from npu_proxy.errors import ModelError
from npu_proxy.models.pickled import find_tensors
from npu_proxy.models.weights import Tensors


def archive(file: Path, content: bytes, numbers: bytes = b"", kind: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(file, "w", kind) as made:
        made.writestr("model/data.pkl", content)
        made.writestr("model/data/0", numbers)
    return file


def integer(number: int) -> bytes:
    """An opcode that pushes a number of any size."""
    size = number.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + number.to_bytes(size, "little", signed=True)


def tensor(
    name: str, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, *, key: int = 0, storage: bytes = b""
) -> bytes:
    """A name and a tensor of float32 numbers, written as opcodes, because torch writes no such files.

    key: the member of the archive that is its storage; storage: opcodes that push something else in its place.
    """
    own = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX"
        + struct.pack("<I", len(str(key)))
        + str(key).encode()
        + b"X\x03\x00\x00\x00cpuK\x04tQ"
    )
    sides = b"".join(b"(" + b"".join(map(integer, side)) + b"t" for side in (size, stride))
    return (
        b"X"
        + struct.pack("<I", len(name))
        + name.encode()
        + b"ctorch._utils\n_rebuild_tensor_v2\n("
        + (storage or own)
        + integer(offset)
        + sides
        + b"\x89}tR"
    )


def listing(*tensors: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(tensors) + b"u."


def test_tensors_are_read_as_torch_wrote_them() -> None:
    found = Tensors([GOLDEN / "bge_m3" / "colbert_linear.pt"])
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in found.items()} == {
        "weight": ((32, 32), np.float32),
        "bias": ((32,), np.float32),
    }
    assert found["weight"].flags.writeable
    assert 0 < np.abs(found["weight"]).max() < 1


def test_a_transposed_tensor_and_one_with_an_offset_are_read_by_their_strides(tmp_path: Path) -> None:
    numbers = np.arange(12, dtype=np.float32)
    content = listing(tensor("turned", (3, 4), (1, 3)), tensor("part", (2, 2), (4, 1), 5), tensor("empty", (0, 4), (4, 1)))
    found = Tensors([archive(tmp_path / "strided.bin", content, numbers.tobytes())])
    assert np.array_equal(found["turned"], numbers.reshape(4, 3).T)
    assert np.array_equal(found["part"], [[5, 6], [9, 10]])
    assert found["empty"].shape == (0, 4)


def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(mark),)

    with pytest.raises(ModelError, match="which is not part of a tensor"):
        find_tensors(archive(tmp_path / "evil.bin", pickle.dumps({"weight": Evil()}, 2)))
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps([1]), pickle.dumps({"a": 1}), pickle.dumps({1: {}}, 2)])
def test_what_is_no_state_dict_is_an_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ModelError):
        find_tensors(archive(tmp_path / "wrong.bin", content))
    (tmp_path / "plain.bin").write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read"):
        find_tensors(tmp_path / "plain.bin")


@pytest.mark.parametrize(
    ("size", "stride", "offset", "message"),
    [
        ((99,), (1,), 0, "beyond its storage"),
        ((99,), (0,), 0, "more numbers than its storage"),
        ((4,), (1,), 1, "beyond its storage"),
        ((10**12, 0), (1, 1), 0, "larger than the file"),  # no bytes, and so within every bound but this
        ((2,), (10**8,), 0, "larger than the file"),
        ((2,), (-1,), 1, "larger than the file, or is no number"),
        ((2,), (1,), -1, "larger than the file, or is no number"),
        ((0,), (1,), 5, "beyond its storage"),
        ((2, 2), (1,), 0, "not described as torch does"),
        ((1,) * 9, (1,) * 9, 0, "not described as torch does"),
    ],
)
def test_a_tensor_has_no_more_numbers_than_are_there(
    tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...], offset: int, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        find_tensors(archive(tmp_path / "wide.bin", listing(tensor("a", size, stride, offset)), bytes(16)))


def test_a_tensor_is_no_storage_of_another_tensor(tmp_path: Path) -> None:
    """A tensor of size (10^12, 0) once served as storage for the next, which then read any of the process's memory."""
    inner = tensor("inner", (4, 0), (1, 1))[10:]
    content = b"\x80\x02}(X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n(" + inner + b"K\x00(K\x04t(K\x01t\x89}tRu."
    with pytest.raises(ModelError, match="not described as torch does"):
        find_tensors(archive(tmp_path / "nested.bin", content, bytes(16)))


def pushed(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04" + pushed("torch") + b")" + b"\x85" * 1_000_000 + b"\x93.",  # deeper than any recursion
        b"\x80\x04" + pushed("torch") + b")" + b"2\x86" * 60 + b"\x93.",  # small, and endless when it is hashed or shown
        b"\x80\x04)" + b"2\x86" * 60 + pushed("FloatStorage") + b"\x93.",
        b"\x80\x02c" + b"a" * 1_000_000 + b"\nb\n.",
        b"\x80\x02}()" + b"2\x86" * 60 + b"K\x01u.",
        b"\x80\x02(" + b")" + b"2\x86" * 60 + b"tQ.",
    ],
)
def test_a_name_is_a_text_and_a_message_is_short(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ModelError) as caught:
        find_tensors(archive(tmp_path / "names.bin", content))
    assert len(str(caught.value)) < 500


def test_a_tensor_without_dimensions_has_none(tmp_path: Path) -> None:
    found = Tensors([archive(tmp_path / "scalar.bin", listing(tensor("a", (), (), 1)), np.arange(3, dtype=np.float32).tobytes())])
    assert found["a"].shape == ()
    assert found["a"] == 1


def test_packed_members_are_refused(tmp_path: Path) -> None:
    """They may unpack to any size, and torch packs none."""
    content = listing(tensor("a", (4,), (1,)))
    assert find_tensors(archive(tmp_path / "plain.bin", content, bytes(1_000_000)))["a"].shape == (4,)
    with pytest.raises(ModelError, match=r"data.pkl is compressed"):
        find_tensors(archive(tmp_path / "packed.bin", content + bytes(1000), bytes(100), zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(tmp_path / "half.bin", "w") as made:
        made.writestr("model/data.pkl", content)
        made.writestr("model/data/0", bytes(10_000), zipfile.ZIP_DEFLATED)
    with pytest.raises(ModelError, match=r"data/0 is compressed"):
        find_tensors(tmp_path / "half.bin")


def test_what_a_file_may_make_of_itself_is_bounded(tmp_path: Path) -> None:
    """A memo index of 2^31 once took 1 GB, many tensors on one storage a thousand times the file, an endless list its square."""
    memo = archive(tmp_path / "memo.bin", b"\x80\x02}r\xff\xff\xff\x7f.")
    laughs = archive(tmp_path / "laughs.bin", b"\x80\x02)" + b"2\x86" * 1000 + b"R.")
    nested = archive(tmp_path / "nested.bin", b"\x80\x02)" + b"\x85" * 500_000 + b"Q.")
    shared = listing(*(tensor(f"t{number:04}", (250_000,), (1,)) for number in range(1000)))
    many = archive(tmp_path / "many.bin", shared, bytes(1_000_000))
    long = archive(tmp_path / "long.bin", b"\x80\x02" + b"(" * (5 << 20) + b".")
    tracemalloc.start()
    try:
        assert find_tensors(memo) == {}
        for file in (laughs, nested):
            with pytest.raises(ModelError):
                find_tensors(file)
        with pytest.raises(ModelError, match="share storages so often"):
            find_tensors(many)
        with pytest.raises(ModelError, match="at most"):
            find_tensors(long)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000_000


def test_an_archive_with_a_huge_directory_is_refused(tmp_path: Path) -> None:
    file = archive(tmp_path / "wide.bin", listing())
    content = bytearray(file.read_bytes())
    content[-10:-6] = struct.pack("<I", 100_000_000)
    file.write_bytes(content)
    with pytest.raises(ModelError, match="its directory has"):
        find_tensors(file)


def test_a_file_that_becomes_shorter_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    file = archive(tmp_path / "cut.bin", listing(tensor("a", (250_000,), (1,))), bytes(1_000_000))
    tensors = Tensors([file])
    os.truncate(file, 1000)
    with pytest.raises(ModelError, match="was changed while"):
        tensors["a"]
