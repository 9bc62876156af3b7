"""The routes of rerankers, classifiers, sparse and late-interaction models, each in its dialect's own shape."""

import asyncio
from typing import Any

import httpx
import numpy as np
import pytest

from conftest import GOLDEN, app_of
from npu_proxy import Engine, Pair, Settings
from npu_proxy.types import EmbedRequest, OutputType

QUERY, DOCUMENTS = "the cat", ["sea sea", "the cat sleeps", "x"]


def calls(name: str, *requests: tuple[str, object], **more: Any) -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        settings = Settings(model=(str(GOLDEN / name),), device="cpu", load_on_demand=False, **more)
        engine = Engine(settings=settings).start()
        transport = httpx.ASGITransport(app_of(engine, settings))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            found = [await (http.get(path) if body is None else http.post(path, json=body)) for path, body in requests]
        await asyncio.to_thread(engine.stop)
        return found

    return asyncio.run(run())


def logits(name: str, texts: list) -> np.ndarray:
    with Engine(GOLDEN / name, "cpu") as engine:
        return np.asarray(engine.submit(EmbedRequest(texts=texts, output_type=OutputType.SCORES)).result().embeddings)


def test_every_dialect_ranks() -> None:
    found = logits("bert_rerank", [Pair(QUERY, document) for document in DOCUMENTS])[:, 0]
    order, scores = np.argsort(-found), 1 / (1 + np.exp(-found))
    plain = {"query": QUERY, "documents": DOCUMENTS}
    answers = calls(
        "bert_rerank",
        ("/rerank", {"query": QUERY, "texts": DOCUMENTS, "return_text": True}),
        ("/rerank", {"query": QUERY, "texts": DOCUMENTS, "raw_scores": True}),
        ("/rerank", {**plain, "return_documents": True, "raw_scores": False, "top_n": 2}),
        ("/infinity/rerank", {**plain, "return_documents": True, "top_n": 2}),
        ("/rerank", plain),
        *((f"/v{version}/rerank", {**plain, "return_documents": True}) for version in (1, 2, 3)),
        (
            "/v1/rerank",
            {"query": QUERY, "documents": [{"text": document} for document in DOCUMENTS], "top_n": 1, "return_documents": False},
        ),
        ("/score", {"text_1": QUERY, "text_2": DOCUMENTS}),
        ("/info", None),
        ("/embed", {"inputs": "a"}),
        ("/v1/embeddings", {"input": "a"}),
    )
    assert [answer.status_code for answer in answers] == [200] * 11 + [424, 400]
    texts, raw, infinity, below, bare, *rest = (answer.json() for answer in answers[:11])
    assert infinity["results"] == below["results"]
    assert [ranked["document"] for ranked in bare["results"]] == [{"text": DOCUMENTS[index]} for index in order]
    assert [ranked["index"] for ranked in texts] == order.tolist()
    np.testing.assert_allclose([ranked["score"] for ranked in texts], scores[order], atol=1e-5)
    assert texts[0]["text"] == DOCUMENTS[order[0]]
    np.testing.assert_allclose([ranked["score"] for ranked in raw], found[order], atol=1e-5)
    assert infinity["object"] == "rerank"
    assert [ranked["document"] for ranked in infinity["results"]] == [DOCUMENTS[index] for index in order[:2]]
    for answer in rest[:3]:
        assert [ranked["index"] for ranked in answer["results"]] == order.tolist()
        assert answer["results"][0]["document"] == {"text": DOCUMENTS[order[0]]}
        assert answer["meta"]["billed_units"] == {"search_units": 1}
        assert answer["usage"]["total_tokens"] > 0
    assert [ranked["index"] for ranked in rest[3]["results"]] == [order[0]]
    assert "document" not in rest[3]["results"][0]
    np.testing.assert_allclose([pair["score"] for pair in rest[4]["data"]], scores, atol=1e-5)
    assert rest[5]["model_type"] == {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}}


def test_late_interaction_ranks_over_http() -> None:
    (answer, tokens) = calls(
        "colbert", ("/v2/rerank", {"query": QUERY, "documents": DOCUMENTS}), ("/embed_all", {"inputs": DOCUMENTS})
    )
    with Engine(GOLDEN / "colbert", "cpu") as engine:
        wanted = engine.rerank(QUERY, DOCUMENTS)
        vectors = engine.embed_tokens(DOCUMENTS, normalize=False)
    assert [ranked["index"] for ranked in answer.json()["results"]] == [ranked.index for ranked in wanted]
    np.testing.assert_allclose(
        [ranked["relevance_score"] for ranked in answer.json()["results"]], [ranked.score for ranked in wanted], rtol=1e-5
    )
    for found, expected in zip(tokens.json(), vectors, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_every_dialect_classifies() -> None:
    texts = ["the cat", "sea"]
    found = logits("roberta_labels", texts)
    shares = np.exp(found) / np.exp(found).sum(axis=1, keepdims=True)
    infinity, vllm, single, pair, several, wrong = calls(
        "roberta_labels",
        ("/classify", {"input": texts}),
        ("/classify", {"input": texts[0]}),
        ("/predict", {"inputs": texts[0]}),
        ("/predict", {"inputs": texts}),
        ("/predict", {"inputs": [[texts[0]], texts]}),
        ("/rerank", {"query": "q", "texts": ["a"]}),
    )
    for row, labels in zip(shares, infinity.json()["data"], strict=True):
        np.testing.assert_allclose([label["score"] for label in labels], np.sort(row)[::-1], atol=1e-5)
        assert labels[0]["label"] == f"LABEL_{row.argmax()}"
    (first,) = vllm.json()["data"]
    np.testing.assert_allclose(first["probs"], shares[0], atol=1e-5)
    assert (first["label"], first["num_classes"]) == (f"LABEL_{shares[0].argmax()}", 3)
    np.testing.assert_allclose([label["score"] for label in single.json()], np.sort(shares[0])[::-1], atol=1e-5)
    assert len(pair.json()) == 3
    assert several.json() == [single.json(), pair.json()]
    assert (wrong.status_code, wrong.json()["error_type"]) == (424, "Backend")


@pytest.mark.parametrize("dialect", ["infinity", "vllm"])
def test_a_setting_says_whose_form_classify_has(dialect: str) -> None:
    single, several = calls(
        "roberta_labels", ("/classify", {"input": "a"}), ("/classify", {"input": ["a", "b"]}), classify_dialect=dialect
    )
    for answer in (single, several):
        assert isinstance(answer.json()["data"][0], list) == (dialect == "infinity")


@pytest.mark.parametrize("dialect", ["infinity", "vllm"])
def test_a_setting_says_whose_form_rerank_has(dialect: str) -> None:
    plain = {"query": QUERY, "documents": DOCUMENTS, "return_documents": True}
    answers = calls("bert_rerank", ("/rerank", plain), ("/rerank", {**plain, "raw_scores": True}), rerank_dialect=dialect)
    for answer in answers:
        assert isinstance(answer.json()["results"][0]["document"], str) == (dialect == "infinity")


def test_sparse_weights_over_http() -> None:
    (answer,) = calls("bert_splade", ("/embed_sparse", {"inputs": ["the cat", "x"]}))
    with Engine(GOLDEN / "bert_splade", "cpu") as engine:
        wanted = engine.embed_sparse(["the cat", "x"])
    for entries, vector in zip(answer.json(), wanted, strict=True):
        assert [entry["index"] for entry in entries] == vector.indices.tolist()
        np.testing.assert_allclose([entry["value"] for entry in entries], vector.values, atol=1e-6)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/rerank", {"query": "", "texts": ["a", ""]}),
        ("/v1/rerank", {"query": "", "documents": ["a"]}),
        ("/rerank", {"query": "q", "texts": []}),
        ("/v2/rerank", {"query": "q", "documents": ["a"], "top_n": -1}),
        ("/v2/rerank", {"query": "q", "documents": [{"title": "a"}]}),
        ("/predict", {"inputs": []}),
        ("/predict", {"inputs": [["a", "b", "c"]]}),
    ],
)
def test_what_is_wrong_with_a_body_is_said(path: str, body: dict) -> None:
    (answer,) = calls("bert_rerank", (path, body))
    assert 400 <= answer.status_code < 500
