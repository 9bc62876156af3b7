"""Adapters of sentence-transformers, FastEmbed and Infinity, held to the libraries themselves where these are installed (`make compat`)."""
# ruff: noqa: E501 (tables of cases)

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import DATA, GOLDEN, golden, smallest_cosine
from npu_proxy import Engine, InputError, Settings
from npu_proxy.compat.fastembed import LateInteractionTextEmbedding, SparseTextEmbedding, TextCrossEncoder, TextEmbedding
from npu_proxy.compat.infinity import AsyncEmbeddingEngine, EngineArgs
from npu_proxy.compat.sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder

pytestmark = pytest.mark.filterwarnings("ignore")
TEXTS = ["the cat", "sea " * 70, "", "the dog sat"]
CPU: Any = {"device": "cpu"}


def peers(name: str) -> Any:
    return pytest.importorskip("sentence_transformers"), str(GOLDEN / name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize_embeddings": True},
        {"truncate_dim": 8},
        {"truncate_dim": 8, "normalize_embeddings": True},
        {"prompt": "one two "},
        {"precision": "ubinary"},
        {"precision": "binary"},
        {"batch_size": 1, "show_progress_bar": False},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"sentences": TEXTS},
    ],
    ids=str,
)
@pytest.mark.parametrize("model", ["mean", "dense", "cls"])
def test_sentence_transformer(model: str, options: dict[str, Any]) -> None:
    library, folder = peers(model)
    texts: Any = [] if "sentences" in options else [TEXTS]
    expected = library.SentenceTransformer(folder, **CPU).encode(*texts, **options)
    found = SentenceTransformer(folder, **CPU).encode(*texts, **options)
    assert type(found) is type(expected)
    if "precision" in options:
        assert found.dtype == expected.dtype
        assert (np.unpackbits(found.view(np.uint8)) == np.unpackbits(expected.view(np.uint8))).mean() > 0.99
    else:
        left, right = (np.stack([np.asarray(vector) for vector in vectors]) for vectors in (found, expected))
        assert left == pytest.approx(right, abs=2e-5)


def test_sentence_transformer_of_one_text_and_of_none() -> None:
    library, folder = peers("mean")
    theirs, ours = library.SentenceTransformer(folder, **CPU), SentenceTransformer(folder, **CPU)
    assert ours.encode("the cat") == pytest.approx(theirs.encode("the cat"), abs=2e-5)
    assert ours.encode([]).shape[0] == len(theirs.encode([])) == 0
    assert ours.get_sentence_embedding_dimension() == theirs.get_sentence_embedding_dimension()
    assert ours.max_seq_length == theirs.max_seq_length
    for verb in ("encode_query", "encode_document"):
        assert getattr(ours, verb)(["the cat"]) == pytest.approx(getattr(theirs, verb)(["the cat"]), abs=2e-5)
    vectors = theirs.encode(TEXTS)
    assert ours.similarity(vectors, vectors).numpy() == pytest.approx(theirs.similarity(vectors, vectors).numpy(), abs=1e-5)
    assert ours.similarity_pairwise(vectors, vectors[::-1]).numpy() == pytest.approx(
        theirs.similarity_pairwise(vectors, vectors[::-1].copy()).numpy(), abs=1e-5
    )
    with pytest.raises(ValueError, match="nosuch"):
        ours.encode(TEXTS, prompt_name="nosuch")


def test_what_is_not_obeyed_is_refused_by_name() -> None:
    folder = str(GOLDEN / "mean")
    cases: Any = (
        ({"device": "cuda"}, "device of torch's"),
        ({"revision": "main"}, "npu-proxy pull NAME --revision"),
        ({"model_kwargs": {"dtype": "float16"}}, "settings `precision` and `device`"),
        ({"frobnicate": 1}, "unknown argument `frobnicate`"),
    )
    for arguments, words in cases:
        with pytest.raises(InputError, match=words):
            SentenceTransformer(folder, **arguments)
    made = SentenceTransformer(folder, device="cpu", cache_folder="/nowhere", token=None)
    with pytest.raises(InputError, match="only sentence_embedding"):
        made.encode(["a"], output_value="token_embeddings")
    with pytest.raises(InputError, match="unknown argument `normalise`"):
        made.encode(["a"], normalise=True)
    with pytest.raises(InputError, match="`providers` is not supported"):
        TextEmbedding(folder, providers=["CUDAExecutionProvider"])
    with pytest.raises(InputError, match="setting `precision`"):
        EngineArgs.of(model_name_or_path=folder, dtype="float16")


@pytest.mark.slow
def test_multi_process_encoding() -> None:
    made = SentenceTransformer(str(GOLDEN / "mean"), **CPU)
    pool = made.start_multi_process_pool(["cpu", "cpu"])
    assert made.encode(TEXTS, pool=pool) == pytest.approx(made.encode(TEXTS), abs=2e-5)
    assert made.encode_multi_process(TEXTS, pool) == pytest.approx(made.encode(TEXTS), abs=2e-5)
    made.stop_multi_process_pool(pool)


@pytest.mark.parametrize("model", ["bert_rerank", "mpnet_rerank", "modernbert_rerank", "roberta_labels", "distilbert_labels"])
def test_cross_encoder(model: str) -> None:
    library, folder = peers(model)
    theirs, ours = library.CrossEncoder(folder, **CPU), CrossEncoder(folder, **CPU)
    pairs = [("the cat", "the cat sleeps"), ("sea", "the dog"), ("the", "sea " * 70)]
    cases: Any = (
        {},
        {"apply_softmax": True},
        {"convert_to_tensor": True},
        {"activation_fn": pytest.importorskip("torch").nn.Identity()},
    )
    for options in cases:
        expected, found = theirs.predict(pairs, **options), ours.predict(pairs, **options)
        assert type(found) is type(expected)
        assert np.asarray(found) == pytest.approx(np.asarray(expected), abs=2e-5)
    assert np.asarray(ours.predict(pairs[0])) == pytest.approx(np.asarray(theirs.predict(pairs[0])), abs=2e-5)
    documents = [document for _, document in pairs]
    if theirs.num_labels == 1:
        expected, found = (made.rank("the cat", documents, top_k=2, return_documents=True) for made in (theirs, ours))
        assert [(one["corpus_id"], one["text"]) for one in found] == [(one["corpus_id"], one["text"]) for one in expected]
        assert [one["score"] for one in found] == pytest.approx([one["score"] for one in expected], abs=2e-5)
    else:
        with pytest.raises(ValueError, match="num_labels=1"):
            ours.rank("the cat", documents)


@pytest.mark.parametrize("model", ["bert_splade", "distilbert_splade", "modernbert_splade"])
def test_sparse_encoder(model: str) -> None:
    library, folder = peers(model)
    theirs, ours = library.SparseEncoder(folder, **CPU), SparseEncoder(folder, **CPU)
    cases: Any = ({}, {"convert_to_sparse_tensor": False}, {"max_active_dims": 3})
    for options in cases:
        expected, found = theirs.encode(TEXTS[:2], **options), ours.encode(TEXTS[:2], **options)
        assert found.is_sparse == expected.is_sparse
        left, right = (one.to_dense().numpy() if one.is_sparse else one.numpy() for one in (found, expected))
        assert left == pytest.approx(right, abs=2e-5)
    vectors = theirs.encode(TEXTS[:2])
    assert ours.similarity(vectors, vectors).numpy() == pytest.approx(
        theirs.similarity(vectors, vectors).to_dense().numpy(), abs=1e-4
    )
    assert ours.sparsity(vectors)["active_dims"] == pytest.approx(theirs.sparsity(vectors)["active_dims"])
    assert [token for token, _ in ours.decode(vectors[0], top_k=3)] == [token for token, _ in theirs.decode(vectors[0], top_k=3)]


# -- FastEmbed and Infinity: their models cannot be had here, so they are held to the engine ------------------------------


def test_fastembed_classes() -> None:
    folder, texts, expected = golden("mean")
    made = TextEmbedding(str(folder))
    assert smallest_cosine(np.stack(list(made.embed(texts))), expected) > 0.99999
    assert next(iter(made.embed("the cat"))).shape == (32,)
    assert made.embedding_size == 32
    assert np.stack(list(made.query_embed(["the cat"]))) == pytest.approx(np.stack(list(made.passage_embed(["the cat"]))))
    assert made.token_count(["the cat"]) == 4
    with Engine(GOLDEN / "bert_splade") as engine:
        vector = engine.embed_sparse(["the cat"])[0]
    sparse = next(iter(SparseTextEmbedding(str(GOLDEN / "bert_splade")).embed(["the cat"])))
    assert sparse.as_dict() == pytest.approx(dict(zip(vector.indices.tolist(), vector.values.tolist(), strict=True)))
    tokens = LateInteractionTextEmbedding(str(GOLDEN / "colbert"))
    assert next(iter(tokens.embed(["the cat"]))).shape[1] == 16
    assert next(iter(tokens.query_embed("the cat"))).shape != next(iter(tokens.embed(["the cat"]))).shape
    with Engine(GOLDEN / "bert_rerank") as engine:
        raw = {one.index: one.score for one in engine.rerank("the cat", ["cat", "sea"], raw=True)}
    assert list(TextCrossEncoder(str(GOLDEN / "bert_rerank")).rerank("the cat", ["cat", "sea"])) == pytest.approx(
        [raw[0], raw[1]], abs=1e-6
    )


def test_fastembed_itself_has_the_same_names() -> None:
    fastembed = pytest.importorskip("fastembed")
    import inspect

    from fastembed.rerank.cross_encoder import TextCrossEncoder as Theirs

    for ours, theirs in (
        (TextEmbedding, fastembed.TextEmbedding),
        (SparseTextEmbedding, fastembed.SparseTextEmbedding),
        (LateInteractionTextEmbedding, fastembed.LateInteractionTextEmbedding),
        (TextCrossEncoder, Theirs),
    ):
        for verb in ("embed", "query_embed", "passage_embed", "rerank", "rerank_pairs"):
            if hasattr(theirs, verb):
                names = [list(inspect.signature(getattr(one, verb)).parameters)[:4] for one in (ours, theirs)]
                assert [name for name in names[0] if name != "others"] == [name for name in names[1] if name != "kwargs"], verb


@pytest.mark.slow
def test_fastembed_with_the_same_model(default_model: str) -> None:
    """FastEmbed cannot download here; the reference vectors of its ONNX model are those of sentence-transformers."""
    if not DATA.is_dir():
        pytest.skip("the reference data is not there; set TEST_DATA")
    rows = [json.loads(line) for line in (DATA / "reference_minilm.jsonl").read_text().split("\n") if line][:60]
    found = np.stack(list(TextEmbedding(default_model).embed([row["text"] for row in rows])))
    assert smallest_cosine(found, np.load(DATA / "reference_minilm.npy")[:60]) > 0.99999


def test_infinity_engine() -> None:
    import asyncio

    async def use() -> None:
        async with AsyncEmbeddingEngine.from_args(
            EngineArgs(model_name_or_path=str(GOLDEN / "mean"), settings=Settings(device="cpu"))
        ) as engine:
            assert engine.is_running
            assert engine.capabilities == {"embed"}
            vectors, tokens = await engine.embed(sentences=["the cat", "sea"])
            assert tokens == 7
            assert np.linalg.norm(vectors[0]) == pytest.approx(1, abs=1e-5)
        assert not engine.is_running
        async with AsyncEmbeddingEngine(str(GOLDEN / "bert_rerank"), engine="torch", model_warmup=False) as engine:
            ranking, _ = await engine.rerank(query="the cat", docs=["cat", "sea"], top_n=1)
            assert (len(ranking), ranking[0].document) == (1, ["cat", "sea"][ranking[0].index])
            assert engine.capabilities == {"rerank"}
        async with AsyncEmbeddingEngine(str(GOLDEN / "roberta_labels")) as engine:
            labels, _ = await engine.classify(sentences=["the cat"])
            assert labels[0][0]["score"] >= labels[0][1]["score"]

    asyncio.run(use())


def test_a_model_that_is_not_there_is_pulled(tmp_path: Path) -> None:
    mirror = tmp_path / "mirror" / "me" / "tiny"
    import shutil

    shutil.copytree(golden("mean")[0], mirror)
    settings = Settings(store=tmp_path / "store", mirrors=(str(tmp_path / "mirror"),))
    assert SentenceTransformer("me/tiny", settings=settings, **CPU).encode("the cat").shape == (32,)
    with pytest.raises(InputError, match="no/such"):
        SentenceTransformer("no/such", settings=settings, local_files_only=True)
