"""What clients in the field met: one path with several APIs, kinds of models, base paths, errors of single texts, ways in."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from kinds import CLASSIFIER, EMBEDDER, RERANKER, Kinds

from npu_proxy import EmbedRequest, OutputType, Pair

QUERY, DOCUMENTS = "a cat that sleeps", ["the cat sleeps in the red house", "the sea"]
RANKING = {"query": QUERY, "documents": DOCUMENTS}


@pytest.fixture(scope="module")
def kinds() -> Iterator[Kinds]:
    server = Kinds()
    yield server
    server.stop()


def embedded(kinds: Kinds, texts: list[str], **options: Any) -> np.ndarray:
    return np.asarray(kinds.engine(EMBEDDER).submit(EmbedRequest(texts=texts, **options)).result().raise_first().embeddings)


def scores(kinds: Kinds, documents: list[str] = DOCUMENTS, query: str = QUERY) -> np.ndarray:
    request = EmbedRequest(texts=[Pair(query, document) for document in documents], output_type=OutputType.SCORES)
    logits = np.asarray(kinds.engine(RERANKER).submit(request).result().raise_first().embeddings)[:, 0]
    return 1 / (1 + np.exp(-logits))


# -- one path, several APIs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v3/rerank", "/v1/reranks", "/vllm/rerank", "/v1/v1/rerank"])
def test_documents_come_back_as_objects_unless_they_are_not_wanted(kinds: Kinds, path: str) -> None:
    order = np.argsort(-scores(kinds))
    for more in ({}, {"return_documents": True}, {"return_documents": "true"}):
        ranked = kinds.post(path, {**RANKING, **more}).json()["results"]
        assert [rank["document"] for rank in ranked] == [{"text": DOCUMENTS[index]} for index in order]
    assert all("document" not in rank for rank in kinds.post(path, {**RANKING, "return_documents": False}).json()["results"])


def test_infinitys_client_gets_strings_and_coheres_second_version_gets_none(kinds: Kinds) -> None:
    asked = {**RANKING, "return_documents": True, "raw_scores": False, "model": "default/not-specified"}
    assert all(isinstance(rank["document"], str) for rank in kinds.post("/rerank", asked).json()["results"])
    below = kinds.post("/infinity/rerank", {**RANKING, "return_documents": True}).json()
    assert all(isinstance(rank["document"], str) for rank in below["results"])
    assert all("document" not in rank for rank in kinds.post("/v2/rerank", RANKING).json()["results"])


def test_a_named_embedding_model_ranks_by_cosine_and_no_name_takes_the_reranker(kinds: Kinds) -> None:
    query, documents = embedded(kinds, [QUERY], input_type="query"), embedded(kinds, DOCUMENTS, input_type="document")
    ranked = kinds.post("/v1/rerank", {**RANKING, "model": "embedder"}).json()
    assert {rank["index"]: rank["relevance_score"] for rank in ranked["results"]} == pytest.approx(
        dict(enumerate((documents @ query[0]).tolist())), abs=1e-5
    )
    assert kinds.post("/v1/rerank", RANKING).json()["model"] == RERANKER


@pytest.mark.parametrize("path", ["/", "/invocations"])
def test_hosted_models_follow_the_body_and_the_kind_of_the_model(kinds: Kinds, path: str) -> None:
    ranked = kinds.post(path, {"query": QUERY, "texts": DOCUMENTS}).json()
    assert {rank["index"]: rank["score"] for rank in ranked} == pytest.approx(dict(enumerate(scores(kinds).tolist())), abs=1e-5)
    np.testing.assert_allclose(kinds.post(path, {"inputs": DOCUMENTS}).json(), embedded(kinds, DOCUMENTS), atol=1e-5)
    labels = kinds.post(path, {"inputs": "the cat", "model": CLASSIFIER}).json()
    assert labels == kinds.post("/predict", {"inputs": "the cat"}).json()
    assert {label["label"] for label in labels} == {"LABEL_0", "LABEL_1", "LABEL_2"}


@pytest.mark.parametrize("name", [RERANKER, CLASSIFIER])
def test_a_server_with_one_kind_answers_for_it(name: str) -> None:
    from conftest import GOLDEN

    server = Kinds(model=(str(GOLDEN / name),), served_model_name=("other",))
    try:
        for path in ("/", "/invocations"):
            if name == RERANKER:
                assert {rank["index"] for rank in server.post(path, {"query": QUERY, "texts": DOCUMENTS}).json()} == {0, 1}
            else:
                assert len(server.post(path, {"inputs": "the cat"}).json()) == 3
                assert len(server.post(path, {"inputs": "the cat", "parameters": {}}).json()[0]) == 3
        kind = {RERANKER: "reranker", CLASSIFIER: "classifier"}[name]
        assert list(server.call("GET", "/info").json()["model_type"]) == [kind]
    finally:
        server.stop()


def test_a_list_of_one_text_is_a_single_text(kinds: Kinds) -> None:
    alone = kinds.post("/predict", {"inputs": ["the cat"]})
    assert alone.json() == kinds.post("/predict", {"inputs": "the cat"}).json()


# -- base paths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["/models/{}", "/openai/deployments/{}", "/v1/engines/{}"])
def test_every_route_answers_below_a_model(kinds: Kinds, base: str) -> None:
    assert list(kinds.call("GET", f"{base.format(RERANKER)}/info").json()["model_type"]) == ["reranker"]
    assert list(kinds.call("GET", f"{base.format('reranker')}/info").json()["model_type"]) == ["reranker"]  # a kind is a name
    assert list(kinds.call("GET", f"{base.format('classifier')}/info").json()["model_type"]) == ["classifier"]
    assert list(kinds.call("GET", f"{base.format('embedder')}/info").json()["model_type"]) == ["embedding"]
    ranked = kinds.post(f"{base.format('reranker')}/rerank", {"query": QUERY, "texts": DOCUMENTS, "return_text": True})
    assert {rank["index"] for rank in ranked.json()} == {0, 1}
    listed = kinds.call("GET", f"{base.format(CLASSIFIER)}/v1/models").json()["data"]
    assert [entry["id"] for entry in listed] == [CLASSIFIER]
    assert kinds.call("GET", f"{base.format(CLASSIFIER)}/health").status_code == 200
    assert kinds.post(f"{base.format('no-such')}/embed", {"inputs": "a"}).status_code == 404
    assert kinds.call("GET", f"{base.format('no-such')}/info").status_code == 404


def test_the_path_s_model_comes_before_the_body_s(kinds: Kinds) -> None:
    answer = kinds.post("/openai/deployments/embedder/embeddings?api-version=2024-10-21", {"input": "the cat", "model": "gpt"})
    assert (answer.status_code, answer.json()["model"]) == (200, "embedder")


def test_info_goes_by_kind_and_offers_what_fits(kinds: Kinds) -> None:
    first = kinds.call("GET", "/info").json()
    assert list(first["model_type"]) == ["embedding"]
    assert 32 <= first["max_client_batch_size"] <= 2048
    assert {"sha", "docker_label", "max_batch_requests", "tokenization_workers"} <= set(first)


# -- single texts that fail ----------------------------------------------------------------------------------------------


def test_an_empty_text_is_scored_unless_the_query_is_empty_too(kinds: Kinds) -> None:
    wanted = scores(kinds, ["the cat", ""])
    ranked = kinds.post("/rerank", {"query": QUERY, "texts": ["the cat", ""]}).json()
    assert {rank["index"]: rank["score"] for rank in ranked} == pytest.approx(dict(enumerate(wanted.tolist())), abs=1e-5)
    assert kinds.post("/rerank", {"query": "", "texts": ["the cat"]}).status_code == 200
    assert kinds.post("/rerank", {"query": "", "texts": ["the cat", ""]}).status_code == 400


def test_ollama_embeds_empty_texts_and_the_others_do_as_their_originals(kinds: Kinds) -> None:
    found = kinds.post("/api/embed", {"input": ["the cat", "", " "]}).json()["embeddings"]
    np.testing.assert_allclose(found, embedded(kinds, ["the cat", "", " "], on_empty="embed"), atol=1e-5)
    assert kinds.post("/v1/embeddings", {"input": ["the cat", ""]}).status_code == 400  # and not what another API has cached
    assert kinds.post("/embed", {"inputs": ["the cat", ""]}).status_code == 400
    assert kinds.post("/embed", {"inputs": ["the cat", " "]}).status_code == 200


ROUTES = [
    ("/v1/embeddings", "input", {}),
    ("/v1/embeddings", "input", {"encoding_format": "base64"}),
    ("/v1/embeddings", "input", {"output_dtype": "int8"}),
    ("/v1/embeddings", "input", {"output_dtype": "ubinary", "encoding_format": "base64"}),
    ("/v1/embeddings", "input", {"embedding_type": ["float", "base64"]}),
    ("/embed", "inputs", {"dimensions": 8}),
    ("/v2/embed", "texts", {"embedding_types": ["float"]}),
    ("/pooling", "input", {"encoding_format": "base64"}),
]


def rows(answer: Any) -> list[Any]:
    reply = answer.json()
    if isinstance(reply, list):
        return reply
    if "data" in reply:
        return [entry.get("embedding", entry.get("data")) for entry in reply["data"]]
    return reply["embeddings"]["float"]


@pytest.mark.parametrize(("path", "field", "more"), ROUTES, ids=str)
def test_one_bad_text_fails_alone_if_that_is_asked_for(kinds: Kinds, path: str, field: str, more: dict) -> None:
    body = {field: ["the cat", "", "the sea"], **more}
    assert 400 <= kinds.post(path, body).status_code < 500
    without = rows(kinds.post(path, {field: ["the cat", "the sea"], **more}))
    for how in ("null", "zero"):
        for answer in (
            kinds.post(path, {**body, "on_error": how}),
            kinds.post(path, body, headers={"x-npu-proxy-on-error": how}),
        ):
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-npu-proxy-failed"] == "1"
            first, failed, last = rows(answer)
            assert [first, last] == without
            if how == "null":
                assert failed is None
                continue
            failed = failed["float"] if isinstance(failed, dict) else failed
            numbers = np.frombuffer(base64.b64decode(failed), np.uint8) if isinstance(failed, str) else np.array(failed)
            assert numbers.size
            assert set(numbers.tolist()) == ({255} if "binary" in str(more) else {0})  # the bits of a zero vector are set
    assert kinds.post(path, {**body, "on_error": "ignore"}).status_code in (400, 422)


def test_requests_that_are_wrong_as_a_whole_fail_whatever_on_error_says(kinds: Kinds) -> None:
    for path, body in (
        ("/v1/embeddings", {"input": ["a"], "dimensions": 999}),
        ("/v1/embeddings", {"input": ["a"], "output_dtype": "int8", "normalize": False}),
        ("/v1/embeddings", {"input": ["a"], "output_dtype": "binary", "dimensions": 9}),
        ("/v1/embeddings", {"input": []}),
        ("/v1/rerank", {"query": "", "documents": ["a"]}),
        ("/v1/embeddings", {"input": ["a", ""], "late_chunking": True}),
        ("/similarity", {"inputs": {"source_sentence": "", "sentences": ["a"]}}),
    ):
        assert 400 <= kinds.post(path, {**body, "on_error": "zero"}).status_code < 500


# -- limits on the right text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v2/rerank", "/v1/rerank", "/rerank"])
def test_a_limit_on_documents_does_not_cut_the_query(kinds: Kinds, path: str) -> None:
    query, documents = "a cat that sleeps in the red house and the sea " * 3, ["the cat sleeps", "the sea"]
    asked = {"query": query, "documents": documents}
    plain, limited = (kinds.post(path, {**asked, **more}).json()["results"] for more in ({}, {"max_tokens_per_doc": 5}))
    assert plain == limited
    cut = kinds.post(path, {**asked, "documents": ["the sea " * 20, "the cat"], "max_tokens_per_doc": 2}).json()["results"]
    short = kinds.post(path, {**asked, "documents": ["the sea", "the cat"]}).json()["results"]
    assert [(rank["index"], rank["relevance_score"]) for rank in cut] == [
        (rank["index"], rank["relevance_score"]) for rank in short
    ]


# -- keys, models, ways in -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer secret"},
        {"authorization": "bearer  secret "},
        {"authorization": "Token secret"},
        {"authorization": "secret"},
        {"x-api-key": "secret"},
        {"api-key": "secret"},
        {"x-goog-api-key": "secret"},
    ],
)
def test_a_key_comes_in_every_api_s_header(headers: dict[str, str]) -> None:
    server = Kinds(api_key=("secret",))
    try:
        assert server.post("/v1/embeddings", {"input": "a"}, headers=headers).status_code == 200
        wrong = {name: value.replace("secret", "other") for name, value in headers.items()}
        assert server.post("/v1/embeddings", {"input": "a"}, headers=wrong).status_code == 401
    finally:
        server.stop()


def test_models_are_listed_with_what_each_client_reads(kinds: Kinds) -> None:
    listed = kinds.call("GET", "/v1/models").json()
    assert listed["data"] == listed["models"]
    limits = {entry["id"]: entry["max_model_len"] for entry in listed["data"]}
    assert limits[EMBEDDER] == kinds.engine(EMBEDDER).spec.max_length
    assert kinds.call("GET", f"/v1/models/{RERANKER}").json()["model_type"] == "rerank"
    infinity = kinds.call("GET", "/models").json()["data"]
    assert {entry["owned_by"] for entry in infinity} == {"infinity"}
    assert kinds.call("GET", "/v1/config").json()[EMBEDDER]["model_version_status"][0]["state"] == "AVAILABLE"
    assert kinds.call("GET", f"/v2/models/{RERANKER}/ready").json()["ready"] is True
    assert kinds.call("GET", "/v1beta/models/embedder").json()["name"] == "models/embedder"


def test_ollama_is_told_what_a_reranker_is(kinds: Kinds) -> None:
    shown = kinds.post("/api/show", {"model": RERANKER}).json()
    assert shown["capabilities"] == ["rerank"]
    family = shown["model_info"]["general.architecture"]
    assert shown["model_info"][f"{family}.embedding_length"] == kinds.engine(RERANKER).spec.config["hidden_size"]
    for path in ("/api/generate", "/api/chat"):
        refused = kinds.post(path, {"model": "embedder", "prompt": "hi"})
        assert (refused.status_code, refused.json()["error"]) == (400, f'"embedder" does not support {path.rpartition("/")[2]}')
        assert kinds.post(path, {"model": "none-such"}).status_code == 404


@pytest.mark.parametrize(
    "path", ["/health", "/healthz", "/readyz", "/livez", "/v2/health/ready", "/v2/health/live", "/ping", "/.well-known/ready"]
)
def test_health_has_many_names(kinds: Kinds, path: str) -> None:
    assert kinds.call("GET", path).status_code == (204 if "well-known" in path else 200)


def test_an_unknown_model_is_told_which_there_are(kinds: Kinds) -> None:
    message = kinds.post("/v1/embeddings", {"input": "a", "model": "gpt"}).json()["error"]["message"]
    assert all(f"`{name}`" in message for name in (EMBEDDER, RERANKER, CLASSIFIER, "embedder"))
    assert "/golden/" not in message


def test_scores_of_content_parts_and_of_other_names(kinds: Kinds) -> None:
    parts = {"content": [{"type": "text", "text": QUERY}]}
    asked = {"model": RERANKER, "data_1": parts, "data_2": [{"content": [{"type": "text", "text": text}]} for text in DOCUMENTS]}
    found = [entry["score"] for entry in kinds.post("/score", asked).json()["data"]]
    np.testing.assert_allclose(found, scores(kinds), atol=1e-5)
    raw = [entry["score"] for entry in kinds.post("/score", {**asked, "use_activation": False}).json()["data"]]
    np.testing.assert_allclose(1 / (1 + np.exp(-np.array(raw))), scores(kinds), atol=1e-5)


def test_llama_cpp_nvidia_and_weaviate(kinds: Kinds) -> None:
    expected = embedded(kinds, DOCUMENTS)
    native = kinds.post("/embedding", {"content": DOCUMENTS}).json()
    np.testing.assert_allclose([entry["embedding"][0] for entry in native], expected, atol=1e-5)
    assert kinds.post("/v1/embeddings", {"content": DOCUMENTS}).json() == native
    logits = np.log(scores(kinds) / (1 - scores(kinds)))
    for path, body, name, score in (
        ("/reranking", RANKING, "results", "relevance_score"),
        ("/v1/ranking", {"query": {"text": QUERY}, "passages": [{"text": text} for text in DOCUMENTS]}, "rankings", "logit"),
    ):
        ranked = kinds.post(path, body).json()[name]
        assert {rank["index"]: rank[score] for rank in ranked} == pytest.approx(dict(enumerate(logits.tolist())), abs=1e-4)
    tokens = kinds.post("/tokenize", {"content": "the cat", "with_pieces": True}).json()["tokens"]
    assert [token["piece"] for token in tokens] == ["the", "cat"]
    vector = kinds.post("/vectors", {"text": DOCUMENTS[0], "config": {"pooling_strategy": "masked_mean"}}).json()
    np.testing.assert_allclose(vector["vector"], expected[0], atol=1e-5)
    told = kinds.post("/weaviate/rerank", RANKING).json()["scores"]
    assert [entry["document"] for entry in told] == DOCUMENTS
    np.testing.assert_allclose([entry["score"] for entry in told], scores(kinds), atol=1e-5)


def test_voyage_decodes_bytes_of_the_type_it_asked_for(kinds: Kinds) -> None:
    body = {"input": DOCUMENTS, "model": "embedder", "encoding_format": "base64", "truncation": True, "input_type": None}
    for dtype, kind in (("float", "<f4"), ("int8", "i1"), ("uint8", "u1"), ("binary", "i1"), ("ubinary", "u1")):
        entries = kinds.post("/v1/embeddings", {**body, "output_dtype": dtype, "output_dimension": 16}).json()["data"]
        found = np.array([np.frombuffer(base64.b64decode(entry["embedding"]), kind) for entry in entries])
        name: Any = "float32" if dtype == "float" else dtype
        np.testing.assert_allclose(found, embedded(kinds, DOCUMENTS, dimensions=16, dtype=name), atol=1e-5)
    ranked = kinds.post("/v1/rerank", {**RANKING, "top_k": 1, "truncation": True}).json()
    assert (len(ranked["data"]), ranked["data"]) == (1, ranked["results"])
    assert ranked["usage"]["total_tokens"] > 0


def test_late_chunking_gives_each_text_the_context_of_the_others(kinds: Kinds) -> None:
    late = kinds.post("/v1/embeddings", {"input": DOCUMENTS, "late_chunking": True}).json()["data"]
    same = kinds.post("/v1/contextualizedembeddings", {"inputs": [DOCUMENTS, DOCUMENTS[:1]]}).json()["data"]
    found = np.array([entry["embedding"] for entry in late])
    np.testing.assert_allclose(found, [entry["embedding"] for entry in same[0]["data"]], atol=1e-6)
    np.testing.assert_allclose([same[1]["data"][0]["embedding"]], embedded(kinds, DOCUMENTS[:1]), atol=1e-5)
    assert np.abs(found - embedded(kinds, DOCUMENTS)).max() > 0.01
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("how", [{"top_k": 1, "truncation": True}, {"raw_scores": False, "top_k": 1}, {"top_k": 1}])
def test_fields_of_other_rankings_count_in_every_form(kinds: Kinds, how: dict) -> None:
    documents = ["the sea " * 20, "the cat"]
    asked = {"query": QUERY, "documents": [{"text": text} for text in documents], "max_tokens_per_doc": 2}
    reply = kinds.post("/v1/rerank" if "truncation" in how else "/rerank", {**asked, **how}).json()
    wanted = scores(kinds, ["the sea", "the cat"])
    best = int(np.argmax(wanted))
    assert [(rank["index"], rank["relevance_score"]) for rank in reply["results"]] == [
        (best, pytest.approx(wanted[best], abs=1e-5))
    ]
    refused = kinds.post("/v1/rerank", {**asked, **how, "instruction": "x"})
    assert (refused.status_code, "instruction" in refused.text) == (400, True)


def test_a_base_path_gives_the_api_s_own_form_and_others_where_it_has_none(kinds: Kinds) -> None:
    openai = kinds.post("/llama.cpp/v1/embeddings", {"input": "the cat", "dimensions": 4}).json()
    assert len(openai["data"][0]["embedding"]) == 4
    logits = kinds.post("/reranking", RANKING).json()["results"]
    for path in ("/llama.cpp/rerank", "/llama.cpp/v1/rerank"):
        assert kinds.post(path, RANKING).json()["results"] == logits
    assert "document" in kinds.post("/vllm/v2/rerank", RANKING).json()["results"][0]
    assert kinds.post(f"/models/{RERANKER}/api/show", {}).json() == kinds.post("/api/show", {"model": RERANKER}).json()


def test_an_alias_that_is_a_kind_s_name_comes_before_the_kind() -> None:
    from conftest import GOLDEN

    names = (str(GOLDEN / EMBEDDER), str(GOLDEN / RERANKER))
    server = Kinds(model=names, served_model_name=(f"embedding={RERANKER}",))
    try:
        assert list(server.call("GET", "/models/embedding/info").json()["model_type"]) == ["reranker"]
        assert list(server.call("GET", "/models/reranker/info").json()["model_type"]) == ["reranker"]
    finally:
        server.stop()


def test_counts_in_headers_are_those_of_all_requests_of_a_body(kinds: Kinds) -> None:
    long = "the sea " * 60
    body = {"requests": [{"content": text, "outputDimensionality": 8 + at} for at, text in enumerate((long, long, "a", "b"))]}
    answer = kinds.post("/v1beta/models/embedder:batchEmbedContents", body)
    assert answer.headers["x-npu-proxy-truncated"] == "2"
    assert answer.headers["x-npu-proxy-cache"] == "miss"


def test_types_asked_for_many_times_are_made_once(kinds: Kinds) -> None:
    rows = kinds.post("/v1/embeddings", {"input": "a", "embedding_type": ["float", "int8"] * 5000}).json()["data"]
    assert set(rows[0]["embedding"]) == {"float", "int8"}


def test_cohere_s_first_version_below_its_base_has_no_documents(kinds: Kinds) -> None:
    assert all("document" not in rank for rank in kinds.post("/cohere/v1/rerank", RANKING).json()["results"])
    assert "message" in kinds.post("/cohere/v1/rerank", {"query": 5}).json()


def test_requests_of_many_parts_count_as_one(kinds: Kinds) -> None:
    many = [{"content": "a", "outputDimensionality": 8 + index % 2} for index in range(2049)]
    for path, body in (
        ("/v1beta/models/embedder:batchEmbedContents", {"requests": many}),
        ("/v1/contextualizedembeddings", {"inputs": [["a", "b"]] * 1100}),
    ):
        answer = kinds.post(path, body)
        assert (answer.status_code, "at most 2048" in answer.text) == (400, True)


def test_errors_have_each_api_s_form(kinds: Kinds) -> None:
    for path, body, names in (
        ("/v1beta/models/embedder:embedContent", {"content": {}}, {"error"}),
        ("/v1/contextualizedembeddings", {"inputs": []}, {"detail"}),
        ("/v1/ranking", {"query": 5, "passages": []}, {"object", "message", "detail", "type"}),
        ("/vectors", {}, {"error"}),
    ):
        answer = kinds.post(path, body)
        assert (answer.status_code, set(answer.json())) == (400, names), answer.text
    assert json.loads(kinds.post("/v1/embeddings", {"input": ""}).text)["detail"]
