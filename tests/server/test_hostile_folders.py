"""Two hundred hostile folders through pull, list, show, load, embed and delete of a live server.

It serves its own model right all the time, and nothing of its memory is in any answer: a secret that its process holds many times,
in its environment and in requests, is looked for in every one of them, also as the bytes of vectors.
"""

import base64
import json
import shutil
import struct
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_hostile_folders_of_models import SPOILED
from test_pickled import listing, tensor
from test_tokenizer_file import MARK, PLAIN, TEXT, replacing, sequence, template

from conftest import GOLDEN, Server, golden

FOLDER, TEXTS, VECTORS = golden("mean")
SECRET = "SECRET-" * 40
HIDDEN = 32
"""Width of the golden model."""


def torch_weights(folder: Path, content: bytes, numbers: bytes, kind: int = zipfile.ZIP_STORED) -> None:
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", kind) as made:
        made.writestr("model/data.pkl", content)
        made.writestr("model/data/0", numbers)


def leak(folder: Path, offset: int) -> None:
    """The model's own weights, but the word table's storage is a tensor of no bytes and 10^12 rows, which passed for a storage.

    Its numbers were those of the server's memory, and token ids chose which.
    """
    tensors = {
        name: tensor_of for name, tensor_of in load_file(folder / "model.safetensors").items() if tensor_of.dtype == np.float32
    }
    (folder / "model.safetensors").unlink()
    entries: list[bytes] = []
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as made:
        for key, (name, values) in enumerate(tensors.items()):
            made.writestr(f"model/data/{key}", values.tobytes())
            strides = tuple(stride // 4 for stride in values.strides)
            entry = tensor(name, values.shape, strides, key=key)
            if name == TABLE:
                inner = tensor(name, (10**12, 0), (1, 1), key=key)[5 + len(name) :]
                entry = tensor(name, values.shape, strides, offset, storage=inner)
            entries.append(entry)
        made.writestr("model/data.pkl", listing(*entries))


TABLE = "embeddings.word_embeddings.weight"
TORCH = {
    "no bytes and a huge size": listing(tensor(TABLE, (10**12, 0), (1, 1))),
    "a stride of 10^8": listing(tensor(TABLE, (64, HIDDEN), (10**8, 1))),
    "more rows than there are": listing(tensor(TABLE, (10**6, HIDDEN), (HIDDEN, 1))),
    "an offset beyond its storage": listing(tensor(TABLE, (64, HIDDEN), (HIDDEN, 1), 10**6)),
    "a negative offset": listing(tensor(TABLE, (64, HIDDEN), (HIDDEN, 1), -(10**6))),
    "a memo of 2^31": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a thousand tensors on one storage": listing(*(tensor(f"t{number}", (4000,), (1,)) for number in range(1000))),
    "no tensors": listing(),
    "a name deeper than any recursion": b"\x80\x04X\x05\x00\x00\x00torch)" + b"\x85" * 3_000_000 + b"\x93.",
    "a name that is endless when it is shown": b"\x80\x04)" + b"2\x86" * 60 + b"X\x01\x00\x00\x00a\x93.",
    "code": b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00truetR.",
}
TOKENIZERS = {
    "five times a hundred": {"normalizer": sequence(*[replacing("a" * 100)] * 5)},
    "an expression that inserts": {"normalizer": replacing("b" * 100, None)},
    "a template of 4,000": {"post_processor": template([*[MARK] * 80, TEXT], [2] * 50)},
    "a template that repeats": {"post_processor": template([TEXT] * 1000, [2])},
    "words without limit": {"model": {**PLAIN["model"], "max_input_chars_per_word": 10**9}},
    "no model": {"model": None},
    "ids up to 2^32": {"model": {**PLAIN["model"], "vocab": {**PLAIN["model"]["vocab"], "zzz": 2**32 - 1}}},
    "an id without a row": {"model": {**PLAIN["model"], "vocab": {**PLAIN["model"]["vocab"], "secret": 10_000}}},
    "a padding of 10^9": {"padding": {**PLAIN["padding"], "strategy": {"Fixed": 10**9}}},
    "a truncation of 0": {"truncation": {**PLAIN["truncation"], "max_length": 0}},
}


def write_folders(root: Path) -> list[str]:
    """Write every hostile folder below ``root``; returns their names."""
    makers = {f"json-{number}": spoil for number, spoil in enumerate(SPOILED.values())}
    for number, content in enumerate(TORCH.values()):
        makers[f"torch-{number}"] = lambda folder, content=content: torch_weights(folder, content, bytes(64 * 4 * HIDDEN))
    makers["torch-deflated"] = lambda folder: torch_weights(folder, listing(), bytes(10**6), zipfile.ZIP_DEFLATED)
    for number, parts in enumerate(TOKENIZERS.values()):
        content = json.dumps({**PLAIN, **parts})
        makers[f"tokenizer-{number}"] = lambda folder, content=content: (folder / "tokenizer.json").write_text(content)
    for offset in (0, 1000, 100_000, 10_000_000):
        makers[f"leak-{offset}"] = lambda folder, offset=offset: leak(folder, offset)
    makers["link"] = lambda folder: (folder / "tokenizer_config.json").symlink_to("/etc/passwd")
    for cut in (0, 7, 8, 100, 5000):
        makers[f"cut-{cut}"] = lambda folder, cut=cut: (folder / "model.safetensors").write_bytes(
            (GOLDEN / "mean" / "model.safetensors").read_bytes()[:cut]
        )
    for number, entry in enumerate(({"shape": [10**12, 0]}, {"shape": [-1]}, {"dtype": "F99"}, {"data_offsets": [0, 10**9]})):
        header = json.dumps({TABLE: {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **entry}}).encode()
        content = struct.pack("<Q", len(header)) + header + bytes(16)
        makers[f"header-{number}"] = lambda folder, content=content: (folder / "model.safetensors").write_bytes(content)
    for name, make in makers.items():
        shutil.copytree(FOLDER, root / "evil" / name, ignore=shutil.ignore_patterns("onnx", "vectors.npy", "texts.json"))
        make(root / "evil" / name)
    return [f"evil/{name}" for name in makers]


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    root = tmp_path_factory.mktemp("mirror")
    return root, write_folders(root)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, mirror: tuple[Path, list[str]]) -> Iterator[Server]:
    store = tmp_path_factory.mktemp("store") / "store"
    flags = ["--model", str(FOLDER), "--device", "cpu", "--store", str(store), "--mirrors", str(mirror[0])]
    running = Server(*flags, "--allow-pull", "--models-mb", "50", A_NOTE=SECRET).wait_ready()
    yield running
    assert running.stop() == 0


def holds_secret(content: bytes) -> bool:
    """Whether an answer contains the secret, as text, or as the numbers that its bytes are as float32."""
    patterns = [SECRET[:14].encode(), base64.b64encode(SECRET[:21].encode())[:20]]
    if any(pattern in content for pattern in patterns):
        return True
    text = content.decode("utf-8", "replace")
    numbers = np.frombuffer((SECRET * 2)[:112].encode(), "<f4")  # each alignment of its seven characters
    return any(repr(float(number)) in text for number in numbers)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_hostile_folders_harm_nobody(server: Server, mirror: tuple[Path, list[str]]) -> None:
    _, names = mirror
    assert len(names) >= 200
    done, wrong = threading.Event(), list[str]()
    statuses: dict[str, dict[int, int]] = {}

    def keep_asking() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not done.is_set():
                answer = client.post("/embed", json={"inputs": TEXTS[:4], "normalize": False})
                if answer.status_code != 200 or not np.allclose(answer.json(), VECTORS[:4], atol=2e-5):
                    wrong.append(answer.text[:200])
                client.post("/embed", json={"inputs": [SECRET]})

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            for name in names:
                ids = [[number] for number in (1, 5, 63, 64, 9_999, 10_000)]
                for verb, path, body in (
                    ("POST", "/api/pull", {"model": name, "stream": False}),
                    ("GET", "/v1/models", None),
                    ("GET", "/api/tags", None),
                    ("POST", "/api/show", {"model": name}),
                    ("POST", "/embed", {"model": name, "inputs": ids, "normalize": False}),
                    ("POST", "/v1/embeddings", {"model": name, "input": ["a" * 100, SECRET[:7]]}),
                    ("DELETE", "/api/delete", {"model": name}),
                ):
                    answer = client.request(verb, path, json=body)
                    counts = statuses.setdefault(path, {})
                    counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
                    assert not holds_secret(answer.content), (name, path)
                    assert "Traceback" not in answer.text
                    assert "internal error" not in answer.text, (name, path, answer.text)
                    if path in ("/v1/models", "/api/tags"):
                        assert answer.status_code == 200, (name, answer.text)
    finally:
        done.set()
        asking.join()
    assert wrong == []
    assert server.process.poll() is None
    assert set(statuses["/api/delete"]) <= {200, 404}
    assert {status for counts in statuses.values() for status in counts} <= {200, 400, 404, 422, 424, 500, 502, 503}, statuses
