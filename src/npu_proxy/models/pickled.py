"""Find the tensors in torch's .bin and .pt files, without torch and without unpickling anything.

Such a file is a zip archive: ``data.pkl`` lists the tensors, and the other members contain their numbers. The list is read by an
interpreter of the few pickle opcodes that torch writes, which makes plain values only, so that nothing in the file is executed or
allocated beyond its own size. Source: torch.serialization, torch._weights_only_unpickler.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npu_proxy.errors import ModelError
from npu_proxy.models.stored_tensor import MOST_DIMENSIONS, StoredTensor, width_of

_TYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "CharStorage": "I8",
    "ByteStorage": "U8",
}
_LARGEST_LIST = 4 << 20
"""Bytes of ``data.pkl``, of which a tensor takes about 200."""
_LARGEST_DIRECTORY = 16 << 20
"""Bytes of the zip archive's directory."""
_SHARING = 3
"""Tensors may share storages, such as tied embeddings, but together have at most this many times the bytes of the file."""
_END_OF_DIRECTORY = b"PK\x05\x06"
_END_SIZE, _LONGEST_COMMENT = 22, 0xFFFF
_LOCATOR, _LOCATOR_SIZE = b"PK\x06\x07", 20
_ZIP64, _ZIP64_SIZE = b"PK\x06\x06", 56
_LOCAL_HEADER, _LOCAL_HEADER_SIZE = b"PK\x03\x04", 30


class _InvalidError(Exception):
    """The file is not what torch writes; the message says why."""


@dataclass(frozen=True, slots=True)
class _Name:
    """A name that the pickle refers to, such as torch.FloatStorage."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """Bytes of the file with a type. count: number of elements."""

    start: int
    kind: str
    count: int


_TENSOR, _PARAMETER, _DICT = (
    _Name("torch._utils", "_rebuild_tensor_v2"),
    _Name("torch._utils", "_rebuild_parameter"),
    _Name("collections", "OrderedDict"),
)


def find_tensors(file: Path) -> Mapping[str, StoredTensor]:
    """The tensors of a state dict by name. Raises ModelError."""
    try:
        file_size = file.stat().st_size
        with file.open("rb") as opened:
            _check_directory(opened, file_size)
            with zipfile.ZipFile(opened) as archive:
                (main,) = (info for info in archive.infolist() if info.filename.rpartition("/")[2] == "data.pkl")
                _check_stored(main, _LARGEST_LIST)
                reader = _Reader(opened, archive, main.filename.removesuffix("data.pkl"), file, file_size)
                return reader.read(archive.read(main))
    except _InvalidError as error:
        raise ModelError(f"{file.name} cannot be read as tensors: {error}; model.safetensors is safer and faster") from error
    except Exception as error:  # zipfile and pickletools raise many kinds of errors for malformed files
        raise ModelError(f"{file.name} cannot be read as tensors: it is not a file that torch wrote ({error})") from error


def _check_directory(opened: io.BufferedReader, file_size: int) -> None:
    """Raise _InvalidError if the archive's directory, which zipfile reads at once, is large."""
    opened.seek(max(0, file_size - _END_SIZE - _LONGEST_COMMENT))
    tail = opened.read()
    at = tail.rfind(_END_OF_DIRECTORY)
    if at < 0 or len(tail) - at < _END_SIZE:
        raise _InvalidError(
            "it is not a zip archive, perhaps because torch before 1.6 wrote it; convert it, with torch and safetensors installed:"
            ' python -c "import sys, torch, safetensors.torch as s; t = torch.load(sys.argv[1], weights_only=True);'
            ' s.save_file({k: v.clone() for k, v in t.items()}, sys.argv[2])" pytorch_model.bin model.safetensors'
        )
    size = int.from_bytes(tail[at + 12 : at + 16], "little")
    if size == 0xFFFFFFFF or tail[max(0, at - _LOCATOR_SIZE) : at].startswith(_LOCATOR):
        size = _zip64_directory_size(opened, file_size - len(tail) + at - _LOCATOR_SIZE)
    if size > _LARGEST_DIRECTORY:
        raise _InvalidError(f"its directory has {size} bytes; at most {_LARGEST_DIRECTORY} are allowed")


def _zip64_directory_size(opened: io.BufferedReader, locator: int) -> int:
    """The size of a large archive's directory. Its record is where the locator says, or for some readers, before the locator."""
    opened.seek(max(0, locator))
    stated = int.from_bytes(opened.read(_LOCATOR_SIZE)[8:16], "little")
    sizes = [0]
    for start in (locator - _ZIP64_SIZE, stated):
        if 0 <= start <= locator:
            opened.seek(start)
            record = opened.read(_ZIP64_SIZE)
            sizes.append(int.from_bytes(record[40:48], "little") if record.startswith(_ZIP64) else 0)
    return max(sizes)


def _check_stored(info: zipfile.ZipInfo, limit: int | None = None) -> None:
    """Raise _InvalidError for a compressed member, which can expand to any size; torch never compresses."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise _InvalidError(f"{info.filename[:80]} is compressed")
    if limit is not None and info.file_size > limit:
        raise _InvalidError(f"{info.filename[:80]} has {info.file_size} bytes; at most {limit} are allowed")


class _Reader:
    """An interpreter of the list's opcodes: its stack and memo hold plain values, names, storages and tensors."""

    def __init__(self, opened: io.BufferedReader, archive: zipfile.ZipFile, folder: str, file: Path, file_size: int) -> None:
        self._opened = opened
        self._archive = archive
        self._folder = folder
        self._file = file
        self._file_size = file_size
        self._budget = _SHARING * file_size
        self._storages: dict[tuple[str, str], _Storage] = {}
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def read(self, content: bytes) -> Mapping[str, StoredTensor]:
        """Run the opcodes and return the tensors of the dictionary that they make."""
        for opcode, argument, _ in pickletools.genops(content):
            run = _OPCODES.get(opcode.name)
            if run is None:
                raise _InvalidError(f"the pickle contains the opcode {opcode.name}, which no list of tensors needs")
            run(self, argument)
        (result,) = self._stack
        if not isinstance(result, dict):
            raise _InvalidError("expected a dictionary of tensors")
        tensors: dict[str, StoredTensor] = {}
        for name, value in result.items():  # pyright: ignore[reportUnknownVariableType]
            if not isinstance(name, str) or not isinstance(value, StoredTensor):
                raise _InvalidError("expected a dictionary of tensors")
            tensors[name] = value
        return tensors

    # -- opcodes -------------------------------------------------------------------------------------------------

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def mark(self, _: Any) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def put(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def get(self, index: int) -> None:
        self.push(self._memo[index])

    def name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.push(_known(_Name(module, name)))

    def stack_name(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise _InvalidError("a name is not a text")
        self.push(_known(_Name(module, name)))

    def tuple_of(self, count: int) -> None:
        items = self._stack[-count:]
        del self._stack[-count:]
        self.push(tuple(items))

    def set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str) or not isinstance(target, dict):
                raise _InvalidError("a dictionary has a key that is not a text")
            target[key] = value

    def set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self.set_items([key, value])

    def build(self, _: Any) -> None:
        """Drop an object's state; a state dict carries the versions of its modules as ``_metadata``."""
        self._stack.pop()

    def reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if function == _TENSOR:
            self.push(self._tensor(*arguments))
        elif function == _PARAMETER and isinstance(arguments[0], StoredTensor):
            self.push(arguments[0])
        elif function == _DICT and not arguments:
            self.push({})
        else:
            raise _InvalidError("the pickle calls a function that makes no tensor")

    def storage(self, _: Any) -> None:
        """Find the bytes of a storage: ("storage", type, key, device, number of elements)."""
        kind, storage_type, key, *_ = self._stack.pop()
        kind_name = _TYPES.get(storage_type.name) if isinstance(storage_type, _Name) else None
        if kind != "storage" or kind_name is None or not isinstance(key, str):
            raise _InvalidError("it contains a storage of unknown type")
        if (key, kind_name) not in self._storages:
            self._storages[key, kind_name] = self._find(key, kind_name)
        self.push(self._storages[key, kind_name])

    def _find(self, key: str, kind: str) -> _Storage:
        info = self._archive.getinfo(f"{self._folder}data/{key}")
        _check_stored(info)
        self._opened.seek(info.header_offset)
        header = self._opened.read(_LOCAL_HEADER_SIZE)
        if len(header) < _LOCAL_HEADER_SIZE or not header.startswith(_LOCAL_HEADER):
            raise _InvalidError(f"{info.filename[:80]} is not where the archive's directory says")
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = info.header_offset + _LOCAL_HEADER_SIZE + names
        if start + info.file_size > self._file_size:
            raise _InvalidError(f"{info.filename[:80]} extends beyond the file")
        return _Storage(start, kind, info.file_size // width_of(kind))

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> StoredTensor:
        numbers = (offset, *size, *stride)
        if not isinstance(storage, _Storage) or len(size) != len(stride) or len(size) > MOST_DIMENSIONS:
            raise _InvalidError("a tensor is not described as torch does")
        if not all(type(number) is int and 0 <= number <= self._file_size for number in numbers):
            raise _InvalidError("a tensor has a size, stride or offset that is larger than the file, or is no number")
        tensor = StoredTensor(
            file=self._file,
            file_size=self._file_size,
            start=storage.start + offset * width_of(storage.kind),
            kind=storage.kind,
            shape=size,
            strides=stride,
        )
        if offset + tensor.count > storage.count:
            raise _InvalidError("a tensor extends beyond its storage")
        if tensor.size > storage.count:
            raise _InvalidError("a tensor has more numbers than its storage")
        self._budget -= tensor.size * width_of(storage.kind)
        if self._budget < 0:
            raise _InvalidError(f"its tensors share storages so often that they have over {_SHARING} times the bytes of the file")
        return tensor


def _known(name: _Name) -> _Name:
    if name in (_TENSOR, _PARAMETER, _DICT) or (name.module == "torch" and name.name in _TYPES):
        return name
    raise _InvalidError(f"it refers to {name.module[:80]}.{name.name[:80]}, which is not part of a tensor")


_OPCODES: Mapping[str, Callable[[_Reader, Any], None]] = {
    "PROTO": lambda _, __: None,
    "FRAME": lambda _, __: None,
    "STOP": lambda _, __: None,
    "MARK": _Reader.mark,
    "EMPTY_DICT": lambda reader, _: reader.push({}),
    "EMPTY_TUPLE": lambda reader, _: reader.push(()),
    "NONE": lambda reader, _: reader.push(None),
    "NEWTRUE": lambda reader, _: reader.push(True),
    "NEWFALSE": lambda reader, _: reader.push(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"), _Reader.push),
    "TUPLE": lambda reader, _: reader.push(tuple(reader.since_mark())),
    "TUPLE1": lambda reader, _: reader.tuple_of(1),
    "TUPLE2": lambda reader, _: reader.tuple_of(2),
    "TUPLE3": lambda reader, _: reader.tuple_of(3),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _Reader.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Reader.get),
    "GLOBAL": _Reader.name,
    "STACK_GLOBAL": _Reader.stack_name,
    "SETITEM": _Reader.set_item,
    "SETITEMS": lambda reader, _: reader.set_items(reader.since_mark()),
    "BINPERSID": _Reader.storage,
    "REDUCE": _Reader.reduce,
    "BUILD": _Reader.build,
}
"""The opcodes of a list of tensors: what torch writes (protocol 2), and what pickle's later protocols use for the same."""
