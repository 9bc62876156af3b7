"""Clients that need older libraries than the others, as they come: Infinity's, and LangChain's for Cohere."""

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

installed = pytest.importorskip("infinity_client", reason="these clients live in .venv-clients-older; `make clients` runs them")

from three_kinds import (  # noqa: E402, F401 - fixtures
    CLASSIFIER,
    DOCUMENTS,
    PAYMENTS,
    QUERY,
    RERANKER,
    labelled,
    ranked,
    three,
    vectors,
)

from conftest import Server  # noqa: E402

Ranks = list[tuple[int, float]]
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # clients without a way to close them


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    gc.collect()


def test_infinity(three: Server, vectors: np.ndarray, ranked: Ranks, labelled: list[tuple[str, float]]) -> None:  # noqa: F811
    from infinity_client import Client
    from infinity_client.api.default import classify, embeddings, models, rerank
    from infinity_client.models import ClassifyInput, OpenAIEmbeddingInputText, RerankInput

    client = Client(base_url=three.url)
    reply: Any = embeddings.sync(client=client, body=OpenAIEmbeddingInputText(input_=DOCUMENTS))
    np.testing.assert_allclose([entry.embedding for entry in reply.data], vectors, atol=1e-5)
    reply = embeddings.sync(client=client, body=OpenAIEmbeddingInputText(input_=DOCUMENTS[0], dimensions=64))
    assert len(reply.data[0].embedding) == 64
    reply = rerank.sync(client=client, body=RerankInput(query=QUERY, documents=DOCUMENTS, return_documents=True))
    assert [rank.index for rank in reply.results] == [index for index, _ in ranked]
    np.testing.assert_allclose([rank.relevance_score for rank in reply.results], [score for _, score in ranked], atol=1e-4)
    assert [rank.document for rank in reply.results] == [DOCUMENTS[index] for index, _ in ranked]
    reply = classify.sync(client=client, body=ClassifyInput(input_=PAYMENTS))
    assert [entries[0].label for entries in reply.data] == [label for label, _ in labelled]
    np.testing.assert_allclose([entries[0].score for entries in reply.data], [score for _, score in labelled], atol=1e-4)
    listed: Any = models.sync(client=client)
    assert {RERANKER.name, CLASSIFIER.name} <= {entry.id.rpartition("/")[2] for entry in listed.data}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the client's own code
def test_langchain_cohere(three: Server, vectors: np.ndarray, ranked: Ranks) -> None:  # noqa: F811
    from langchain_cohere import CohereEmbeddings, CohereRerank
    from langchain_core.documents import Document

    embedder = CohereEmbeddings(model="embed-english-v3.0", cohere_api_key="unused", base_url=three.url)  # type: ignore[call-arg]
    np.testing.assert_allclose(embedder.embed_documents(DOCUMENTS), vectors, atol=1e-5)
    np.testing.assert_allclose(embedder.embed_query(DOCUMENTS[0]), vectors[0], atol=1e-5)
    ranker = CohereRerank(model=RERANKER.name, cohere_api_key="unused", base_url=three.url)  # type: ignore[call-arg]
    found = ranker.compress_documents([Document(page_content=text) for text in DOCUMENTS], QUERY)
    assert [DOCUMENTS.index(document.page_content) for document in found] == [index for index, _ in ranked]
    scores = [document.metadata["relevance_score"] for document in found]
    np.testing.assert_allclose(scores, [score for _, score in ranked], atol=1e-4)
