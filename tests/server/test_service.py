"""What surrounds the dialects: hosts, prefix, CORS, logs, traces, the Grafana board, and the forms of Infinity, vLLM and others."""

import asyncio
import base64
import functools
import json
import logging
import re
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import GOLDEN, app_of, golden, smallest_cosine
from npu_proxy import DeviceError, Engine, Settings
from npu_proxy.cache.tier import TierError
from npu_proxy.devices.fake import FakeDevice
from npu_proxy.devices.fallback import Fallback
from npu_proxy.engine.components import EngineComponents
from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.models.catalog import find
from npu_proxy.models.cl100k import FILE, NAME, Cl100k
from npu_proxy.models.layout import read_spec
from npu_proxy.models.pull import pull
from npu_proxy.models.store import ModelStore
from npu_proxy.server.apis.common import header_text
from npu_proxy.server.apis.ollama import EmbedBody, keep_alive
from npu_proxy.server.http import app as app_module
from npu_proxy.server.http.hosts import allowed_hosts
from npu_proxy.server.ops import logs
from npu_proxy.server.ops.tracing import Tracer, open_tracer

FOLDER, TEXTS, VECTORS = golden("mean")
UNIT = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
BOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "npu-proxy.json"


@asynccontextmanager
async def client(base: str = "http://localhost", **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    chosen = Settings(**{"model": str(FOLDER), "device": "cpu", "load_on_demand": False, **settings})
    engine = Engine(settings=chosen).start()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app_of(engine, chosen)), base_url=base) as made:
        yield made
    await asyncio.to_thread(engine.stop)


def call(path: str, body: object = None, method: str = "POST", headers: dict | None = None, **settings: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        async with client(**settings) as http:
            return await http.request(method, path, json=body, headers=headers)

    return asyncio.run(run())


# -- the door --------------------------------------------------------------------------------------------------------


MACHINE = socket.gethostname()


@pytest.mark.parametrize(
    "host",
    [
        "",
        "localhost",
        "localhost:8080",
        "LOCALHOST",
        "localhost.",
        "host.docker.internal:8080",
        "a.localhost:1",
        "127.0.0.1:1",
        "127.8.9.1",
        "0.0.0.0:8080",
        "10.0.0.7",
        "172.17.0.1:8080",
        "192.168.1.5:8080",
        "[::1]",
        "[::1]:80",
        "[::]:80",
        "[fd00::1]",
        MACHINE,
        f"{MACHINE}:8080",
        MACHINE.upper(),
        f"{MACHINE.partition('.')[0]}.local:8080",
    ],
)
def test_names_that_no_web_page_can_own_are_admitted(host: str) -> None:
    assert allowed_hosts(Settings()).admits(host)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil.local",
        "internal",
        "evilinternal",
        "8.8.8.8",
        "[2606:4700::1]",
        "localhost:evil",
        "a@localhost",
        ":8080",
        ".",
        "::1",
        "[::1",
        "[127.0.0.1]",
        "127.1",
        "2130706433",
        "localhost,evil.example",
        "127.0.0.1 evil.example",
        "localhost\x00",
    ],
)
def test_other_names_are_not(host: str) -> None:
    assert not allowed_hosts(Settings()).admits(host)


def test_hosts_by_setting_and_on_open_addresses() -> None:
    assert allowed_hosts(Settings(host="0.0.0.0", insecure=True)).any
    named = allowed_hosts(Settings(allowed_hosts=("api.example.org", "*.lan")))
    admitted = [named.admits(host) for host in ("api.example.org:443", "box.lan", "lan", "localhost", "", "127.0.0.1")]
    assert admitted == [True, True, False, False, False, False]


def test_a_foreign_host_is_refused_before_anything_but_health() -> None:
    for path in ("/v1/embeddings", "/metrics", "/v1/models", "/"):
        assert call(path, method="GET", headers={"host": "evil.example"}).status_code == 421
    for path in ("/health", "/health/ready", "/ping/", "/npu/health"):
        prefix = "npu" if path.startswith("/npu") else ""
        assert call(path, method="GET", headers={"host": "evil.example"}, url_prefix=prefix).status_code == 200
    assert call("/v1/models", method="GET", headers={"host": "evil.example"}, allowed_hosts=("*",)).status_code == 200


def test_a_prefix_is_taken_off() -> None:
    assert call("/npu/v1/embeddings", {"input": "a"}, url_prefix="/npu/").status_code == 200
    assert call("/npu", method="GET", url_prefix="npu").text == "Ollama is running"
    for path in ("/v1/embeddings", "/npux/v1/embeddings"):
        assert call(path, {"input": "a"}, url_prefix="/npu").status_code == 404


OWN_PAGES = [
    "http://localhost:3000",
    "https://localhost",
    "http://127.0.0.1:5173",
    "http://0.0.0.0:80",
    "http://[::1]:9",
    "http://a.localhost",
]
APPLICATIONS = ["app://obsidian.md", "tauri://localhost", "vscode-webview://x", "vscode-file://x", "file://"]
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}


@pytest.mark.parametrize("origin", OWN_PAGES + APPLICATIONS)
@pytest.mark.parametrize("exposed", [False, True])
def test_pages_of_this_machine_may_read_answers(origin: str, exposed: bool) -> None:
    settings: dict[str, Any] = {"host": "0.0.0.0", "insecure": True} if exposed else {}
    answer = call("/v1/embeddings", {"input": "a"}, headers={"origin": origin}, **settings)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, origin)
    assert answer.headers["access-control-expose-headers"] == "*"
    asked = {"origin": origin, **PREFLIGHT, "access-control-request-private-network": "true"}
    answer = call("/v1/embeddings", method="OPTIONS", headers=asked, **settings)
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == origin
    assert answer.headers["access-control-allow-headers"] == "authorization, content-type"
    assert answer.headers["access-control-allow-private-network"] == "true"


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "http://localhost.evil.example",
        "http://192.168.1.5",
        "http://host.docker.internal",
        "http://evil.local",
        "null",
        "http://127.0.0.1.evil.example",
        "http://",
    ],
)
def test_other_pages_are_refused_unless_they_are_named(origin: str) -> None:
    assert call("/v1/embeddings", {"input": "a"}, headers={"origin": origin}).status_code == 403  # it could act without reading
    assert call("/v1/embeddings", method="OPTIONS", headers={"origin": origin, **PREFLIGHT}).status_code == 403
    for named in ((origin,), ("*",)):
        answer = call("/v1/embeddings", {"input": "a"}, headers={"origin": origin}, cors_allow_origin=named)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*" if named == ("*",) else origin)


def test_named_pages_may_be_patterns_and_need_the_key() -> None:
    origin = {"origin": "https://app.example.org"}
    allowed: dict[str, Any] = {"cors_allow_origin": ("https://*.example.org", "chrome-extension://*"), "api_key": ("secret",)}
    assert call("/v1/embeddings", method="OPTIONS", headers={**origin, **PREFLIGHT}, **allowed).status_code == 204
    assert call("/v1/embeddings", {"input": "a"}, headers=origin, **allowed).status_code == 401
    answer = call("/v1/embeddings", {"input": "a"}, headers={**origin, "authorization": "Bearer secret"}, **allowed)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://app.example.org")
    assert call("/v1/models", method="GET", headers={"origin": "https://example.org"}, **allowed).status_code == 403
    extension = {"origin": "chrome-extension://abc"}
    assert call("/v1/models", method="GET", headers=extension).status_code == 200
    assert "access-control-allow-origin" not in call("/v1/models", method="GET", headers=extension).headers
    assert call("/v1/models", method="OPTIONS", headers={**extension, **PREFLIGHT}, **allowed).status_code == 204


# -- log and trace ---------------------------------------------------------------------------------------------------


def test_json_lines_have_ids_and_counts_and_never_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger().handlers[:], logging.getLogger().level
    try:
        logs.configure(Settings(log_format="json", log_level="debug", access_log=True))
        headers = {"x-request-id": "mine"}
        assert call("/v1/embeddings?secret=1", {"input": ["secret words", "secret"]}, headers=headers).status_code == 200
        call("/v1/embeddings", {"input": {"secret": "secret"}})
        call("/v1/embeddings", {"input": "a", "model": "secret\nmodel"}, headers={"x-request-id": "a\tb"})
    finally:
        logging.getLogger().handlers[:], level = before
        logging.getLogger().setLevel(level)
        logs._access.setLevel(logging.CRITICAL)
    written = capsys.readouterr().err
    lines = [json.loads(line) for line in written.splitlines()]
    assert "secret" not in written
    ours = [line for line in lines if line["logger"] == "npu_proxy.access"]
    assert [line["status"] for line in ours] == [200, 400, 404]
    assert (ours[0]["request_id"], ours[0]["texts"], ours[0]["cached"], ours[0]["device"]) == ("mine", 2, 0, "cpu")
    assert ours[0]["tokens"] > 2
    assert ours[1]["error"] == "invalid"


def test_log_lines_are_one_line() -> None:
    assert header_text("a\r\nb\x00é") == "a??b??"


def test_a_span_per_stage_below_the_caller_s_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(app_module, "open_tracer", lambda _settings: Tracer(provider))

    async def run() -> None:
        chosen = Settings(model=(str(FOLDER),), device="cpu")
        engine = Engine(settings=chosen).start()
        app = app_of(engine, chosen)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            caller = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
            await http.post("/v1/embeddings", json={"input": TEXTS}, headers=caller)
            await http.post("/v1/embeddings", json={"input": 5})
        await asyncio.to_thread(engine.stop)

    asyncio.run(run())
    spans: list[Any] = [*exporter.get_finished_spans()]  # the types would allow for spans without times and parents
    *stages, request, failed = spans
    assert [span.name for span in stages] == ["tokenize", "queue", "infer", "finish"]
    assert request.name == "POST /v1/embeddings"
    assert f"{request.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{request.parent.span_id:016x}" == "b7ad6b7169203331"
    assert all(span.parent.span_id == request.context.span_id for span in stages)
    assert request.start_time <= stages[0].start_time <= stages[-1].end_time <= request.end_time + 1000
    assert request.attributes["npu_proxy.texts"] == len(TEXTS)
    assert failed.attributes["error.type"] == "invalid"
    assert not any("cat" in str(value) for span in (*stages, request, failed) for value in span.attributes.values())


def test_without_an_endpoint_nothing_is_traced() -> None:
    assert open_tracer(Settings()) is None
    tracer = open_tracer(Settings(otlp_endpoint="http://127.0.0.1:9"))
    assert tracer is not None
    tracer.close()


# -- metrics ---------------------------------------------------------------------------------------------------------


def exported() -> set[str]:
    async def run() -> str:
        async with client() as http:
            await http.post("/v1/embeddings", json={"input": TEXTS * 2})
            await http.post("/v1/embeddings", json={"input": "sea " * 90})
            await http.post("/v1/embeddings", json={"input": 5})
            return (await http.get("/metrics")).text

    return {line.partition("{")[0].partition(" ")[0] for line in asyncio.run(run()).splitlines() if not line.startswith("#")}


def test_every_metric_of_the_board_is_exported_and_every_panel_asks_for_one() -> None:
    board, names = json.loads(BOARD.read_text()), exported()
    families = {re.sub(r"_(total|bucket|sum|count|created)$", "", name) for name in names}
    # Counters that have no sample before the first device falls back.
    names |= {"npu_proxy_fallback_texts_total"}
    asked: set[str] = set()
    for panel in board["panels"]:
        found = {name for target in panel.get("targets", ()) for name in re.findall(r"npu_proxy_\w+", target["expr"])}
        assert found or panel["type"] == "row", panel["title"]
        asked |= found
    assert asked <= names, sorted(asked - names)
    for meaning in ("request_count", "request_success", "request_failure", "request_duration", "request_tokenization_duration"):
        assert f"npu_proxy_{meaning}" in families
    for meaning in (
        "request_queue_duration",
        "request_inference_duration",
        "request_input_length",
        "batch_next_size",
        "queue_size",
    ):
        assert f"npu_proxy_{meaning}" in families
    assert "npu_proxy_batch_next_tokens" in families


def test_histograms_add_up() -> None:
    async def run() -> str:
        async with client() as http:
            await http.post("/v1/embeddings", json={"input": ["a", "sea " * 10, "sea " * 90]})
            return (await http.get("/metrics")).text

    text = asyncio.run(run())
    lengths = dict(re.findall(r'npu_proxy_request_input_length_bucket\{le="([^"]+)"\} (\S+)', text))
    assert (lengths["8.0"], lengths["16.0"], lengths["64.0"], lengths["+Inf"]) == ("1.0", "2.0", "3.0", "3.0")
    assert "npu_proxy_request_input_length_sum 63.0" in text


# -- further forms ---------------------------------------------------------------------------------------------------


def test_jina_s_fields_on_openai_s_route() -> None:
    body = {"input": ["the cat"], "task": "retrieval.query", "embedding_type": "ubinary", "normalized": True, "truncate": True}
    bits = call("/v1/embeddings", body).json()["data"][0]["embedding"]
    prompted = call("/v1/embeddings", {"input": ["the cat"], "input_type": "query"}).json()["data"][0]["embedding"]
    assert bits == np.packbits(np.array(prompted) >= 0).tolist()
    assert call("/v1/embeddings", {"input": "sea " * 90, "truncate": False}).status_code == 400


@pytest.mark.parametrize("names", [("text_1", "text_2"), ("queries", "documents")])
def test_score_is_the_cosine_of_one_with_many_or_of_pairs(names: tuple[str, str]) -> None:
    left, right = names
    scores = call("/score", {left: TEXTS[0], right: TEXTS[1:4]}).json()["data"]
    np.testing.assert_allclose([row["score"] for row in scores], UNIT[1:4] @ UNIT[0], atol=1e-5)
    paired = call("/v1/score", {left: TEXTS[:2], right: TEXTS[2:4]}).json()["data"]
    np.testing.assert_allclose([row["score"] for row in paired], (UNIT[:2] * UNIT[2:4]).sum(1), atol=1e-5)
    for wrong in ({left: TEXTS[:2], right: TEXTS[:3]}, {left: "a"}, {left: "a", right: []}):
        assert call("/score", wrong).status_code == 400


def test_pooling_and_tokenizing_as_vllm_and_the_model_server_have_them() -> None:
    pooled = call("/pooling", {"input": TEXTS, "dimensions": 8}).json()
    assert smallest_cosine(np.array([row["data"] for row in pooled["data"]]), UNIT[:, :8]) > 0.99999
    tokens = call("/v1/tokenize", {"prompt": "the cat sleeps", "return_token_strs": True}).json()
    assert (tokens["count"], tokens["token_strs"], tokens["max_model_len"]) == (5, ["[CLS]", "the", "cat", "sleeps", "[SEP]"], 48)
    assert call("/tokenize", {"prompt": "the cat sleeps"}).json()["tokens"] == tokens["tokens"]
    assert call("/v3/tokenize", {"text": ["the cat sleeps"]}).json() == {"tokens": [tokens["tokens"]]}
    assert call("/tokenize", {"text": "the cat sleeps", "add_special_tokens": False}).json() == {"tokens": tokens["tokens"][1:-1]}
    assert call("/detokenize", {"tokens": tokens["tokens"][1:-1]}).json()["prompt"] == "the cat sleeps"


@pytest.mark.parametrize(
    ("path", "body", "status", "shape"),
    [
        ("/rerank", {"query": "q", "texts": ["a"]}, 424, {"error", "error_type"}),
        ("/v1/ranking", {"query": {"text": "q"}, "passages": [{"text": "a"}]}, 400, {"object", "message", "detail", "type"}),
        ("/v1/classifications", {"input": ["a"]}, 400, {"object", "message", "type", "param", "code"}),
        ("/classify", {"input": ["a"]}, 400, {"error"}),
        ("/classify", {"input": "a"}, 400, {"error"}),
        ("/predict", {"inputs": "a"}, 424, {"error", "error_type"}),
        ("/embed_sparse", {"inputs": "a"}, 424, {"error", "error_type"}),
        ("/embed_all", {"inputs": ["a"]}, 424, {"error", "error_type"}),
    ],
)
def test_routes_of_other_heads_say_so_in_their_dialect(path: str, body: dict, status: int, shape: set) -> None:
    answer = call(path, body)
    assert (answer.status_code, set(answer.json())) == (status, shape)
    assert "has no head" in answer.text
    assert 400 <= call(path, {"query": 5}).status_code < 500


@pytest.mark.parametrize(
    ("path", "method", "status", "shape"),
    [
        ("/api/nothing", "POST", 404, {"error": str}),
        ("/api/embed", "GET", 405, {"error": str}),
        ("/embed", "GET", 405, {"error": str, "error_type": str}),
        ("/v2/embed", "PUT", 405, {"message": str}),
        ("/v1/embeddings", "DELETE", 405, {"error": dict, "detail": str}),
        ("/nothing", "GET", 404, {"error": dict, "detail": str}),
    ],
)
def test_what_is_not_there_is_said_in_the_dialect_of_the_path(path: str, method: str, status: int, shape: dict) -> None:
    answer = call(path, method=method)
    assert answer.status_code == status
    assert {name: type(value) for name, value in answer.json().items()} == shape
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (None, None),
        (30, 30.0),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("1.5s", 1.5),
        ("250ms", 0.25),
        ("-1", -1.0),
        ("-1m", -60.0),
        ("0", 0.0),
    ],
)
def test_durations_as_go_writes_them(given: object, seconds: float | None) -> None:
    found = keep_alive(EmbedBody(keep_alive=given))  # type: ignore[arg-type]
    assert found == pytest.approx(seconds) if seconds is not None else found is None


# -- ids of cl100k_base ----------------------------------------------------------------------------------------------


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    """A store with a small vocabulary in place of cl100k_base: one piece per byte, and a few words."""
    folder = tmp_path / "store" / "models" / "openai--cl100k_base"
    folder.mkdir(parents=True)
    pieces = [bytes([number]) for number in range(256)] + [b" the", b" cat", b"the", b" sleeps"]
    (folder / FILE).write_bytes(
        b"\n".join(base64.b64encode(piece) + b" " + str(900 + i).encode() for i, piece in enumerate(pieces))
    )
    (folder / ".manifest.json").write_text(json.dumps({"name": NAME, "source": "test", "files": {}}))
    return tmp_path / "store"


THE_CAT_SLEEPS = [900 + 258, 900 + 257, 900 + 259]


def test_ids_of_cl100k_are_embedded_as_their_text(vocabulary: Path) -> None:
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"input": THE_CAT_SLEEPS}, {}),  # beyond the model's vocabulary
        ({"input": [THE_CAT_SLEEPS]}, {"token_ids": "cl100k"}),
        ({"input": [THE_CAT_SLEEPS], "model": "text-embedding-3-small"}, {"served_model_name": ("text-embedding-3-small",)}),
    ]
    for body, settings in cases:
        answer = call("/v1/embeddings", body, store=vocabulary, **settings).json()
        wanted = call("/v1/embeddings", {"input": "the cat sleeps"}).json()
        np.testing.assert_allclose(answer["data"][0]["embedding"], wanted["data"][0]["embedding"], atol=1e-6)


def test_ambiguous_ids_are_refused_and_many_of_the_model_s_own_are_not(vocabulary: Path, tmp_path: Path) -> None:
    own = call("/v1/tokenize", {"prompt": "the cat sleeps", "add_special_tokens": False}).json()["tokens"]
    refused = call("/v1/embeddings", {"input": own}, store=vocabulary)
    assert refused.status_code == 400
    assert "token_ids" in refused.json()["error"]["message"]
    assert call("/v1/embeddings", {"input": own * 3}, store=vocabulary).status_code == 200
    assert call("/embed", {"inputs": [own]}, store=vocabulary).status_code == 200  # text-embeddings-inference means its own
    unknown = call("/v1/embeddings", {"input": [*THE_CAT_SLEEPS, 5000]}, store=vocabulary)
    assert "neither in this model's vocabulary nor in cl100k_base" in unknown.json()["error"]["message"]
    never_pulled = call("/v1/embeddings", {"input": THE_CAT_SLEEPS}, store=tmp_path / "empty")
    assert "npu-proxy pull cl100k_base" in never_pulled.json()["error"]["message"]


@functools.cache
def read_vocabulary(file: Path) -> tuple[Cl100k, dict[bytes, int]]:
    """The vocabulary, and the id of each of its pieces."""
    rows = (line.split() for line in file.read_bytes().splitlines())
    return Cl100k(file), {base64.b64decode(piece): int(number) for piece, number in rows}


@given(st.text(min_size=1, max_size=50))
def test_the_real_vocabulary_gives_back_every_byte(text: str) -> None:
    stored = ModelStore(Settings().store).find(NAME)
    if stored is None:
        pytest.skip("cl100k_base is not in the store; `npu-proxy pull cl100k_base`")
    vocabulary, by_piece = read_vocabulary(stored.folder / FILE)
    assert vocabulary.decode([by_piece[bytes([byte])] for byte in text.encode("utf-8", "ignore")]) == text


def test_a_vocabulary_is_pulled_from_a_folder_and_checked(tmp_path: Path) -> None:
    mirror = tmp_path / "mirror" / "cl100k_base"
    mirror.mkdir(parents=True)
    (mirror / FILE).write_text("YQ== 0\n")
    with pytest.raises(Exception, match="checksum"):
        pull(ModelStore(tmp_path / "store"), "cl100k_base", mirrors=[str(tmp_path / "mirror")], report=lambda _: None)
    assert find(NAME) is not None
    assert TierError.kind == "cache"


# -- health follows the devices ------------------------------------------------------------------------------------------


def test_readiness_health_and_metrics_follow_every_device_and_its_last_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_proxy.devices.probes._SECONDS", 0.2)
    spec = read_spec(GOLDEN / "mean")
    first, last, stuck = FakeDevice(width=spec.width, name="npu"), FakeDevice(width=spec.width, name="cpu"), threading.Event()
    made = EngineComponents(spec=spec, tokenizer=RequestTokenizer(spec), device=Fallback([first, last], probe_every=0))
    engine = Engine(components=lambda _settings, _stopping: made)

    def wrong() -> None:
        raise DeviceError("golden texts are wrong")

    async def run() -> None:
        await asyncio.to_thread(engine.start)
        transport = httpx.ASGITransport(app_of(engine, Settings()))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:

            async def states() -> tuple[int, int, int, float]:
                probed = await http.get("/health?probe=1")
                ready, live = await http.get("/health/ready"), await http.get("/health/live")
                metrics = (await http.get("/metrics")).text
                value = next(line for line in metrics.splitlines() if line.startswith("npu_proxy_ready "))
                assert probed.json()["status"] == ("ok" if probed.status_code == 200 else "unready")
                assert ready.json()["ready"] == (ready.status_code == 200)
                return probed.status_code, ready.status_code, live.status_code, float(value.split()[1])

            assert await states() == (200, 200, 200, 1.0)
            assert (await http.get("/health")).json()["devices"][1]["probed"] < 60
            monkeypatch.setattr(first, "probe", wrong)
            assert await states() == (200, 200, 200, 1.0)  # the other device is right
            monkeypatch.setattr(last, "probe", wrong)
            assert await states() == (503, 503, 200, 0.0)
            assert "golden texts are wrong" in (await http.get("/health/ready")).json()["reason"]
            monkeypatch.setattr(last, "probe", lambda: stuck.wait(20))
            begun = time.monotonic()
            assert await states() == (503, 503, 200, 0.0)
            assert time.monotonic() - begun < 10
            stuck.set()
            assert await states() == (200, 200, 200, 1.0)
            first.ready = last.ready = False
            assert await states() == (503, 503, 200, 0.0)
        await asyncio.to_thread(engine.stop)

    asyncio.run(run())
