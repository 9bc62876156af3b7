"""Many models on one port: loading on first use, keep-alive, room, uses, names, pulling and deleting."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import GOLDEN, SMALL_SHAPES, fake_engine, golden, smallest_cosine, until_set
from npu_proxy import Engine, Settings, SettingsError
from npu_proxy.devices.fake import FakeDevice
from npu_proxy.models.pull import pull
from npu_proxy.models.store import ModelStore
from npu_proxy.server.http.app import create_app
from npu_proxy.server.models.loaded import LoadedModel, LoadedModels, unloadable

_, TEXTS, MEAN = golden("mean")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for name in ("mean", "cls", "max"):
        pull(ModelStore(tmp_path), str(golden(name)[0]), mirrors=(), report=lambda _: None)
    return tmp_path


@asynccontextmanager
async def serving(store: Path, **settings: Any) -> AsyncIterator[tuple[httpx.AsyncClient, LoadedModels]]:
    chosen = Settings(**{"model": ("mean",), "store": store, "device": "cpu", **settings})
    models = LoadedModels(chosen)
    await models.start()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(models, chosen)), base_url="http://localhost") as http:
        yield http, models
    await models.stop()


async def embed(http: httpx.AsyncClient, model: str, **more: Any) -> httpx.Response:
    return await http.post("/api/embed", json={"model": model, "input": TEXTS, **more})


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def names(models: LoadedModels) -> set[str]:
    return {model.name for model in models.loaded()}


def test_stored_models_are_loaded_on_first_use_once_and_answer_rightly(store: Path) -> None:
    async def run() -> None:
        async with serving(store) as (http, models):
            answers = await asyncio.gather(*(embed(http, name) for name in ("cls", "CLS:latest", "mean", "max", "cls")))
            assert [answer.status_code for answer in answers] == [200] * 5
            for name, answer in zip(("cls", "cls", "mean", "max", "cls"), answers, strict=True):
                assert smallest_cosine(answer.json()["embeddings"], golden(name)[2]) > 0.99999
            assert names(models) == {"mean", "cls", "max"}
            health = (await http.get("/health")).json()
            first = health["models"][0]
            assert (first["name"], first["pinned"], first["state"]) == ("mean", True, "running")
            assert len({answer.headers["x-npu-proxy-fingerprint"] for answer in answers}) == 3
            listed = [entry["id"] for entry in (await http.get("/v1/models")).json()["data"]]
            assert listed[0] == "mean"
            assert set(listed) == {"mean", "cls", "max"}
            assert (await http.get("/v1/models/max")).json()["id"] == "max"
            ps = {entry["name"]: entry["expires_at"] for entry in (await http.get("/api/ps")).json()["models"]}
            assert ps["mean:latest"].startswith("2318")
            assert not ps["cls:latest"].startswith("2318")

    asyncio.run(run())


def test_only_named_models_where_loading_on_demand_is_off(store: Path) -> None:
    async def run() -> None:
        async with serving(store, load_on_demand=False, model=("mean", "max")) as (http, models):
            assert (await embed(http, "cls")).status_code == 404
            assert (await embed(http, "max")).status_code == 200
            assert names(models) == {"mean", "max"}
            assert [entry["id"] for entry in (await http.get("/v1/models")).json()["data"]] == ["mean", "max"]

    asyncio.run(run())


def test_without_a_name_the_first_model_that_can_answers(store: Path) -> None:
    others = (str(GOLDEN / "bert_rerank"), str(GOLDEN / "deberta_nli"))

    async def run() -> None:
        async with serving(store, load_on_demand=False, model=("mean", *others)) as (http, _):
            texts = {"query": "the cat", "texts": ["sea", "the cat"]}
            for path, body, status, said in (
                ("/rerank", texts, 200, "score"),
                ("/rerank", {**texts, "model": "bert_rerank"}, 200, "score"),
                ("/rerank", {**texts, "model": "nope"}, 404, "does not exist;"),
                ("/rerank", {**texts, "model": "mean"}, 424, "no head for ranking"),
                ("/v1/rerank", {"query": "the cat", "documents": ["sea"]}, 200, "relevance_score"),
                ("/predict", {"inputs": "the cat"}, 200, "LABEL_2"),
                ("/embed", {"inputs": "the cat"}, 200, "["),
                ("/score", {"model": "deberta_nli", "text_1": "a", "text_2": "b"}, 400, "cannot rank"),
            ):
                answer = await http.post(path, json=body)
                assert (answer.status_code, said in answer.text) == (status, True), (path, body, answer.text)

    asyncio.run(run())


def test_memory_is_counted_by_what_a_model_is_served_from(tmp_path: Path) -> None:
    exported, mean = GOLDEN / "exported" / "t5_mean", GOLDEN / "mean"
    files = [exported / "2_Dense" / "model.safetensors", *(exported / "openvino").iterdir()]

    async def run() -> list[int]:
        settings = Settings(model=(str(exported), str(mean)), store=tmp_path)
        models = LoadedModels(settings, make=lambda _settings, _cache: fake_engine())
        await models.start()
        sizes = [model.size for model in models.loaded()]
        await models.stop()
        return sizes

    # The golden model has an ONNX file as well, which is not counted.
    assert asyncio.run(run()) == [sum(file.stat().st_size for file in files), (mean / "model.safetensors").stat().st_size]


def test_idle_models_are_unloaded_named_ones_never(store: Path) -> None:
    async def run() -> None:
        async with serving(store, keep_alive=0.05) as (http, models):
            assert (await embed(http, "cls", keep_alive=-1)).status_code == 200
            assert (await embed(http, "max", keep_alive="10m")).status_code == 200
            await asyncio.sleep(0.3)
            assert names(models) == {"mean", "cls", "max"}
            assert (await embed(http, "cls", keep_alive=0)).status_code == 200
            assert (await embed(http, "mean", keep_alive=0)).status_code == 200
            await until(lambda: names(models) == {"mean", "max"})
            assert (await http.post("/v1/embeddings", json={"model": "max", "input": "a"})).status_code == 200  # the setting again
            await until(lambda: names(models) == {"mean"})
            assert (await embed(http, "mean")).status_code == 200
            wrong = await embed(http, "mean", keep_alive="soon")
            assert (wrong.status_code, wrong.json()["error"]) == (400, 'time: invalid duration "soon"')

    asyncio.run(run())


def test_room_is_made_by_unloading_what_is_longest_unused(store: Path) -> None:
    size = sum(file.stat().st_size for file in golden("mean")[0].glob("*.safetensors"))

    async def run() -> None:
        async with serving(store) as (http, models):
            models._limit = int(2.5 * size)
            assert (await embed(http, "cls")).status_code == 200
            assert (await embed(http, "max")).status_code == 200
            assert names(models) == {"mean", "max"}
            models._limit = int(1.5 * size)
            refused = await embed(http, "cls")  # can never fit beside the named one: not worth another try
            assert refused.status_code == 400
            assert "models_mb" in refused.json()["error"]

    asyncio.run(run())


def test_a_model_in_use_is_not_unloaded_for_room() -> None:
    event = threading.Event()
    devices: list[FakeDevice] = []

    def make(settings: Settings, cache: object) -> Engine:
        devices.append(FakeDevice(width=32, shapes=SMALL_SHAPES, script=until_set(event)))
        return fake_engine(devices[-1])

    async def run(folder: Path) -> None:
        for name in ("mean", "cls", "max"):
            pull(ModelStore(folder), str(golden(name)[0]), mirrors=(), report=lambda _: None)
        settings = Settings(model=("mean",), store=folder)
        models = LoadedModels(settings, make=make)
        await models.start()
        models._limit = 2 * models.first.size + 1000
        app = create_app(models, settings)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=60) as http:
            busy = asyncio.create_task(embed(http, "cls", keep_alive=0))
            await until(lambda: any(model.uses for model in models.loaded()))
            refused = await embed(http, "max")
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            event.set()
            assert (await busy).status_code == 200
            await until(lambda: len(models.loaded()) == 1)
            assert (await embed(http, "max")).status_code == 200
        await models.stop()
        assert all(device.closed for device in devices)

    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder)))


def test_a_model_that_cannot_be_loaded_is_an_error_each_time_and_the_others_serve(store: Path) -> None:
    async def run() -> None:
        async with serving(store) as (http, models):
            (store / "models" / "cls" / "model.safetensors").write_bytes(b"nonsense")
            for _ in range(2):
                answer = await embed(http, "cls")
                assert answer.status_code == 500
                assert str(store) not in answer.text
            assert names(models) == {"mean"}
            assert (await embed(http, "mean")).status_code == 200

    asyncio.run(run())


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "..",
        ".",
        "~",
        "models/mean",
        "a/b/c",
        "%2e%2e/x",
        "mean\0",
        "x" * 100_000,
        "tests",
        "src",
    ],
)
def test_no_name_leads_out_of_the_store(store: Path, name: str) -> None:
    async def run() -> None:
        async with serving(store, allow_pull=True) as (http, models):
            for answer in (
                await embed(http, name),
                await http.post("/v1/embeddings", json={"model": name, "input": "a"}),
                await http.post("/api/show", json={"model": name}),
                await http.request("DELETE", "/api/delete", json={"model": name}),
            ):
                assert answer.status_code in (400, 404), (name, answer.text)
                assert len(answer.text) < 2000
            pulled = await http.post("/api/pull", json={"model": name, "stream": False})
            assert pulled.status_code in (400, 502), pulled.text
            assert names(models) == {"mean"}

    asyncio.run(run())


def test_served_names_may_be_of_any_model(store: Path) -> None:
    async def run() -> None:
        async with serving(store, served_model_name=("ada", "large=cls")) as (http, _):
            assert smallest_cosine((await embed(http, "ada")).json()["embeddings"], MEAN) > 0.99999
            assert smallest_cosine((await embed(http, "Large")).json()["embeddings"], golden("cls")[2]) > 0.99999
            listed = {entry["id"] for entry in (await http.get("/v1/models")).json()["data"]}
            assert {"ada", "large"} <= listed
            assert (await http.get("/v1/models/large")).json()["id"] == "large"

    asyncio.run(run())


def test_pulling_and_deleting_over_http(store: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    mirror = tmp_path_factory.mktemp("mirror")
    (mirror / "dense").symlink_to(golden("dense")[0])

    async def run() -> None:
        async with serving(store) as (http, _):
            for method, path in (("POST", "/api/pull"), ("DELETE", "/api/delete")):
                refused = await http.request(method, path, json={"model": "cls"})
                assert refused.status_code == 403
                assert "allow_pull" in refused.json()["error"]
        async with serving(store, allow_pull=True, mirrors=(str(mirror),)) as (http, models):
            lines = [json.loads(line) for line in (await http.post("/api/pull", json={"model": "dense"})).text.splitlines()]
            assert lines[-1] == {"status": "success"}
            assert len(lines) > 3
            assert (await embed(http, "dense")).status_code == 200
            failed = (await http.post("/api/pull", json={"model": "no/such"})).text.splitlines()
            assert "could not be downloaded" in json.loads(failed[-1])["error"]
            assert (await http.request("DELETE", "/api/delete", json={"model": "dense"})).status_code == 200
            assert (await embed(http, "dense")).status_code == 404
            assert names(models) == {"mean"}
            kept = await http.request("DELETE", "/api/delete", json={"model": "mean"})
            assert kept.status_code == 403
            assert (await http.request("DELETE", "/api/delete", json={"model": "dense"})).status_code == 404

    asyncio.run(run())


def test_the_server_s_engines_share_one_cache(store: Path) -> None:
    async def run() -> None:
        async with serving(store) as (http, models):
            for state in ("miss", "hit"):
                for name in ("mean", "cls"):
                    answer = await embed(http, name)
                    assert answer.headers["x-npu-proxy-cache"] == state
                    assert smallest_cosine(answer.json()["embeddings"], golden(name)[2]) > 0.99999
            assert models.cache is not None
            assert models.cache.counts().entries == 2 * len(set(TEXTS))

    asyncio.run(run())


@given(
    st.lists(st.tuples(st.integers(0, 50), st.booleans(), st.integers(0, 1), st.booleans()), max_size=8),
    st.integers(0, 60),
    st.integers(0, 150),
)
def test_what_is_unloaded_is_idle_makes_room_and_is_no_more_than_needed(rows: list, size: int, limit: int) -> None:
    loaded = [
        LoadedModel(name=str(number), engine=_Running(running), pinned=pinned, size=held, uses=uses, last_used=number)  # type: ignore[arg-type]
        for number, (held, pinned, uses, running) in enumerate(rows)
    ]
    chosen = unloadable(loaded, size, limit)
    free = [model for model in loaded if not model.pinned and not model.uses and model.running]
    held = sum(model.size for model in loaded)
    if chosen is None:
        assert held - sum(model.size for model in free) + size > limit
        return
    assert all(model in free for model in chosen)
    assert held - sum(model.size for model in chosen) + size <= limit
    assert chosen == free[: len(chosen)]
    if chosen:
        assert held - sum(model.size for model in chosen[:-1]) + size > limit


class _Running:
    def __init__(self, running: bool) -> None:
        self.state = "running" if running else "new"


def test_vectors_over_http_are_those_of_the_library(store: Path) -> None:
    async def run() -> list:
        async with serving(store) as (http, _):
            return (await http.post("/embed", json={"inputs": TEXTS, "normalize": False})).json()

    np.testing.assert_allclose(asyncio.run(run()), MEAN, atol=2e-5)


def test_a_keep_alive_of_ages_is_for_ever(store: Path) -> None:
    async def run() -> None:
        async with serving(store) as (http, _):
            for ages in (1e300, 1e12, "99999999h"):
                assert (await embed(http, "cls", keep_alive=ages)).status_code == 200
                listed = (await http.get("/api/ps")).json()["models"]
                assert all(entry["expires_at"].startswith("2318") for entry in listed)
            assert (await embed(http, "max")).json()["load_duration"] > 0
            assert (await embed(http, "max")).json()["load_duration"] == 0

    asyncio.run(run())


def test_a_page_of_another_origin_cannot_pull(store: Path) -> None:
    async def run() -> None:
        async with serving(store, allow_pull=True) as (http, _):
            headers = {"origin": "https://evil.example", "content-type": "text/plain"}
            assert (await http.post("/api/pull", content=b'{"model": "mean"}', headers=headers)).status_code == 403
            assert (await http.post("/api/pull", json={"model": "~nosuchuser", "stream": False})).status_code == 400

    asyncio.run(run())


# -- roles, and what the answer says of what had no effect ---------------------------------------------------------------


def test_a_client_that_can_only_choose_a_model_name_chooses_a_role(store: Path) -> None:
    async def vector(http: httpx.AsyncClient, model: str, **more: Any) -> list[float]:
        answer = await http.post("/v1/embeddings", json={"model": model, "input": "cat", **more})
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == model
        return answer.json()["data"][0]["embedding"]

    async def run() -> None:
        instructions = {"query_instruction": ("one two ",), "document_instruction": ("max=three ",)}
        async with serving(store, served_model_name=("short",), **instructions) as (http, _):
            plain = await vector(http, "mean")
            for name in ("mean:query", "short:query", "mean:latest:query"):
                assert await vector(http, name) == await vector(http, "mean", prompt="one two ")
            assert await vector(http, "mean:document") == plain  # the instruction is for another model
            assert await vector(http, "max:document") == await vector(http, "max", prompt="three ")  # loaded on demand
            assert await vector(http, "mean:query", prompt="own ") == await vector(http, "mean", prompt="own ")
            assert await vector(http, "mean:query", input_type="document") == plain
            assert (await http.get("/v1/models/mean:query")).status_code == 200
            for unknown in ("mean:clustering", "nobody:query", ":query"):
                answer = await http.post("/v1/embeddings", json={"model": unknown, "input": "cat"})
                assert answer.status_code == 404, unknown

    asyncio.run(run())


def test_a_model_whose_own_name_ends_in_a_role_comes_first(store: Path) -> None:
    async def run() -> None:
        async with serving(store, served_model_name=("mean:query=max",), query_instruction=("one two ",)) as (http, _):
            for name in ("mean:query", "max"):
                answer = await http.post("/v1/embeddings", json={"model": name, "input": "cat"})
                expected = await http.post("/v1/embeddings", json={"model": "max", "input": "cat"})
                assert answer.json()["data"] == expected.json()["data"]

    asyncio.run(run())


def test_the_answer_says_what_had_no_effect_or_a_price(store: Path) -> None:
    async def run() -> None:
        async with serving(store) as (http, _):
            body = {"model": "max", "texts": ["a"], "input_type": "clustering", "output_dimension": 8, "embedding_types": ["float"]}
            answer = await http.post("/v2/embed", json=body)
            assert answer.status_code == 200, answer.text
            assert "no instruction" in answer.headers["x-npu-proxy-input-type"]
            assert "not trained" in answer.headers["x-npu-proxy-dimensions"]
            plain = await http.post("/v1/embeddings", json={"model": "mean", "input": "a", "input_type": "query"})
            assert not {"x-npu-proxy-input-type", "x-npu-proxy-dimensions"} & plain.headers.keys()

    asyncio.run(run())


def test_a_client_that_expects_another_fingerprint_gets_409_in_every_dialect(store: Path) -> None:
    async def run() -> None:
        async with serving(store) as (http, models):
            fingerprint = models.first.engine.spec.fingerprint
            bodies = {"/v1/embeddings": {"input": "a"}, "/api/embed": {"input": "a", "model": "mean"}, "/embed": {"inputs": "a"}}
            for path, body in bodies.items():
                for expected, status in ((fingerprint, 200), ("0" * 16, 409)):
                    answer = await http.post(path, json=body, headers={"X-NPU-Proxy-Expect-Fingerprint": expected})
                    assert answer.status_code == status, answer.text
            assert models.first.engine.stats().counters.refused == 0

    asyncio.run(run())


def test_a_setting_for_a_model_that_nobody_serves_is_refused(store: Path) -> None:
    with pytest.raises(SettingsError, match="no model is named"):
        LoadedModels(Settings(model=("mean",), store=store, query_instruction=("maen=q: ",)))
