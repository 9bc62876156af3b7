"""Pulling from mirrors that are not what they seem: false sizes, checksums, listings, redirects and links; pinned models."""

import functools
import hashlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from conftest import GOLDEN
from npu_proxy import Settings
from npu_proxy.errors import PullError, SettingsError
from npu_proxy.models import catalog, hub
from npu_proxy.models import pull as pull_module
from npu_proxy.models.catalog import CatalogModel
from npu_proxy.models.layout import read_spec
from npu_proxy.models.pull import model_files, pull
from npu_proxy.models.store import ModelStore
from npu_proxy.server.http.clients import read_keys
from npu_proxy.system import private_folder

COMMIT = "c" * 40


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    shutil.copytree(GOLDEN / "mean", folder, ignore=shutil.ignore_patterns("onnx", "vectors.npy", "texts.json"))
    return folder


class Hub(SimpleHTTPRequestHandler):
    """As much of a hub as a pull needs. The folder's ``lies`` say what is false: by path, fields of the listing or an answer."""

    lies: ClassVar[dict[str, Any]] = {}
    requests: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        folder, path = Path(self.directory), self.path.partition("?")[0]
        self.requests.append((path, self.headers.get("range")))
        status, headers, start = 200, dict[str, str](), 0
        name = path.split(f"{COMMIT}/")[-1]
        if path.startswith("/api/models/org/tiny"):
            siblings = [self._sibling(folder, file) for file in sorted(folder.rglob("*")) if file.is_file()]
            body = self.lies.get("listing") or json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode()
        elif "/resolve/" in path and (folder / name).is_file():
            body = self.lies.get(name, {}).get("body") or (folder / name).read_bytes()
            if location := self.lies.get(name, {}).get("location"):
                status, headers, body = 302, {"Location": location}, b""
            if asked := self.headers.get("range"):
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                status = 206
                headers["Content-Range"] = self.lies.get(name, {}).get("range") or f"bytes {start}-{len(body) - 1}/{len(body)}"
        else:
            status, body = 404, b""
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:])

    def _sibling(self, folder: Path, file: Path) -> dict[str, Any]:
        name, content = file.relative_to(folder).as_posix(), file.read_bytes()
        digest = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        return {"rfilename": name, "size": len(content), "blobId": digest, **self.lies.get(name, {}).get("listing", {})}

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def served(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    from huggingface_hub import constants

    handler = type("ThisHub", (Hub,), {"lies": {}, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(model)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")  # HF_ENDPOINT is read at import
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield handler
    server.shutdown()
    server.server_close()


def pull_it(store: ModelStore, name: str, *mirrors: str, **options: Any) -> list[str]:
    lines: list[str] = []
    pull(store, name, mirrors=mirrors, report=lines.append, **options)
    return lines


# -- the hub -------------------------------------------------------------------------------------------------------------


def test_a_hub_is_pulled_from(tmp_path: Path, model: Path, served: type[Hub]) -> None:
    (model / "pytorch_model.bin").write_bytes(b"a pickle")
    weights = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    served.lies["model.safetensors"] = {"listing": {"lfs": {"sha256": weights}, "blobId": "of the pointer"}}
    store = ModelStore(tmp_path / "store")
    pull_it(store, "org/tiny", "hub")
    (stored,) = store.list()
    assert stored.name == "org/tiny"
    assert not (stored.folder / "pytorch_model.bin").exists()
    assert read_spec(stored.folder).fingerprint == read_spec(model).fingerprint
    assert pull_module.MIRRORS.keys() == {"hub", "pypi"}


def test_an_interrupted_download_continues(tmp_path: Path, served: type[Hub]) -> None:
    store = ModelStore(tmp_path / "store")
    whole = served.lies.setdefault("model.safetensors", {})
    whole["body"] = b"x"  # too short, so that the pull fails after other files were downloaded
    with pytest.raises(PullError, match=r"model.safetensors is not what the hub's listing states \(1 bytes\)"):
        pull_it(store, "org/tiny", "hub")
    del whole["body"]
    folder = next((store.partial("org/tiny") / "hub").iterdir())
    (folder / "model.safetensors.partial").write_bytes((GOLDEN / "mean" / "model.safetensors").read_bytes()[:1000])
    served.requests.clear()
    pull_it(store, "org/tiny", "hub")
    files = {path.split(f"{COMMIT}/")[-1]: asked for path, asked in served.requests[1:]}
    assert files["model.safetensors"] == "bytes=1000-"
    assert "config.json" not in files
    assert store.damaged(store.list()[0]) == []


def test_another_part_than_was_asked_for_is_not_taken(tmp_path: Path, served: type[Hub]) -> None:
    store = ModelStore(tmp_path / "store")
    served.lies["model.safetensors"] = {"body": b"x"}
    with pytest.raises(PullError):
        pull_it(store, "org/tiny", "hub")
    folder = next((store.partial("org/tiny") / "hub").iterdir())
    (folder / "model.safetensors.partial").write_bytes(b"012")
    served.lies["model.safetensors"] = {"range": "bytes 0-9/10"}
    with pytest.raises(PullError, match="another part of a file"):
        pull_it(store, "org/tiny", "hub")


NAMES = ["../a.json", "/a.json", "a//b.json", "a\0.json", "CON.json", "aux/x.json", "a<b.json", "x.json./a.json", "a\nb.json"]


@pytest.mark.parametrize("path", [*NAMES, "b" * 300 + ".json"])
def test_a_path_that_is_no_file_name_everywhere_is_left_out(path: str) -> None:
    assert pull_module.model_files(["config.json", path, "1_Pooling/config.json"]) == ["1_Pooling/config.json", "config.json"]


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({"listing": {"size": 1}}, "has more than the 1 bytes that were stated"),
        ({"listing": {"size": 10**6}}, "is not what the hub's listing states"),
        ({"listing": {"size": 10**12}}, r"has 1000\.0 GB; at most 50 GB are allowed \(`max_pull_gb`\)"),
        ({"listing": {"lfs": {"sha256": "0" * 64}}}, "is not what the hub's listing states"),
        ({"listing": {"blobId": "0" * 40}}, "is not what the hub's listing states"),
        ({"listing": {"size": None}, "body": b"x" * 3_000_000}, "has more than the 2000000 bytes"),
        ({"location": "https://example.com/weights"}, "redirects to example.com, which is not one of its stores"),
        ({"location": "http://127.0.0.1:1/weights"}, r"redirects to 127\.0\.0\.1, which is not"),
        ({"location": "http://169.254.169.254/latest/meta-data"}, r"redirects to 169\.254\.169\.254"),
        ({"location": "file:///etc/passwd"}, "redirects to nowhere"),
        ({"location": "https://huggingface.co.example.com/"}, "which is not one of its stores"),
        ({"location": "http://cdn.hf.co/plain"}, "which is not one of its stores"),
        ({"location": "?again"}, "redirects too often"),
    ],
)
def test_what_a_hub_states_is_held_against_what_it_sends(
    tmp_path: Path, served: type[Hub], monkeypatch: pytest.MonkeyPatch, lie: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(hub, "_LARGEST_PLAIN", 2_000_000)
    served.lies["model.safetensors"] = lie
    store = ModelStore(tmp_path / "store")
    with pytest.raises(PullError, match=message):
        pull_it(store, "org/tiny", "hub")
    assert store.list() == []


OUTSIDE = b'{"sha": "a", "siblings": [{"rfilename": "../x"}]}'


@pytest.mark.parametrize("listing", [b"[]", b"{}", b"[" * 200_000, b'{"sha": 7}', OUTSIDE])
def test_a_listing_that_is_none_is_an_error(tmp_path: Path, served: type[Hub], listing: bytes) -> None:
    served.lies["listing"] = listing
    with pytest.raises(PullError, match="org/tiny` could not be downloaded"):
        pull_it(ModelStore(tmp_path / "store"), "org/tiny", "hub")


def test_a_store_of_the_hub_has_a_public_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(0, 0, 0, "", ("10.0.0.1", 0))])
    with pytest.raises(PullError, match=r"redirects to cdn\.hf\.co"):
        hub._next("https://huggingface.co/a", "https://cdn.hf.co/b")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(0, 0, 0, "", ("93.184.216.34", 0))])
    assert hub._next("https://huggingface.co/a", "https://cdn.hf.co/b") == "https://cdn.hf.co/b"


def test_nine_pulls_of_one_name_are_one_download(tmp_path: Path, served: type[Hub]) -> None:
    store = ModelStore(tmp_path / "store")
    with ThreadPoolExecutor(9) as threads:
        lines = list(threads.map(lambda _: pull_it(store, "org/tiny", "hub"), range(9)))
    assert sum("already in the store" in line for each in lines for line in each) == 8
    paths = [path for path, _ in served.requests]
    assert len(paths) == len(set(paths))


# -- folders -------------------------------------------------------------------------------------------------------------


def test_a_link_does_not_lead_out_of_a_folder(tmp_path: Path, model: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (model / "tokenizer_config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(PullError, match=r"tokenizer_config.json is a link that leads out of the folder"):
        pull_it(ModelStore(tmp_path / "store"), str(model))


def test_the_links_of_the_hubs_cache_lead_to_its_blobs(tmp_path: Path, model: Path) -> None:
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    for file in [path for path in model.rglob("*") if path.is_file()]:
        path = snapshot / file.relative_to(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    pull_it(ModelStore(tmp_path / "store"), str(snapshot))
    assert [stored.name for stored in ModelStore(tmp_path / "store").list()] == [COMMIT]


def test_a_model_larger_than_the_limit_is_not_stored(tmp_path: Path, model: Path) -> None:
    with pytest.raises(PullError, match="max_pull_gb"):
        pull_it(ModelStore(tmp_path / "store"), str(model), most_bytes=10_000)


# -- pinned models -------------------------------------------------------------------------------------------------------


def test_of_a_pinned_model_only_pinned_files_are_taken(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of other weights beside the true files once served those under the pinned name, with a prompt of its own."""
    files = [path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()]
    files.remove("config_sentence_transformers.json")
    pinned = {path: hashlib.sha256((model / path).read_bytes()).hexdigest() for path in files}
    entry = CatalogModel(name="org/tiny", sha256=pinned)
    monkeypatch.setitem(catalog._BY_NAME, "org/tiny", entry)
    true = read_spec(model)
    shutil.copy(model / "model.safetensors", model / "other.safetensors")
    weights = bytearray((model / "other.safetensors").read_bytes())
    weights[-4:] = b"\0\0\x80\x3f"
    (model / "other.safetensors").write_bytes(weights)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "other.safetensors"}}))
    prompts = {"prompts": {"query": "evil: "}, "default_prompt_name": "query"}
    (model / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    store = ModelStore(tmp_path / "store")
    pull_it(store, "org/tiny", str(tmp_path))
    served = read_spec(store.list()[0].folder)
    assert (served.weight_files[0].name, served.default_prompt) == ("model.safetensors", None)
    assert sorted(path.name for path in store.list()[0].folder.rglob("*") if path.is_file() and path.name[0] != ".") == sorted(
        Path(path).name for path in files
    )
    assert true.weight_files[0].read_bytes() == served.weight_files[0].read_bytes()


def test_the_store_is_private_whatever_the_umask(tmp_path: Path, model: Path) -> None:
    before = os.umask(0)
    try:
        pull_it(ModelStore(tmp_path / "a" / "store"), str(model))
    finally:
        os.umask(before)
    for path in [tmp_path / "a", *(tmp_path / "a").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_what_every_user_may_write_to_is_refused(tmp_path: Path, model: Path) -> None:
    for folder in (model, tmp_path / "store"):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
    with pytest.raises(SettingsError, match=r"tiny can be written by every user of this machine; run `chmod o-w"):
        ModelStore(tmp_path / "other").resolve(str(model))
    with pytest.raises(SettingsError, match=r"store can be written by every user"):
        private_folder(tmp_path / "store")
    keys = tmp_path / "keys"
    keys.write_text("secret-key")
    keys.chmod(0o666)
    with pytest.raises(SettingsError, match=r"file .*keys can be written by every user"):
        read_keys(Settings(api_key_file=keys))
    keys.chmod(0o600)
    assert len(read_keys(Settings(api_key_file=keys))) == 1


def test_everything_that_the_reader_reads_is_pulled() -> None:
    files = ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "artifact.metadata", "added_tokens.json"]
    files += [
        "1_LogitScore/config.json",
        "document_0_Transformer/tokenizer.json",
        "query_0_SparseStaticEmbedding/model.safetensors",
    ]
    files += ["router_config.json", "vocab.txt", "merges.txt", "adapter_config.json", "adapter_model.safetensors"]
    assert model_files([*files, "README.md", "image.png"]) == sorted(files)
    exported = ["config.json", "openvino_model.xml", "openvino_model.bin", "tokenizer.json"]
    assert model_files(exported) == sorted(exported)
