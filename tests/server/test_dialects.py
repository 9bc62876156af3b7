"""The dialects beside OpenAI's, over real golden vectors: shapes, values, and errors in the words of each."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import httpx
import numpy as np
import pytest

from conftest import app_of, golden
from npu_proxy import Engine, Settings

FOLDER, TEXTS, VECTORS = golden("mean")
UNIT = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)


@asynccontextmanager
async def client(**settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    chosen = Settings(
        model=(str(FOLDER),),
        device="cpu",
        served_model_name=("all-minilm", "text-embedding-3-small"),
        load_on_demand=False,
        **settings,
    )
    engine = Engine(settings=chosen).start()
    app = app_of(engine, chosen)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as made:
        yield made
    await asyncio.to_thread(engine.stop)


def call(path: str, body: object = None, method: str = "POST", **settings: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        async with client(**settings) as http:
            content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
            return await http.request(method, path, content=content)

    return asyncio.run(run())


# -- Ollama ----------------------------------------------------------------------------------------------------------


def test_ollama_embeds_texts_of_unit_length() -> None:
    answer = call("/api/embed", {"model": "All-MiniLM:latest", "input": TEXTS, "keep_alive": "5m", "options": {"seed": 1}})
    content = answer.json()
    np.testing.assert_allclose(content["embeddings"], UNIT, atol=1e-5)
    assert content["model"] == "All-MiniLM:latest"
    assert content["total_duration"] > 0
    assert content["prompt_eval_count"] > len(TEXTS)
    narrow = call("/api/embed", {"model": "mean", "input": TEXTS[0], "dimensions": 8}).json()["embeddings"]
    np.testing.assert_allclose(narrow[0], UNIT[0, :8] / np.linalg.norm(UNIT[0, :8]), atol=1e-5)
    wide = call("/api/embed", {"model": "mean", "input": TEXTS[0], "dimensions": 4096}).json()["embeddings"]
    np.testing.assert_allclose(wide, UNIT[:1], atol=1e-5)


def test_ollamas_older_route_does_not_normalize() -> None:
    answer = call("/api/embeddings", {"model": "mean", "prompt": TEXTS[1]}).json()
    np.testing.assert_allclose(answer["embedding"], VECTORS[1], atol=2e-5)
    assert call("/api/embeddings", {"model": "mean", "prompt": ""}).json() == {"embedding": []}


@pytest.mark.parametrize("body", [{}, {"input": ""}, {"input": []}, {"input": None}])
def test_ollama_has_no_vectors_for_no_input(body: dict) -> None:
    assert call("/api/embed", {"model": "mean", **body}).json()["embeddings"] == []


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (None, 400, "missing request body"),
        ({"model": "mean", "input": 5}, 400, "invalid input type"),
        ({"model": "mean", "input": [5]}, 400, "invalid input type"),
        ({"model": "x", "input": "a"}, 404, 'model "x" not found, try pulling it first'),
        ({"model": "mean", "input": "sea " * 60, "truncate": False}, 400, "the input length exceeds the context length"),
        (
            {"model": "mean", "input": "sea " * 9, "options": {"num_ctx": 2}},
            400,
            "input after truncation exceeds maximum context length",
        ),
        (
            {"model": "mean", "input": "sea " * 9, "truncate": False, "options": {"num_ctx": 5}},
            400,
            "the input length exceeds the context length",
        ),
    ],
)
def test_ollama_errors_are_strings(body: object, status: int, words: str) -> None:
    answer = call("/api/embed", body)
    assert (answer.status_code, answer.json()) == (status, {"error": words})


def test_num_ctx_limits_a_text() -> None:
    cut = call("/api/embed", {"input": "sea " * 9, "options": {"num_ctx": 5}})
    whole = call("/api/embed", {"input": "sea sea sea"})
    assert cut.json()["prompt_eval_count"] == whole.json()["prompt_eval_count"] == 5
    np.testing.assert_allclose(cut.json()["embeddings"], whole.json()["embeddings"], atol=1e-5)
    assert cut.headers["x-npu-proxy-truncated"] == "1"


def test_ollama_tells_of_its_models() -> None:
    model, *others = call("/api/tags", method="GET").json()["models"]
    assert [other["name"] for other in others] == ["all-minilm:latest", "text-embedding-3-small:latest"]
    assert model["name"] == model["model"]
    assert {"format", "family", "families", "parameter_size", "quantization_level"} <= set(model["details"])
    (running,) = call("/api/ps", method="GET").json()["models"]
    assert datetime.fromisoformat(running["expires_at"]).tzinfo is not None
    assert running["context_length"] == 48
    shown = call("/api/show", {"name": model["name"]}).json()
    assert shown["capabilities"] == ["embedding"]
    assert shown["model_info"]["bert.embedding_length"] == 32
    assert "version" in call("/api/version", method="GET").json()
    assert call("/", method="GET").text == "Ollama is running"
    assert call("/", method="HEAD").status_code == 200
    assert call("/api/pull", {"model": "x"}).status_code == 403
    assert call("/api/delete", {"model": "x"}, "DELETE").status_code == 403
    assert call("/api/embed", method="GET").status_code == 405


# -- text-embeddings-inference ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/embed", "/", "/invocations"])
def test_tei_embeds(path: str) -> None:
    answer = call(path, {"inputs": TEXTS, "truncate": None, "truncation_direction": "Right"})
    np.testing.assert_allclose(answer.json(), UNIT, atol=1e-5)
    assert int(answer.headers["x-compute-tokens"]) > 0
    assert int(answer.headers["x-total-time"]) >= 0


def test_tei_embeds_one_raw_or_narrow() -> None:
    np.testing.assert_allclose(call("/embed", {"inputs": TEXTS[0], "normalize": False}).json(), VECTORS[:1], atol=2e-5)
    assert np.shape(call("/embed", {"inputs": [TEXTS[0]], "dimensions": 4}).json()) == (1, 4)


def test_tei_similarity_is_the_cosine() -> None:
    body = {"inputs": {"source_sentence": TEXTS[0], "sentences": TEXTS[1:4]}}
    np.testing.assert_allclose(call("/similarity", body).json(), UNIT[1:4] @ UNIT[0], atol=1e-5)


def test_hosted_models_are_asked_at_the_root() -> None:
    body = {"inputs": {"source_sentence": TEXTS[0], "sentences": TEXTS[1:4]}, "parameters": {"truncate": True}}
    np.testing.assert_allclose(call("/", body).json(), UNIT[1:4] @ UNIT[0], atol=1e-5)


def test_tei_tokens_and_back() -> None:
    (tokens,) = call("/tokenize", {"inputs": "the cat sleeps"}).json()
    assert [token["text"] for token in tokens] == ["[CLS]", "the", "cat", "sleeps", "[SEP]"]
    assert [(token["start"], token["stop"]) for token in tokens][:3] == [(None, None), (0, 3), (4, 7)]
    ids = [token["id"] for token in tokens]
    assert call("/decode", {"ids": ids[1:-1]}).json() == ["the cat sleeps"]
    assert call("/decode", {"ids": [ids, ids[:2]], "skip_special_tokens": False}).json()[1] == "[CLS] the"
    info = call("/info", method="GET").json()
    assert (info["max_input_length"], info["model_type"]) == (48, {"embedding": {"pooling": "mean"}})


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/embed", {"inputs": []}, 400, "Empty"),
        ("/embed", {"inputs": ""}, 400, "Empty"),
        ("/embed", {"inputs": 5}, 422, "Validation"),
        ("/embed", {"inputs": "sea " * 60, "truncate": False}, 422, "Validation"),
        ("/embed", {"inputs": ["a"] * 5, "dimensions": 999}, 422, "Validation"),
        ("/embed", {"inputs": ["a"] * 2049}, 422, "Validation"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}, 400, "Empty"),
        ("/decode", {"ids": [99999]}, 422, "Tokenizer"),
        ("/predict", {"inputs": "a"}, 424, "Backend"),
        ("/rerank", {"query": "a", "texts": ["b"]}, 424, "Backend"),
        ("/embed_sparse", {"inputs": "a"}, 424, "Backend"),
    ],
)
def test_tei_errors_are_flat(path: str, body: dict, status: int, kind: str) -> None:
    answer = call(path, body)
    assert (answer.status_code, answer.json()["error_type"]) == (status, kind)
    assert answer.json()["error"]


# -- Cohere ----------------------------------------------------------------------------------------------------------


def test_cohere_v1_has_floats_or_types() -> None:
    plain = call("/v1/embed", {"texts": TEXTS, "model": "mean", "input_type": "clustering", "truncate": "END"}).json()
    assert plain["response_type"] == "embeddings_floats"
    np.testing.assert_allclose(plain["embeddings"], UNIT, atol=1e-5)
    typed = call("/v1/embed", {"texts": TEXTS[:2], "embedding_types": ["float", "int8", "ubinary"]}).json()
    assert typed["response_type"] == "embeddings_by_type"
    assert set(typed["embeddings"]) == {"float", "int8", "ubinary"}
    assert typed["embeddings"]["ubinary"][0] == np.packbits(UNIT[0] >= 0).tolist()


def test_cohere_v2_uses_prompts_and_parts() -> None:
    body = {"model": "mean", "input_type": "search_query", "inputs": [{"content": [{"type": "text", "text": "the cat"}]}]}
    queried = call("/v2/embed", {**body, "embedding_types": ["float", "base64", "binary"], "output_dimension": 8}).json()
    prompted = call("/embed", {"inputs": "one two the cat", "dimensions": 8}).json()
    np.testing.assert_allclose(queried["embeddings"]["float"], prompted, atol=1e-5)
    (coded,) = queried["embeddings"]["base64"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(coded), "<f4"), prompted[0], atol=1e-5)
    assert len(queried["embeddings"]["binary"][0]) == 1
    assert queried["texts"] == ["the cat"]
    assert queried["meta"]["billed_units"]["input_tokens"] == 6


@pytest.mark.parametrize(
    "body",
    [
        {"texts": []},
        {"texts": ["a"], "input_type": "image"},
        {"texts": ["sea " * 60], "truncate": "NONE"},
        {"texts": ["a"], "output_dimension": 12, "embedding_types": ["binary"]},
        {"inputs": [{"content": [{"type": "image_url", "text": None}]}]},
    ],
)
def test_cohere_errors_are_messages(body: dict) -> None:
    answer = call("/v2/embed", {"model": "mean", **body})
    assert answer.status_code == 400
    assert list(answer.json()) == ["message"]


def test_every_dialect_knows_the_model_by_all_its_names() -> None:
    for name in ("mean", "all-minilm", "sentence-transformers/all-MiniLM-L6-v2", "text-embedding-3-small"):
        assert call("/v1/embeddings", {"input": "a", "model": name}).status_code == 200
        assert call("/v2/embed", {"texts": ["a"], "model": name}).status_code == 200
    assert call("/v2/embed", {"texts": ["a"], "model": "embed-english-v3.0"}).status_code == 404
