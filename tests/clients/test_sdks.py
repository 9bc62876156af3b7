"""The Python clients people use, unpatched and set up as their documents say, against a running server with the real model.

Run by `make clients`. Vectors are held against the reference of sentence-transformers, not only their shapes.
"""

import asyncio
import base64
import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Server

installed = pytest.importorskip("litellm", reason="these clients live in .venv-clients; `make clients` runs them")

TOKENIZERS = Path(installed.__file__).parent / "litellm_core_utils" / "tokenizers"
MODEL = "text-embedding-3-small"
SOME = [0, 1, 2, 150, 299]
Reference = tuple[list[dict], np.ndarray]
Check = Callable[..., None]
unclosed = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # clients without a way to close them
litellm_types = pytest.mark.filterwarnings("ignore:Items? .* on TypedDict class:UserWarning")


@pytest.fixture(scope="module")
def url(many_names: Server) -> str:
    """Where the server is; what these clients read from variables is set before they are imported."""
    os.environ["TIKTOKEN_CACHE_DIR"] = str(TOKENIZERS)
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    os.environ["CHROMA_OPENAI_API_KEY"] = os.environ["CHROMA_COHERE_API_KEY"] = "unused"
    os.environ["CO_API_URL"] = many_names.url
    return many_names.url


@pytest.fixture(scope="module")
def every(reference: Reference) -> list[str]:
    return [row["text"] for row in reference[0]]


@pytest.fixture(scope="module")
def texts(every: list[str]) -> list[str]:
    return [every[index] for index in SOME]


@pytest.fixture(scope="module")
def check(reference: Reference) -> Check:
    """Holds vectors against the reference rows ``at``."""

    def held(found: Any, at: Sequence[int] = SOME, least: float = 0.99999, *, unit: bool = True) -> None:
        found = np.asarray(found, np.float32)
        wanted = reference[1][list(at)][:, : found.shape[1]]
        assert found.shape == wanted.shape
        lengths = np.linalg.norm(found, axis=1)
        cosines = (found * wanted).sum(1) / lengths / np.linalg.norm(wanted, axis=1)
        assert cosines.min() >= least
        if unit:
            np.testing.assert_allclose(lengths, 1, atol=1e-3)

    return held


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    gc.collect()


def unpacked(coded: Iterable[Any]) -> list[np.ndarray]:
    return [np.frombuffer(base64.b64decode(vector), "<f4") for vector in coded]


# -- OpenAI ----------------------------------------------------------------------------------------------------------


def test_openai(url: str, texts: list[str], every: list[str], check: Check) -> None:
    from openai import BadRequestError, NotFoundError, OpenAI

    with OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:

        def embed(given: str | list[str] = texts, **more: Any) -> list[Any]:
            return [entry.embedding for entry in client.embeddings.create(model=MODEL, input=given, **more).data]

        check(embed())
        check(embed(encoding_format="float"))
        check(unpacked(embed(encoding_format="base64")))
        check(embed(dimensions=256))
        check(embed(texts[0]), at=[0])
        check(embed(every), at=range(len(every)))
        assert {MODEL, "sentence-transformers/all-MiniLM-L6-v2"} <= {model.id for model in client.models.list()}
        assert client.models.retrieve(MODEL).id == MODEL
        with pytest.raises(NotFoundError) as error:
            client.embeddings.create(model="no-such", input="x")
        assert error.value.code == "model_not_found"
        with pytest.raises(BadRequestError):
            client.embeddings.create(model=MODEL, input=[])


def test_openai_async(url: str, texts: list[str], check: Check) -> None:
    from openai import AsyncOpenAI

    async def run() -> Any:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="unused") as client:
            return await asyncio.gather(*(client.embeddings.create(model=MODEL, input=text) for text in texts))

    check([response.data[0].embedding for response in asyncio.run(run())])


# -- Ollama ----------------------------------------------------------------------------------------------------------


def test_ollama(url: str, texts: list[str], check: Check) -> None:
    from ollama import Client, ResponseError

    with Client(host=url) as client:
        check(client.embed(model="all-minilm", input=texts).embeddings)
        more = {"dimensions": 128, "truncate": True, "keep_alive": "5m", "options": {"num_ctx": 256}}
        check(client.embed(model="all-minilm", input=texts, **more).embeddings)
        check([client.embeddings(model="all-minilm", prompt=text).embedding for text in texts], unit=False)
        assert client.list().models[0].model == client.ps().models[0].model == "all-minilm:latest"
        assert client.show("all-minilm").capabilities == ["embedding"]
        with pytest.raises(ResponseError, match="try pulling it first"):
            client.embed("no-such", "x")
        with pytest.raises(ResponseError) as error:
            client.pull("all-minilm")
        assert error.value.status_code == 403


def test_ollama_async(url: str, texts: list[str], check: Check) -> None:
    from ollama import AsyncClient

    async def run() -> Any:
        async with AsyncClient(host=url) as client:
            return (await client.embed(model="all-minilm", input=texts)).embeddings

    check(asyncio.run(run()))


# -- Cohere ----------------------------------------------------------------------------------------------------------

COHERE = {"model": "embed-english-v3.0", "input_type": "search_document"}


def test_cohere_v2(url: str, texts: list[str], every: list[str], check: Check) -> None:
    import cohere

    with cohere.ClientV2(api_key="unused", base_url=url) as client:

        def embed(kind: str = "float", given: list[str] = texts, **more: Any) -> Any:
            made = client.embed(**COHERE, texts=given, embedding_types=[kind], **more).embeddings
            return getattr(made, "float_" if kind == "float" else kind)

        check(embed())
        check(embed(output_dimension=256))
        check(unpacked(embed("base64")))
        check(embed("int8"), least=0.99, unit=False)
        check(embed(given=every), at=range(len(every)))
        assert [np.shape(embed(kind)) for kind in ("uint8", "binary", "ubinary")] == [(5, 384), (5, 48), (5, 48)]
        parts = [{"content": [{"type": "text", "text": text}]} for text in texts]
        check(client.embed(**COHERE, embedding_types=["float"], inputs=parts).embeddings.float_)
        with pytest.raises(cohere.NotFoundError):
            client.embed(model="no-such", texts=["x"], input_type="search_query", embedding_types=["float"])
        with pytest.raises(cohere.BadRequestError, match="no documents"):
            client.rerank(model="embed-english-v3.0", query="q", documents=[])


@pytest.mark.filterwarnings(  # cohere's own code
    "ignore:Accessing the 'model_fields' attribute on the instance:DeprecationWarning",
    "ignore:The `parse_obj` method is deprecated:DeprecationWarning",
)
def test_cohere_v1_in_batches(url: str, texts: list[str], every: list[str], check: Check) -> None:
    import cohere

    with cohere.Client(api_key="unused", base_url=url) as client:
        check(client.embed(**COHERE, texts=every, truncate="END").embeddings, at=range(len(every)))
        check(client.embed(**COHERE, texts=every, batching=False).embeddings, at=range(len(every)))
        check(client.embed(**COHERE, texts=every, embedding_types=["float"]).embeddings.float_, at=range(len(every)))


# -- LangChain -------------------------------------------------------------------------------------------------------


def langchain(url: str, **more: Any) -> Any:
    from langchain_openai import OpenAIEmbeddings

    return OpenAIEmbeddings(model=MODEL, base_url=f"{url}/v1", api_key="unused", **more)


def test_langchain_openai_as_it_comes_sends_ids_of_cl100k(url: str, every: list[str], check: Check, reference: Reference) -> None:
    embedder = langchain(url)
    # 36 is longer than LangChain sends at once: it averages the parts itself.
    whole = [index for index in range(len(every)) if index != 36]
    check(embedder.embed_documents([every[index] for index in whole]), at=whole)
    text = langchain(url, check_embedding_ctx_length=False)
    for query in ("hello world", "a dog", every[0]):
        assert np.dot(embedder.embed_query(query), text.embed_query(query)) > 0.99999


def test_langchain_openai_sending_texts(url: str, texts: list[str], every: list[str], check: Check) -> None:
    embedder = langchain(url, check_embedding_ctx_length=False)
    check(embedder.embed_documents(texts))
    check([embedder.embed_query(texts[0])], at=[0])
    check(embedder.embed_documents(every), at=range(len(every)))
    check(langchain(url, check_embedding_ctx_length=False, dimensions=256).embed_documents(texts))


@unclosed
def test_langchain_ollama(url: str, texts: list[str], check: Check) -> None:
    from langchain_core.vectorstores import InMemoryVectorStore
    from langchain_ollama import OllamaEmbeddings

    for name in ("all-minilm", MODEL):
        embedder = OllamaEmbeddings(model=name, base_url=url, validate_model_on_init=True)
        check(embedder.embed_documents(texts))
    check([embedder.embed_query(texts[0])], at=[0])
    check(asyncio.run(embedder.aembed_documents(texts)))
    store = InMemoryVectorStore(embedder)
    store.add_texts(texts)
    assert store.similarity_search(texts[2], k=1)[0].page_content == texts[2]


# -- LlamaIndex ------------------------------------------------------------------------------------------------------


@unclosed
@pytest.mark.parametrize("kind", ["openai", "openai-ada", "openai-like", "ollama", "tei"])
def test_llama_index(url: str, texts: list[str], check: Check, kind: str) -> None:
    from llama_index.embeddings.ollama import OllamaEmbedding
    from llama_index.embeddings.openai import OpenAIEmbedding
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding
    from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

    v1 = {"api_base": f"{url}/v1", "api_key": "unused"}
    embedder = {
        "openai": lambda: OpenAIEmbedding(model=MODEL, **v1),
        "openai-ada": lambda: OpenAIEmbedding(**v1),
        "openai-like": lambda: OpenAILikeEmbedding(model_name="all-minilm", **v1),
        "ollama": lambda: OllamaEmbedding(model_name="all-minilm", base_url=url),
        "tei": lambda: TextEmbeddingsInference(model_name="sentence-transformers/all-MiniLM-L6-v2", base_url=url),
    }[kind]()
    check(embedder.get_text_embedding_batch(texts))
    check([embedder.get_query_embedding(texts[0])], at=[0])
    if kind in ("ollama", "tei"):
        check(asyncio.run(embedder.aget_text_embedding_batch(texts)))


# -- Hugging Face ----------------------------------------------------------------------------------------------------


def test_huggingface_hub(url: str, texts: list[str], check: Check, reference: Reference) -> None:
    from huggingface_hub import AsyncInferenceClient, InferenceClient

    client = InferenceClient(base_url=url)
    check(client.feature_extraction(texts))
    check(client.feature_extraction(texts[0]), at=[0])
    check(client.feature_extraction(texts, dimensions=256))
    check(client.feature_extraction(texts, normalize=True, truncate=True, truncation_direction="right"))
    check(client.feature_extraction(texts, normalize=False), unit=False)
    check(client.feature_extraction(texts, model=f"{url}/embed"))
    wanted = reference[1][SOME[1:]] @ reference[1][SOME[0]]
    np.testing.assert_allclose(client.sentence_similarity(texts[0], texts[1:]), wanted, atol=1e-4)
    hosted = InferenceClient(model=url, provider="hf-inference")
    assert hosted.get_endpoint_info()["model_id"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert hosted.health_check()

    async def run() -> Any:
        async with AsyncInferenceClient(base_url=url) as later:
            return await later.feature_extraction(texts), await later.sentence_similarity(texts[0], texts[1:])

    vectors, cosines = asyncio.run(run())
    check(vectors)
    np.testing.assert_allclose(cosines, wanted, atol=1e-4)


# -- LiteLLM ---------------------------------------------------------------------------------------------------------

LITELLM = {
    "openai": {"model": f"openai/{MODEL}", "api_base": "/v1"},
    "openai, narrow": {"model": f"openai/{MODEL}", "api_base": "/v1", "dimensions": 256},
    "hosted_vllm": {"model": "hosted_vllm/all-minilm", "api_base": "/v1"},
    "ollama": {"model": "ollama/all-minilm", "api_base": ""},
    "huggingface": {"model": "huggingface/all-minilm", "api_base": "/embed", "input_type": "embed"},
    "huggingface, root": {"model": "huggingface/all-minilm", "api_base": "", "input_type": "feature-extraction"},
    "cohere v1": {"model": "cohere/embed-english-v3.0", "api_base": "/v1/embed", "input_type": "search_document"},
    "cohere v2": {"model": "cohere/embed-english-v3.0", "api_base": "/v2/embed", "input_type": "search_document"},
    "infinity": {"model": "infinity/all-minilm", "api_base": ""},
}


@unclosed
@litellm_types
@pytest.mark.parametrize("kind", LITELLM)
def test_litellm(url: str, texts: list[str], check: Check, kind: str) -> None:
    import litellm

    given = {**LITELLM[kind], "api_base": url + LITELLM[kind]["api_base"], "api_key": "unused", "input": texts}
    check([entry["embedding"] for entry in litellm.embedding(**given).data])

    async def run() -> Any:
        return await litellm.aembedding(**given)

    check([entry["embedding"] for entry in asyncio.run(run()).data])


@unclosed
@litellm_types
@pytest.mark.parametrize("name", ["cohere", "infinity", "hosted_vllm", "jina_ai"])
def test_litellm_ranks_by_cosine_if_there_is_only_an_embedding_model(url: str, reference: Reference, name: str) -> None:
    import litellm

    texts, base = [row["text"] for row in reference[0][:4]], f"{url}/infinity" if name == "infinity" else url
    given: dict[str, Any] = {"model": f"{name}/all-minilm", "query": texts[0], "documents": texts[1:], "api_base": base}
    reply = litellm.rerank(**given, api_key="unused", num_retries=0)
    wanted = reference[1][1:4] @ reference[1][0]
    found = {rank["index"]: rank["relevance_score"] for rank in reply.results}
    assert found == pytest.approx(dict(enumerate(wanted.tolist())), abs=1e-4)
    assert [rank["index"] for rank in reply.results] == np.argsort(-wanted).tolist()


@unclosed
@litellm_types
def test_litellm_is_told_that_the_model_has_no_head_for_reranking(url: str) -> None:
    import litellm

    with pytest.raises((litellm.exceptions.APIError, litellm.BadRequestError), match="no head"):
        litellm.rerank(model="huggingface/all-minilm", query="q", documents=["a"], api_key="unused", api_base=url, num_retries=0)


# -- vector stores ---------------------------------------------------------------------------------------------------


@unclosed
@pytest.mark.parametrize("kind", ["openai", "openai-narrow", "ollama", "ollama-default", "hf", "cohere"])
def test_chromadb(url: str, texts: list[str], every: list[str], check: Check, kind: str) -> None:
    import chromadb
    from chromadb.config import Settings
    from chromadb.utils import embedding_functions as functions

    function = {
        "openai": lambda: functions.OpenAIEmbeddingFunction(api_base=f"{url}/v1"),
        "openai-narrow": lambda: functions.OpenAIEmbeddingFunction(api_base=f"{url}/v1", model_name=MODEL, dimensions=256),
        "ollama": lambda: functions.OllamaEmbeddingFunction(url=url, model_name="all-minilm"),
        "ollama-default": lambda: functions.OllamaEmbeddingFunction(url=url),
        "hf": lambda: functions.HuggingFaceEmbeddingServer(url=f"{url}/embed"),
        "cohere": lambda: functions.CohereEmbeddingFunction(model_name="embed-english-v3.0"),
    }[kind]()
    check(function(texts))
    settings = Settings(anonymized_telemetry=False)
    collection = chromadb.EphemeralClient(settings=settings).create_collection(f"of-{kind}", embedding_function=function)
    collection.add(ids=[str(number) for number in range(100)], documents=every[:100])
    found = collection.query(query_texts=[every[7], every[42]], n_results=3)
    assert [documents[0] for documents in found["documents"]] == [every[7], every[42]]
    assert found["distances"][0][0] < 1e-5


def test_qdrant_takes_the_vectors_of_the_openai_client(url: str, every: list[str]) -> None:
    """Qdrant's own hooks embed in this process (fastembed) or in its cloud; none asks a server of the user's."""
    from openai import OpenAI
    from qdrant_client import QdrantClient, models

    with OpenAI(base_url=f"{url}/v1", api_key="unused") as client:
        vectors = [entry.embedding for entry in client.embeddings.create(model=MODEL, input=every[:100]).data]
    store = QdrantClient(":memory:")
    store.create_collection("texts", vectors_config=models.VectorParams(size=384, distance=models.Distance.COSINE))
    points = [
        models.PointStruct(id=number, vector=vector, payload={"text": every[number]}) for number, vector in enumerate(vectors)
    ]
    store.upsert("texts", points)
    hit = store.query_points("texts", query=vectors[7], limit=1).points[0]
    assert (hit.id, hit.payload["text"]) == (7, every[7])
    assert hit.score > 0.99999
    store.close()
