"""What reads bytes that a stranger may have made. A target takes any bytes, and returns or raises an error of ours."""

from __future__ import annotations

import atexit
import json
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from api_values import served, spec_of
from test_pickled import listing, tensor

from conftest import GOLDEN
from npu_proxy.cache.entry import from_bytes, origins_from_bytes, to_bytes
from npu_proxy.engine.outputs import is_kept_output
from npu_proxy.errors import InputError
from npu_proxy.models.layout import read_spec
from npu_proxy.models.manifest import read_manifest
from npu_proxy.models.store import ModelStore
from npu_proxy.models.tokenizer_file import check_growth
from npu_proxy.models.weights import Tensors
from npu_proxy.server.apis.contract import InferenceRoute, ModelQuery
from npu_proxy.server.http.app import DIALECTS
from npu_proxy.server.http.decoding import check_refused, decode, with_replacements
from npu_proxy.server.http.json_scan import check_values
from npu_proxy.types import TextResult

FOLDER = Path(tempfile.mkdtemp(prefix="npu-proxy-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
"""Where files are written that a reader opens by path."""
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
JSON_FILES = (
    "config.json",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "config_sentence_transformers.json",
    "tokenizer_config.json",
)


def written(name: str, content: bytes) -> Path:
    file = FOLDER / name
    file.write_bytes(content)
    return file


def read_tensors(file: Path) -> None:
    """Find all tensors, and read those of up to a megabyte."""
    tensors = Tensors([file])
    for name in tensors:
        if np.prod(tensors.shape(name), dtype=float) < 250_000:
            assert tensors[name].size <= max(1, file.stat().st_size)


def torch_file(content: bytes) -> None:
    read_tensors(written("fuzzed.bin", content))


def torch_list(content: bytes) -> None:
    """The pickle alone, in an archive that is right."""
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("model/data.pkl", content)
        for number in range(3):
            made.writestr(f"model/data/{number}", bytes(8192))
    read_tensors(written("listed.bin", archive.getvalue()))


def safetensors(content: bytes) -> None:
    read_tensors(written("fuzzed.safetensors", content))


@cache
def model_folder() -> Path:
    folder = FOLDER / "model"
    shutil.copytree(GOLDEN / "mean", folder, ignore=shutil.ignore_patterns("onnx", "vectors.npy", "texts.json"))
    return folder


def json_files(content: bytes) -> None:
    """The first byte chooses which file of a model the others are."""
    name = JSON_FILES[content[0] % len(JSON_FILES)] if content else JSON_FILES[0]
    file = model_folder() / name
    before = file.read_bytes() if file.exists() else None
    try:
        file.write_bytes(content[1:])
        read_spec(model_folder())
    finally:
        if before is None:
            file.unlink()
        else:
            file.write_bytes(before)


def tokenizer_json(content: bytes) -> None:
    check_growth(content)


def cache_entry(content: bytes) -> None:
    entry = from_bytes(content)
    origins_from_bytes(content)
    if entry is not None:
        is_kept_output(spec_of("mean"), entry.vector)


def manifest(content: bytes) -> None:
    folder = FOLDER / "models" / "a"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".manifest.json").write_bytes(content)
    read_manifest(folder)
    store = ModelStore(FOLDER)
    for stored in store.list():
        store.damaged(stored)


@cache
def bodies() -> Sequence[tuple[msgspec.json.Decoder[Any], InferenceRoute[Any, Any] | None]]:
    routes = [route for dialect in DIALECTS for route in dialect.routes if not isinstance(route, ModelQuery)]
    return [
        (msgspec.json.Decoder(route.body, strict=False), route if isinstance(route, InferenceRoute) else None) for route in routes
    ]


def http_body(content: bytes) -> None:
    """The first byte chooses the route whose body the others are."""
    routes = bodies()
    decoder, route = routes[content[0] % len(routes)] if content else routes[0]
    body = content[1:]
    check_values(body, 2048)
    check_refused(body, decoder.type)
    try:
        decoded = decode(decoder, body)
    except InputError:
        decoded = decode(decoder, with_replacements(body)[0])
    if route is not None:
        route.to_requests(decoded, served())


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (torch_file, torch_list, safetensors, json_files, tokenizer_json, cache_entry, manifest, http_body)
}


def _torch_lists() -> Sequence[bytes]:
    with zipfile.ZipFile(GOLDEN / "bge_m3" / "colbert_linear.pt") as archive:
        main = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        stored = archive.read(main)
    small = listing(tensor("a", (4, 5), (5, 1)), tensor("b", (2,), (1,), 3))
    newer = small.replace(b"ctorch._utils\n_rebuild_tensor_v2\n", b"X\x0c\0\0\0torch._utilsX\x12\0\0\0_rebuild_tensor_v2\x93")
    return [stored, small, newer]


def _safetensors() -> Sequence[bytes]:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    return [struct.pack("<Q", len(header)) + header + bytes(24)]


def _json_files() -> Sequence[bytes]:
    files = [(number, GOLDEN / "mean" / file) for number, file in enumerate(JSON_FILES)]
    return [bytes([number]) + (file.read_bytes() if file.exists() else b"{}") for number, file in files]


def _tokenizers() -> Sequence[bytes]:
    parts = json.loads((GOLDEN / "mean" / "tokenizer.json").read_text())
    model = {"type": "WordPiece", "vocab": {}, "max_input_chars_per_word": 100}
    replacing = {"type": "Replace", "pattern": {"Regex": " +"}, "content": "_"}
    normalizer = {"type": "Sequence", "normalizers": [replacing, {"type": "Prepend", "prepend": "_"}]}
    plain = {**parts, "model": model}
    return [json.dumps(made).encode() for made in (plain, {**plain, "normalizer": normalizer})]


def _cache_entries() -> Sequence[bytes]:
    vectors = [np.zeros(shape, np.float32) for shape in ((32,), (4, 2), (0, 2))]
    return [to_bytes(TextResult(vector, 3, truncated=False, device="cpu")) for vector in vectors]


def _manifests() -> Sequence[bytes]:
    files = {"config.json": {"sha256": "0" * 64, "size": 3}}
    return [json.dumps({"name": "a", "source": "hub", "files": files}).encode()]


def _bodies() -> Sequence[bytes]:
    body = b'{"input": ["a", "b"], "inputs": "a", "model": "x", "texts": ["a"], "query": "a", "documents": ["b"]}'
    return [bytes([number]) + body for number in range(len(bodies()))]


_SEEDS: Mapping[str, Callable[[], Sequence[bytes]]] = {
    "torch_file": lambda: [(GOLDEN / "bge_m3" / "sparse_linear.pt").read_bytes()],
    "torch_list": _torch_lists,
    "safetensors": _safetensors,
    "json_files": _json_files,
    "tokenizer_json": _tokenizers,
    "cache_entry": _cache_entries,
    "manifest": _manifests,
    "http_body": _bodies,
}


def seeds(name: str) -> Sequence[bytes]:
    """Inputs for a target that are right, from which a fuzzer starts."""
    return _SEEDS[name]()
