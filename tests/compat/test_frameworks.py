"""Adapters of LangChain, LlamaIndex, Haystack, Chroma and LanceDB inside the frameworks themselves (`make bulk`)."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import GOLDEN
from npu_proxy import Engine

pytestmark = pytest.mark.filterwarnings("ignore")
MODEL, RERANKER = str(GOLDEN / "mean"), str(GOLDEN / "bert_rerank")
TEXTS = ["the cat sleeps", "sea", "the dog"]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(MODEL) as made:
        yield made


@pytest.fixture(scope="module")
def best() -> list[tuple[int, float]]:
    """The two best documents for `the cat`, and their scores."""
    with Engine(RERANKER) as engine:
        return [(one.index, one.score) for one in engine.rerank("the cat", TEXTS, top_n=2)]


def close(found: Any, expected: Any) -> bool:
    return np.allclose(np.asarray(found), np.asarray(expected), atol=1e-6)


def test_langchain(engine: Engine, best: list[tuple[int, float]]) -> None:
    pytest.importorskip("langchain_core")
    from langchain_core.documents import Document
    from langchain_core.vectorstores import InMemoryVectorStore

    from npu_proxy.compat.langchain import NpuProxyEmbeddings, NpuProxyRerank

    made = NpuProxyEmbeddings(MODEL)
    assert close(made.embed_documents(TEXTS), engine.embed(TEXTS, input_type="document"))
    assert close(made.embed_query("the cat"), engine.embed(["the cat"], input_type="query")[0])
    assert close(asyncio.run(made.aembed_documents(TEXTS)), made.embed_documents(TEXTS))
    assert close(asyncio.run(made.aembed_query("the cat")), made.embed_query("the cat"))
    assert made.embed_documents([]) == []
    store = InMemoryVectorStore.from_texts(TEXTS, made)
    assert len(store.similarity_search("the cat", k=2)) == 2
    documents = [Document(page_content=text, metadata={"n": number}) for number, text in enumerate(TEXTS)]
    kept = NpuProxyRerank(model=RERANKER, top_n=2).compress_documents(documents, "the cat")
    assert [(one.metadata["n"], one.metadata["relevance_score"]) for one in kept] == [
        (n, pytest.approx(score)) for n, score in best
    ]
    assert "relevance_score" not in documents[0].metadata


def test_llama_index(engine: Engine, best: list[tuple[int, float]]) -> None:
    pytest.importorskip("llama_index.core")
    from llama_index.core.schema import NodeWithScore, TextNode

    from npu_proxy.compat.llama_index import NpuProxyEmbedding, NpuProxyRerank

    made: Any = NpuProxyEmbedding(MODEL)
    assert close(made.get_text_embedding_batch(TEXTS), engine.embed(TEXTS, input_type="document"))
    assert close(made.get_query_embedding("the cat"), engine.embed(["the cat"], input_type="query")[0])
    assert close(asyncio.run(made.aget_query_embedding("the cat")), made.get_query_embedding("the cat"))
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in TEXTS]
    reranker: Any = NpuProxyRerank(RERANKER, top_n=2)
    kept = reranker.postprocess_nodes(nodes, query_str="the cat")
    assert [(one.node.get_content(), one.score) for one in kept] == [(TEXTS[n], pytest.approx(score)) for n, score in best]


def test_haystack(engine: Engine, best: list[tuple[int, float]]) -> None:
    pytest.importorskip("haystack")
    from haystack import Document, Pipeline

    from npu_proxy.compat.haystack import NpuProxyDocumentEmbedder, NpuProxyRanker, NpuProxyTextEmbedder

    documents = [Document(content=text, meta={"title": "one"}) for text in TEXTS]
    pipeline = Pipeline()
    pipeline.add_component("query", NpuProxyTextEmbedder(MODEL))
    again = Pipeline.loads(pipeline.dumps(), allowed_modules=["npu_proxy.*"])
    found = again.run({"query": {"text": "the cat"}})["query"]
    assert close(found["embedding"], engine.embed(["the cat"], input_type="query")[0])
    made = NpuProxyDocumentEmbedder(MODEL, meta_fields_to_embed=["title"]).run(documents)["documents"]
    assert close([document.embedding for document in made], engine.embed([f"one\n{text}" for text in TEXTS], input_type="document"))
    assert documents[0].embedding is None
    kept = NpuProxyRanker(RERANKER).run("the cat", documents, top_k=2)["documents"]
    assert [(one.content, one.score) for one in kept] == [(TEXTS[n], pytest.approx(score)) for n, score in best]
    with pytest.raises(TypeError, match="expects a string"):
        NpuProxyTextEmbedder(MODEL).run(documents)  # type: ignore[arg-type]


def test_chroma(engine: Engine) -> None:
    chromadb = pytest.importorskip("chromadb")
    from npu_proxy.compat.chroma import NpuProxyEmbeddingFunction

    made = NpuProxyEmbeddingFunction(MODEL)
    assert close(made(TEXTS), engine.embed(TEXTS, input_type="document"))
    client = chromadb.EphemeralClient()
    collection = client.create_collection("texts", embedding_function=made)
    collection.add(ids=["1", "2", "3"], documents=TEXTS)
    found = collection.query(query_texts=["the cat sleeps"], n_results=3)
    assert len(found["ids"][0]) == 3
    assert client.get_collection("texts").query(query_texts=["sea"], n_results=3)["ids"][
        0
    ]  # the function comes with the collection


def test_lancedb(engine: Engine, tmp_path: Path) -> None:
    lancedb = pytest.importorskip("lancedb")
    from lancedb.embeddings import get_registry
    from lancedb.pydantic import LanceModel, Vector

    import npu_proxy.compat.lancedb  # noqa: F401 (registers it)

    function = get_registry().get("npu-proxy").create(name=MODEL)

    class Row(LanceModel):
        text: str = function.SourceField()
        vector: Vector(function.ndims()) = function.VectorField()  # type: ignore[valid-type]

    table = lancedb.connect(tmp_path).create_table("texts", schema=Row)
    table.add([{"text": text} for text in TEXTS])
    assert close(table.to_arrow()["vector"].to_pylist(), engine.embed(TEXTS, input_type="document"))
    assert len(table.search("the cat").limit(2).to_list()) == 2
