"""Clients of several APIs as they come, against one server with an embedding model, a reranker and a classifier.

Only base URLs, keys and models are set; vectors and scores are held against the library's.
"""

import asyncio
import gc
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

installed = pytest.importorskip("voyageai", reason="these clients live in .venv-clients; `make clients` runs them")

from three_kinds import (  # noqa: E402, F401 - fixtures
    CLASSIFIER,
    DOCUMENTS,
    PAYMENTS,
    QUERY,
    RERANKER,
    labelled,
    logits,
    ranked,
    three,
    vectors,
)

from conftest import Server  # noqa: E402

Ranks = list[tuple[int, float]]
pytestmark = [  # clients' own code, and clients without a way to close them
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]
litellm_types = pytest.mark.filterwarnings("ignore:Items? .* on TypedDict class:UserWarning")


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    gc.collect()


def same(found: Any, wanted: Ranks) -> None:
    """Whether ranks have the right order and scores."""
    found = list(found)
    assert [index for index, _ in found] == [index for index, _ in wanted]
    np.testing.assert_allclose([score for _, score in found], [score for _, score in wanted], atol=1e-4)


# -- rerank --------------------------------------------------------------------------------------------------------------

LITELLM = {
    "hosted_vllm": "",
    "hosted_vllm, v1": "/v1",
    "jina_ai": "/v1",
    "together_ai": "/v1",
    "cohere": "",
    "cohere, v1": "/v1",
    "huggingface": "",
    "huggingface, model": "/models/reranker",
    "infinity": "/infinity",
    "voyage": "/voyage/v1",
    "litellm_proxy": "",
}


@litellm_types
@pytest.mark.parametrize("kind", LITELLM)
def test_litellm_reranks(three: Server, ranked: Ranks, kind: str) -> None:  # noqa: F811
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    given: dict[str, Any] = {"model": f"{kind.partition(',')[0]}/{RERANKER.name}", "query": QUERY, "documents": DOCUMENTS}
    given |= {"api_base": three.url + LITELLM[kind], "api_key": "unused"}
    reply = litellm.rerank(**given)
    same(((rank["index"], rank["relevance_score"]) for rank in reply.results), ranked)
    assert [rank["document"]["text"] for rank in reply.results if rank.get("document")] in (
        [],
        [DOCUMENTS[index] for index, _ in ranked],
    )

    async def run() -> Any:
        return await litellm.arerank(**given)

    same(((rank["index"], rank["relevance_score"]) for rank in asyncio.run(run()).results), ranked)


@litellm_types
@pytest.mark.parametrize("model", [f"nvidia_nim/{RERANKER.name}", f"nvidia_nim/ranking/{RERANKER.name}"])
def test_litellm_ranks_as_nvidia_does(three: Server, logits: Ranks, model: str) -> None:  # noqa: F811
    import litellm

    reply = litellm.rerank(model=model, query=QUERY, documents=DOCUMENTS, api_base=three.url, api_key="unused")
    same(((rank["index"], rank["relevance_score"]) for rank in reply.results), logits)


def test_cohere_reranks(three: Server, ranked: Ranks) -> None:  # noqa: F811
    import cohere

    for client in (cohere.ClientV2(api_key="unused", base_url=three.url), cohere.Client(api_key="unused", base_url=three.url)):
        reply = client.rerank(model=RERANKER.name, query=QUERY, documents=DOCUMENTS)
        same(((rank.index, rank.relevance_score) for rank in reply.results), ranked)
        first = client.rerank(model=RERANKER.name, query=QUERY, documents=DOCUMENTS, top_n=1).results
        same(((rank.index, rank.relevance_score) for rank in first), ranked[:1])


# -- voyage --------------------------------------------------------------------------------------------------------------


def test_voyage(three: Server, ranked: Ranks, vectors: np.ndarray) -> None:  # noqa: F811
    import voyageai

    client = voyageai.Client(api_key="unused", base_url=f"{three.url}/v1")
    np.testing.assert_allclose(client.embed(DOCUMENTS, model="voyage-3").embeddings, vectors, atol=1e-5)
    np.testing.assert_allclose(client.embed(DOCUMENTS, model="voyage-3", input_type="document").embeddings, vectors, atol=1e-5)
    narrow = client.embed(DOCUMENTS, model="voyage-3", output_dimension=256).embeddings
    wanted = vectors[:, :256] / np.linalg.norm(vectors[:, :256], axis=1, keepdims=True)
    np.testing.assert_allclose(narrow, wanted, atol=1e-5)
    for dtype, bits in (("int8", None), ("uint8", None), ("binary", 128), ("ubinary", 0)):
        found = np.array(client.embed(DOCUMENTS, model="voyage-3", output_dtype=dtype).embeddings)
        if bits is None:
            shift = 128 if dtype == "uint8" else 0
            scaled = (found.astype(float) - shift) / np.linalg.norm(found.astype(float) - shift, axis=1, keepdims=True)
            assert (scaled * vectors).sum(1).min() > 0.99
        else:
            np.testing.assert_array_equal(found.astype(int) + bits, np.packbits(vectors >= 0, axis=1))
    reply = client.rerank(QUERY, DOCUMENTS, model="rerank-2")
    same(((rank.index, rank.relevance_score) for rank in reply.results), ranked)
    assert [rank.document for rank in reply.results] == [DOCUMENTS[index] for index, _ in ranked]
    late = client.contextualized_embed(inputs=[DOCUMENTS], model="voyage-3").results[0].embeddings
    assert np.shape(late) == (3, 384)
    assert np.abs(np.array(late) - vectors).max() > 0.01


# -- mistral, google, azure ----------------------------------------------------------------------------------------------


def test_mistral(three: Server, vectors: np.ndarray, labelled: list[tuple[str, float]]) -> None:  # noqa: F811
    from mistralai.client import Mistral

    with Mistral(api_key="unused", server_url=three.url) as client:
        reply = client.embeddings.create(model="mistral-embed", inputs=DOCUMENTS)
        np.testing.assert_allclose([entry.embedding for entry in reply.data], vectors, atol=1e-5)
        narrow = client.embeddings.create(model="mistral-embed", inputs=DOCUMENTS, output_dimension=128)
        assert np.shape([entry.embedding for entry in narrow.data]) == (3, 128)
        assert "mistral-embed" in {model.id for model in client.models.list().data or []}
        assert client.models.retrieve(model_id="mistral-embed").id == "mistral-embed"
        classes = client.classifiers.classify(model=CLASSIFIER.name, inputs=PAYMENTS).results
        best = [max(entry["label"].scores.items(), key=lambda item: item[1]) for entry in classes]
        assert [label for label, _ in best] == [label for label, _ in labelled]
        np.testing.assert_allclose([score for _, score in best], [score for _, score in labelled], atol=1e-4)


def test_google_genai(three: Server, vectors: np.ndarray) -> None:  # noqa: F811
    from google import genai  # type: ignore[reportAttributeAccessIssue] - a namespace package

    client = genai.Client(api_key="unused", http_options={"base_url": three.url})
    for model in ("gemini-embedding-001", "sentence-transformers/all-MiniLM-L6-v2"):
        reply = client.models.embed_content(model=model, contents=DOCUMENTS)
        np.testing.assert_allclose([entry.values for entry in reply.embeddings or []], vectors, atol=1e-5)
    config: Any = {"task_type": "RETRIEVAL_DOCUMENT", "output_dimensionality": 64}
    narrow = client.models.embed_content(model="gemini-embedding-001", contents=DOCUMENTS, config=config)
    assert np.shape([entry.values for entry in narrow.embeddings or []]) == (3, 64)
    assert (client.models.count_tokens(model="gemini-embedding-001", contents="the cat").total_tokens or 0) > 2
    assert any("gemini-embedding-001" in (model.name or "") for model in client.models.list())


def test_azure_openai(three: Server, vectors: np.ndarray) -> None:  # noqa: F811
    from openai import AzureOpenAI, OpenAI

    with AzureOpenAI(azure_endpoint=three.url, api_version="2024-10-21", api_key="unused") as client:
        reply = client.embeddings.create(model="text-embedding-3-small", input=DOCUMENTS)
        np.testing.assert_allclose([entry.embedding for entry in reply.data], vectors, atol=1e-5)
    with OpenAI(base_url=f"{three.url}/openai/v1/", api_key="unused") as client:
        reply = client.embeddings.create(model="text-embedding-3-small", input=DOCUMENTS)
        np.testing.assert_allclose([entry.embedding for entry in reply.data], vectors, atol=1e-5)
    with OpenAI(base_url=f"{three.url}/models/text-embedding-3-small/v1", api_key="unused") as client:
        reply = client.embeddings.create(model="any", input=DOCUMENTS)
        np.testing.assert_allclose([entry.embedding for entry in reply.data], vectors, atol=1e-5)


# -- haystack ------------------------------------------------------------------------------------------------------------


def test_haystack(three: Server, vectors: np.ndarray, ranked: Ranks) -> None:  # noqa: F811
    os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"
    from haystack import Document
    from haystack.components.embedders import OpenAIDocumentEmbedder
    from haystack.utils import Secret
    from haystack_integrations.components.embedders.cohere import CohereDocumentEmbedder
    from haystack_integrations.components.embedders.jina import JinaDocumentEmbedder
    from haystack_integrations.components.rankers.cohere import CohereRanker
    from haystack_integrations.components.rankers.jina import JinaRanker

    key = Secret.from_token("unused")

    def documents() -> list[Document]:
        return [Document(content=text) for text in DOCUMENTS]

    embedders = [
        OpenAIDocumentEmbedder(api_key=key, model="text-embedding-3-small", api_base_url=f"{three.url}/v1", progress_bar=False),
        CohereDocumentEmbedder(api_key=key, model="embed-english-v3.0", api_base_url=three.url, progress_bar=False),
        JinaDocumentEmbedder(api_key=key, model="jina-embeddings-v3", base_url=f"{three.url}/v1/embeddings", progress_bar=False),
    ]
    for embedder in embedders:
        found = embedder.run(documents())["documents"]
        np.testing.assert_allclose([document.embedding for document in found], vectors, atol=1e-5)
    rankers: list[Any] = [
        CohereRanker(api_key=key, model=RERANKER.name, api_base_url=three.url),
        JinaRanker(api_key=key, model=RERANKER.name, base_url=f"{three.url}/v1/rerank"),
    ]
    for ranker in rankers:
        found = ranker.run(query=QUERY, documents=documents())["documents"]
        same(((DOCUMENTS.index(document.content), document.score) for document in found), ranked)


# -- java ----------------------------------------------------------------------------------------------------------------


def test_java_s_http_client_with_its_defaults(three: Server, tmp_path: Path) -> None:  # noqa: F811
    """Which asks for an upgrade to HTTP/2 in the first request of a connection, and sends a body with it."""
    if shutil.which("java") is None:
        pytest.skip("needs a Java of version 11 or later")
    source = Path(__file__).parent / "java" / "Ask.java"
    run = subprocess.run(
        ["java", str(source), f"{three.url}/v1/embeddings"], capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["200 HTTP_1_1"] * 3
