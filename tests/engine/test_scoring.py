"""Rerank, classify, similarity and long texts: as functions, through an engine, and by a real model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from conftest import GOLDEN
from npu_proxy import (
    Chunking,
    EmbedRequest,
    EmptyInputError,
    Engine,
    InputError,
    OutputType,
    Pair,
    Pooling,
    Settings,
    UnsupportedError,
)
from npu_proxy.engine.scoring import rerank_requests, rerank_results, sigmoid
from npu_proxy.engine.similarity import max_sim, similarity
from npu_proxy.types import Truncate

CPU = Settings(device="cpu")
QUERY, DOCUMENTS = "the cat", ["the cat sleeps", "sea sea sea", "x", "the red cat eats fast"]


def engine(name: str, **settings: Any) -> Engine:
    return Engine(GOLDEN / name, settings=Settings(device="cpu", **settings))


def test_a_cross_encoder_ranks_by_its_logits() -> None:
    with engine("bert_rerank") as ranker:
        pairs = [Pair(QUERY, document) for document in DOCUMENTS]
        logits = np.asarray(ranker.submit(EmbedRequest(texts=pairs, output_type=OutputType.SCORES)).result().embeddings)[:, 0]
        raw = ranker.rerank(QUERY, DOCUMENTS, raw=True)
        assert [result.index for result in raw] == np.argsort(-logits).tolist()
        np.testing.assert_allclose([result.score for result in raw], np.sort(logits)[::-1], atol=1e-6)
        best = ranker.rerank(QUERY, DOCUMENTS, top_n=2)
        assert [result.index for result in best] == [result.index for result in raw[:2]]
        np.testing.assert_allclose([result.score for result in best], 1 / (1 + np.exp(-np.sort(logits)[::-1][:2])), atol=1e-6)
        for wrong in (
            {"query": "", "documents": ["a"]},
            {"query": "a", "documents": []},
            {"query": "a", "documents": ["b"], "top_n": 0},
        ):
            texts = ranker.stats().counters.texts
            with pytest.raises(InputError):
                ranker.rerank(**wrong)
            assert ranker.stats().counters.texts == texts  # before anything is computed
        with pytest.raises(UnsupportedError, match="no head for dense vectors"):
            ranker.embed(["a"])


def test_late_interaction_ranks_by_the_best_token() -> None:
    folder = GOLDEN / "colbert"
    texts, stored = json.loads((folder / "texts.json").read_text()), np.load(folder / "answers.npz")
    expected = [float((stored["query0"] @ stored[str(index)].T).max(axis=1).sum()) for index in range(len(texts))]
    with engine("colbert") as ranker:
        found = ranker.rerank(texts[0], texts)
        assert [result.index for result in found] == np.argsort(-np.array(expected), kind="stable").tolist()
        np.testing.assert_allclose([result.score for result in found], np.sort(expected)[::-1], rtol=1e-4)


@pytest.mark.parametrize(("name", "several"), [("roberta_labels", False), ("distilbert_labels", True)])
def test_a_classifier_gives_labels_by_falling_score(name: str, several: bool) -> None:
    stored = json.loads((GOLDEN / name / "texts.json").read_text())
    logits = np.load(GOLDEN / name / "answers.npz")["single0"]
    with engine(name) as classifier:
        (found,) = classifier.classify(stored["texts"][:1])
        (raw,) = classifier.classify(stored["texts"][:1], raw=True, top_n=1)
    order = np.argsort(-logits)
    assert [label.label for label in found] == [f"LABEL_{index}" for index in order]
    scores = 1 / (1 + np.exp(-logits)) if several else np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose([label.score for label in found], scores[order], atol=1e-5)
    assert [label.label for label in raw] == [found[0].label]
    assert raw[0].score == pytest.approx(logits.max(), abs=1e-4)


def test_what_a_model_does_not_compute_is_refused_with_the_reason() -> None:
    with engine("mean") as dense:
        for call in (
            lambda: dense.rerank("a", ["b"]),
            lambda: dense.classify(["a"]),
            lambda: dense.embed_sparse(["a"]),
            lambda: dense.embed_tokens(["a"]),
        ):
            with pytest.raises(UnsupportedError, match="has no head for"):
                call()
        result = dense.submit(EmbedRequest(texts=["a", Pair("a", "b")])).result()
        assert isinstance(result.errors[1], UnsupportedError)
        assert result.errors[0] is None


@given(arrays.arrays(np.float32, (3, 5), elements=st.floats(-9, 9, width=32)))
def test_similarities_are_those_of_their_definitions(vectors: np.ndarray) -> None:
    exact = vectors.astype(np.float64)
    differences = exact[:, None] - exact[None]
    np.testing.assert_allclose(similarity(vectors, vectors, "dot"), exact @ exact.T, atol=1e-3)
    np.testing.assert_allclose(similarity(vectors, vectors, "euclidean"), -np.sqrt((differences**2).sum(-1)), atol=1e-4)
    np.testing.assert_allclose(similarity(vectors, vectors, "manhattan"), -np.abs(differences).sum(-1), atol=1e-4)
    assert (np.abs(similarity(vectors, vectors, "cosine")) <= 1 + 1e-5).all()


def test_numbers_at_the_ends() -> None:
    np.testing.assert_array_equal(sigmoid(np.array([-1e30, 0, 1e30], np.float32)), [0, 0.5, 1])
    assert max_sim(np.ones([2, 4], np.float32), np.zeros([0, 4], np.float32)) < -1e8


# -- long texts ----------------------------------------------------------------------------------------------------------

LONG = "the cat sleeps in the red house. " * 30


def test_a_long_text_is_the_mean_of_its_chunks_by_length() -> None:
    with engine("mean") as dense:
        request = EmbedRequest(texts=[LONG, "the cat"], truncate=Truncate.CHUNK, chunking=Chunking(overlap=5, spans=True))
        result = dense.submit(request).result().raise_first()
        assert list(result.truncated) == [False, False]
        chunks = result.chunks[0]
        assert len(chunks) > 3
        own = dense.embed([LONG[chunk.start : chunk.stop] for chunk in chunks])
        tokens = np.array([chunk.tokens for chunk in chunks], np.float64)[:, None]
        mean = (own * tokens).sum(axis=0)
        np.testing.assert_allclose(np.asarray(result.embeddings[0]), mean / np.linalg.norm(mean), atol=1e-5)
        np.testing.assert_allclose(np.asarray(result.embeddings[1]), dense.embed(["the cat"])[0], atol=1e-6)
        assert result.tokens[0] == tokens.sum()
        assert [chunk.stop for chunk in result.chunks[1]] == [7]
        assert dense.cache is not None
        before, batches = dense.cache.counts(), dense.stats().counters.batches
        for _ in range(2):
            kept = dense.embed([LONG], truncate="chunk", chunking=Chunking(overlap=5))[0]
            np.testing.assert_allclose(kept, np.asarray(result.embeddings[0]), atol=1e-6)
        after = dense.cache.counts()
        assert after.entries == before.entries + 1  # the whole text's vector, not those of its chunks
        assert after.hits["memory"] == before.hits["memory"] + 1
        assert dense.stats().counters.batches > batches
        with pytest.raises(InputError, match="overlap"):
            dense.embed([LONG], truncate="chunk", chunking=Chunking(overlap=500))


def test_late_chunks_are_pooled_from_tokens_that_saw_the_whole_text(tmp_path: Path) -> None:
    text = "the cat sleeps in the red house " * 5
    plain = shutil.copytree(GOLDEN / "mean", tmp_path / "plain", ignore=shutil.ignore_patterns("modules.json", "onnx"))
    with Engine(plain, settings=Settings(device="cpu", pooling=Pooling.NONE)) as tokens:
        every = tokens.embed_tokens([text], normalize=False)[0]
    with engine("mean") as dense:
        chunking = Chunking(late=True, size=32, spans=True)
        request = EmbedRequest(texts=[text, "the cat", LONG], truncate=Truncate.CHUNK, chunking=chunking)
        result = dense.submit(request).result().raise_first()
        first = result.chunks[0]
        assert [chunk.tokens for chunk in first] == [31, len(every) - 31]  # special tokens counted in
        for chunk, own in zip(first, (every[:31], every[31:]), strict=True):
            mean = own.mean(axis=0)
            np.testing.assert_allclose(chunk.vector, mean / np.linalg.norm(mean), atol=1e-5)
        assert text[first[1].start : first[1].stop].strip() == text[first[0].stop :].strip()
        np.testing.assert_allclose(np.asarray(result.embeddings[1]), dense.embed(["the cat"])[0], atol=1e-5)
        assert len(result.chunks[2]) > 3  # beyond the limit: window by window
        assert result.tokens[2] > dense.spec.max_length
        late, early = (dense.embed([text], truncate="chunk", chunking=Chunking(late=is_late, size=32)) for is_late in (True, False))
        assert not np.allclose(late, early, atol=1e-3)
        for wrong, message in ((Chunking(late=True, overlap=3), "overlap"), (Chunking(late=True, size=8), "at least")):
            with pytest.raises(InputError, match=message):
                dense.embed([text], truncate="chunk", chunking=wrong)
    with engine("mean", packing=False) as padded, pytest.raises(InputError, match="`packing`"):
        padded.embed([text], truncate="chunk", chunking=chunking)
    with engine("cls") as other, pytest.raises(InputError, match="mean or maximum"):
        other.embed([text], truncate="chunk", chunking=chunking)


def test_late_chunks_begin_where_the_request_says(tmp_path: Path) -> None:
    parts = ["the cat sleeps", "in the red", "house the cat sleeps in the sea"]
    text, boundaries = " ".join(parts), (len(parts[0]) + 1, len(parts[0]) + len(parts[1]) + 2)
    plain = shutil.copytree(GOLDEN / "mean", tmp_path / "plain", ignore=shutil.ignore_patterns("modules.json", "onnx"))
    with Engine(plain, settings=Settings(device="cpu", pooling=Pooling.NONE)) as tokens:
        every = tokens.embed_tokens([text], normalize=False)[0]
        counts = [len(vectors) - 2 for vectors in tokens.embed_tokens(parts, normalize=False)]
    ends = [0, counts[0] + 1, counts[0] + counts[1] + 1, len(every)]
    chunking = Chunking(late=True, spans=True, boundaries=boundaries)

    def asked(text: str, **more: Any) -> EmbedRequest:
        return EmbedRequest(texts=[text], truncate=Truncate.CHUNK, chunking=replace(chunking, **more))

    with engine("mean") as dense:
        (chunks,) = dense.submit(asked(text)).result().raise_first().chunks
        assert [text[chunk.start : chunk.stop].strip() for chunk in chunks] == parts
        for chunk, start, stop in zip(chunks, ends, ends[1:], strict=False):
            mean = every[start:stop].mean(axis=0)
            np.testing.assert_allclose(chunk.vector, mean / np.linalg.norm(mean), atol=1e-5)
        prompted = dense.submit(replace(asked(text), prompt="sea: ")).result().raise_first().chunks[0]
        assert [text[chunk.start : chunk.stop].strip() for chunk in prompted] == parts
        many = tuple(range(4, 4 * 8, 4))  # more chunks than a bin of the text's own length has segments
        assert len(dense.submit(asked("sea " * 8, boundaries=many)).result().raise_first().chunks[0]) == 8
        for wrong, error in (
            (asked("sea " * 5000), "5002 tokens"),
            (asked(text, boundaries=(5, 5)), "part 1 of the text has no tokens"),
            (asked("sea " * 9, boundaries=tuple(range(4, 4 * 9, 4))), "up to 8 chunks"),
        ):
            with pytest.raises(InputError, match=error):
                dense.submit(wrong).result().raise_first()


def test_a_limit_on_documents_leaves_the_query_alone() -> None:
    query, documents = QUERY, [LONG, "the cat"]
    with engine("bert_rerank") as ranker:

        def scores(**options: Any) -> dict[int, float]:
            requests = rerank_requests(ranker.spec, query, documents, **options)
            ranked = rerank_results(ranker.spec, [ranker.submit(request).result() for request in requests], raw=True)
            return {result.index: result.score for result in ranked}

        words = " ".join(LONG.split()[:5])
        wanted = {result.index: result.score for result in ranker.rerank(query, [words, "the cat"], raw=True)}
        found = scores(max_document_tokens=5)
        assert found == pytest.approx(wanted, abs=1e-5)
        assert scores(max_document_tokens=1000) == pytest.approx(scores(), abs=1e-6)
        with pytest.raises(InputError, match="5"):
            scores(max_document_tokens=5, truncate=Truncate.ERROR)


def test_a_pair_without_a_letter_and_with_half_an_emoji_fails_alone() -> None:
    pairs = [Pair("\ud83d", "\ud83d"), Pair("", "\ud83d"), Pair("\ud83d", "b"), Pair("\0", " "), Pair("a", "b")]
    request = EmbedRequest(texts=pairs, output_type=OutputType.SCORES)
    for sanitize, wrong in (
        ("none", [InputError, InputError, InputError, EmptyInputError, NoneType]),
        ("basic", [EmptyInputError, EmptyInputError, NoneType, EmptyInputError, NoneType]),
    ):
        with engine("bert_rerank", sanitize=sanitize) as ranker:
            assert list(map(type, ranker.submit(request).result().errors)) == wrong


@pytest.mark.parametrize("name", ["bert_rerank", "colbert"])
def test_an_empty_document_has_a_score_like_any_other(name: str) -> None:
    with engine(name) as ranker:
        ranked = ranker.rerank(QUERY, ["the cat", "", "  "])
        assert sorted(result.index for result in ranked) == [0, 1, 2]
        assert all(np.isfinite(result.score) for result in ranked)


def test_a_ranker_takes_the_best_chunk() -> None:
    with engine("bert_rerank") as ranker:
        request = EmbedRequest(
            texts=[Pair(QUERY, LONG + "sea moon star " * 9)],
            output_type=OutputType.SCORES,
            truncate=Truncate.CHUNK,
            chunking=Chunking(spans=True),
        )
        result = ranker.submit(request).result().raise_first()
        best = max(float(chunk.vector[0]) for chunk in result.chunks[0])
        assert float(result.embeddings[0][0]) == best
        assert len(result.chunks[0]) > 3
        assert list(result.truncated) == [False]
        long = ranker.submit(
            EmbedRequest(texts=[Pair(LONG, LONG)], output_type=OutputType.SCORES, truncate=Truncate.CHUNK)
        ).result()
        assert list(long.truncated) == [True]  # the first of a pair is cut, and it says so
        found = ranker.rerank(QUERY, [LONG], truncate="chunk", raw=True)
        cut = ranker.rerank(QUERY, [LONG], raw=True)
        assert found[0].score >= cut[0].score - 1e-4


def test_prompts_by_type_by_text_and_by_instruction() -> None:
    with engine("mean") as dense:
        named = dense.embed(["cat"], prompt_name="query")
        np.testing.assert_array_equal(dense.embed(["cat"], prompt="one two "), named)
        np.testing.assert_array_equal(dense.embed(["cat"], input_type="query"), named)
        np.testing.assert_array_equal(dense.embed(["one two cat"]), named)
        np.testing.assert_array_equal(dense.embed(["cat"], input_type="clustering"), dense.embed(["cat"]))
        with pytest.raises(InputError, match="takes no instructions"):
            dense.embed(["cat"], instruction="find")
        with pytest.raises(InputError, match="both set the prompt"):
            dense.embed(["cat"], prompt="a", prompt_name="query")


def test_token_and_sparse_vectors_come_back_from_the_cache() -> None:
    for name in ("colbert", "bert_splade"):
        with engine(name) as model:
            is_late = model.spec.output_type is OutputType.TOKENS
            embed = model.embed_tokens if is_late else model.embed_sparse
            first, again = embed(["the cat sleeps", "x"]), embed(["the cat sleeps", "x"])
            for computed, cached in zip(first, again, strict=True):
                np.testing.assert_array_equal(np.asarray(computed), np.asarray(cached))
            assert model.stats().counters.texts == 2


@pytest.mark.parametrize(
    ("prompt", "task", "whole"),
    [
        ("Instruct: two three\nQuery:", "red house", "Instruct: red house\nQuery:"),
        ("task: two three | query: ", "red house", "task: red house | query: "),
    ],
)
def test_an_instruction_replaces_the_task_in_the_models_own_prompt(tmp_path: Path, prompt: str, task: str, whole: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "qwen3_last", folder)
    file = folder / "config_sentence_transformers.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prompts": {"query": prompt, "document": ""}}))
    with Engine(folder, "cpu") as decoder:
        told = decoder.embed(["the cat"], instruction=task)
        np.testing.assert_array_equal(told, decoder.embed([f"{whole}the cat"]))
        assert (told != decoder.embed(["the cat"], input_type="query")).any()


def test_a_request_takes_words_and_refuses_what_it_would_ignore() -> None:
    with engine("mean") as dense:
        limit = dense.spec.max_length
        for word in ("start", "end", "chunk"):
            request = EmbedRequest(texts=[LONG], truncate=word)  # pyright: ignore[reportArgumentType] - words become members
            result = dense.submit(request).result().raise_first()
            np.testing.assert_allclose(np.asarray(result.embeddings), dense.embed([LONG], truncate=Truncate(word)), atol=1e-6)
            assert (result.tokens[0] > limit) == (word == "chunk")
        for wrong, message in (
            ({"truncate": "nonsense"}, "error, end, start, chunk"),
            ({"lane": "fast"}, "interactive, bulk"),
            ({"max_tokens": 0}, "at least 1"),
            ({"chunking": Chunking(late=True)}, "`truncate` is `chunk`"),
            ({"texts": "one"}, "list"),
        ):
            with pytest.raises(InputError, match=message):
                EmbedRequest(**{"texts": ["a"], **wrong})
        with pytest.raises(InputError, match="unknown option `foo`"):
            dense.embed(["a"], foo=1)  # pyright: ignore[reportCallIssue]
        with pytest.raises(InputError, match="unknown option `output_type`"):
            dense.embed(["a"], output_type="sparse")  # pyright: ignore[reportCallIssue]
        for size in (0, -1):
            with pytest.raises(InputError, match="`size`"):
                dense.embed([LONG], truncate="chunk", chunking=Chunking(size=size))
    with engine("bert_rerank") as ranker:
        with pytest.raises(InputError, match="list"):
            ranker.rerank("q", "abc")
        with pytest.raises(InputError, match="unknown option `prompt`"):
            ranker.rerank("q", ["a"], prompt="x")
        with pytest.raises(InputError, match="late chunking"):
            ranker.rerank("q", [LONG], truncate="chunk", chunking=Chunking(late=True))


def test_chunks_end_between_words_and_are_as_long_as_the_vector_asked_for() -> None:
    text = "sleepers runners " * 60
    with engine("mean") as dense:
        for chunking in (Chunking(spans=True, size=33), Chunking(spans=True, late=True, size=33)):
            request = EmbedRequest(texts=[text], truncate=Truncate.CHUNK, chunking=chunking, dimensions=16)
            chunks = dense.submit(request).result().raise_first().chunks[0]
            assert all(chunk.vector.shape == (16,) for chunk in chunks)
            np.testing.assert_allclose([np.linalg.norm(chunk.vector) for chunk in chunks], 1, atol=1e-5)
            assert max(chunk.tokens for chunk in chunks) <= 33
            assert all(text[chunk.stop - 1 : chunk.stop + 1] in ("s ", "s") for chunk in chunks)


def test_chunks_of_a_classified_pair_are_averaged(tmp_path: Path) -> None:
    pair = Pair("the cat", LONG)
    with engine("deberta_nli") as classifier:
        request = EmbedRequest(texts=[pair], output_type=OutputType.SCORES, truncate=Truncate.CHUNK, chunking=Chunking(spans=True))
        result = classifier.submit(request).result().raise_first()
        chunks = result.chunks[0]
        share = np.array([chunk.tokens for chunk in chunks], np.float32) / sum(chunk.tokens for chunk in chunks)
        mean = share @ np.stack([chunk.vector for chunk in chunks])
        np.testing.assert_allclose(np.asarray(result.embeddings[0]), mean, atol=1e-5)


def test_a_decoder_is_scored_before_the_padding_that_ends_a_text(tmp_path: Path) -> None:
    """As transformers does, where the tokenizer ends texts with the padding token (Qwen3-Embedding's does)."""
    folder = Path(shutil.copytree(GOLDEN / "qwen3_rerank", tmp_path / "padded"))
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    end = tokenizer["model"]["vocab"]["[SEP]"]
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": end}))
    with Engine(folder, device="cpu") as engine:
        pairs = [Pair("the cat", "the cat sleeps"), Pair("sea", "sea " * 60)]
        found = engine.submit(EmbedRequest(texts=pairs, output_type=OutputType.SCORES)).result().raise_first()
        assert found.tokens[0] == len("the cat the cat sleeps".split())
    tokenizer["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with Engine(folder, device="cpu", settings=Settings(max_length=47)) as bare:
        expected = bare.submit(EmbedRequest(texts=pairs, output_type=OutputType.SCORES)).result().raise_first()
        np.testing.assert_allclose(np.asarray(found.embeddings), np.asarray(expected.embeddings), atol=1e-5)
