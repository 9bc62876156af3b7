"""Requests of official clients as they come, and mutations of them: no 5xx, and no numbers other than those asked for.

default_requests.jsonl was recorded from 61 clients with their defaults; only names of models and texts were replaced. What a
request asks for is read here a second time, independently of the server's own code.
"""

import base64
import copy
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from kinds import CLASSIFIER, EMBEDDER, RERANKER, Kinds

from npu_proxy import EmbedRequest, OutputType, Pair, Settings
from npu_proxy.server.apis.contract import BodyFields, InferenceRoute
from npu_proxy.server.http.app import DIALECTS

ROWS = [json.loads(line) for line in (Path(__file__).parent / "default_requests.jsonl").read_text(encoding="utf-8").splitlines()]
LIMIT, WIDTH = 48, 32
MUTATIONS = 400


@pytest.fixture(scope="module")
def kinds() -> Iterator[Kinds]:
    server = Kinds()
    yield server
    server.stop()


def send(kinds: Kinds, row: dict[str, Any], body: Any) -> httpx.Response:
    content = None if body is None else json.dumps(body).encode()  # half a pair of surrogates stays an escape
    return kinds.call(row["method"], row["path"], content=content, headers=row.get("headers"))


# -- what a request asks for ---------------------------------------------------------------------------------------------


@dataclass
class Asked:
    """Vectors that a request asks for: float32 as the engine computes them, and how the reply has them."""

    texts: list[str]
    input_type: str | None = None
    prompt_name: str | None = None
    dimensions: int | None = None
    normalize: bool = True
    limit: int | None = None
    start: bool = False
    dtype: str = "float"
    late: bool = False


QUERY = {"query", "search_query", "retrieval_query", "retrieval.query"}
DOCUMENT = {"document", "passage", "search_document", "retrieval_document", "retrieval.passage"}


def role(word: str | None) -> str | None:
    word = (word or "").lower()
    return "query" if word in QUERY else "document" if word in DOCUMENT else None


def strings(given: Any) -> list[str]:
    if isinstance(given, str):
        return [given]
    if isinstance(given, dict):
        return ["\n".join(strings(given["content"]))] if "content" in given else [given["text"]]
    return [text for item in given for text in strings(item)]


def truth(value: Any) -> bool:
    return value not in (False, None) and str(value).lower() not in ("false", "0")


def content_of(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content["parts"])


def asked_of(path: str, body: dict[str, Any]) -> Asked | list[Asked]:
    """What a body asks for. Only for bodies that the server has accepted."""
    if "/models/" in path and "ontent" in path:
        contents = body.get("requests", [body])
        parts = [content_of(entry["content"]) for entry in contents]
        roles = [role(entry.get("taskType") or entry.get("task_type")) for entry in contents]
        widths = [entry.get("outputDimensionality") for entry in contents]
        return [
            Asked([text], input_type=kind, dimensions=positive(width))
            for text, kind, width in zip(parts, roles, widths, strict=True)
        ]
    if path.endswith("contextualizedembeddings"):
        common = {"input_type": role(body.get("input_type")), "dimensions": positive(body.get("output_dimension"))}
        return [Asked(texts, late=len(texts) > 1, dtype=body.get("output_dtype") or "float", **common) for texts in body["inputs"]]
    if path == "/api/embeddings":
        return Asked(
            [body.get("prompt") or body.get("input") or ""],
            normalize=False,
            limit=number((body.get("options") or {}).get("num_ctx")),
        )
    if path == "/api/embed":
        width = number(body.get("dimensions"))
        limit = number((body.get("options") or {}).get("num_ctx"))
        return Asked(strings(body.get("input") or ""), dimensions=width if width and 0 < width < WIDTH else None, limit=limit)
    texts = strings(next(body[name] for name in ("input", "inputs", "texts", "content") if body.get(name) is not None))
    norms = [body.get(name) for name in ("normalize", "normalized", "use_activation")]
    dtypes: list[str] = [body[name] for name in ("output_dtype", "embedding_type") if isinstance(body.get(name), str)]
    limit = positive(body.get("truncate_prompt_tokens")) or positive(body.get("max_tokens"))
    side = body.get("truncation_side") or body.get("truncation_direction") or ""
    return Asked(
        texts,
        input_type=role(body.get("input_type") or body.get("task")),
        prompt_name=body.get("prompt_name"),
        dimensions=positive(body.get("dimensions")) or positive(body.get("output_dimension")),
        normalize=all(value is None or truth(value) for value in norms),
        limit=limit,
        start=side.lower() == "left" or str(body.get("truncate")).upper() == "START",
        dtype=next((word for word in dtypes if word not in ("float", "base64")), "float"),
        late=truth(body.get("late_chunking")) and len(texts) > 1,
    )


def number(value: Any) -> int | None:
    return None if value is None else int(float(value))


def positive(value: Any) -> int | None:
    found = number(value)
    return found if found is not None and found > 0 else None


def vectors_of(kinds: Kinds, asked: Asked) -> np.ndarray:
    engine = kinds.engine(EMBEDDER)
    request = EmbedRequest(
        texts=asked.texts,
        input_type=asked.input_type,
        prompt_name=asked.prompt_name,
        dimensions=asked.dimensions,
        normalize=asked.normalize,
        max_tokens=asked.limit,
        truncate="start" if asked.start else "end",  # type: ignore[arg-type]
        dtype={"float": "float32"}.get(asked.dtype, asked.dtype),  # type: ignore[arg-type]
        on_empty="embed",
    )
    return np.asarray(engine.submit(request).result().raise_first().embeddings)


# -- what a reply has ----------------------------------------------------------------------------------------------------


def rows_of(reply: Any) -> list[Any]:
    """The vectors of a reply, whatever its form."""
    if isinstance(reply, list):
        return [row for entry in reply for row in (entry["embedding"] if isinstance(entry, dict) else [entry])]
    if "data" in reply:
        return [row for entry in reply["data"] for row in ([entry["embedding"]] if "embedding" in entry else rows_of(entry))]
    if "embedding" in reply:
        return [reply["embedding"]["values"] if isinstance(reply["embedding"], dict) else reply["embedding"]]
    rows = reply["embeddings"]
    if isinstance(rows, dict):
        return rows.get("float") or rows["base64"]
    return [row["values"] if isinstance(row, dict) else row for row in rows]


def decoded(row: Any, dtype: str) -> np.ndarray:
    if isinstance(row, dict):
        return np.array(row["float"], np.float32)
    if not isinstance(row, str):
        return np.array(row)
    kind = {"float": "<f4", "int8": "i1", "binary": "i1", "uint8": "u1", "ubinary": "u1"}[dtype]
    return np.frombuffer(base64.b64decode(row), kind)


def check(kinds: Kinds, row: dict[str, Any], body: dict[str, Any], answer: httpx.Response) -> str:
    """Hold the numbers of a reply against what the body asks for. Returns what was compared."""
    path, reply = row["path"].partition("?")[0], answer.json()
    if any(word in path for word in ("rerank", "ranking")):
        return check_ranking(kinds, body, reply)
    if "classif" in path or "predict" in path:
        return check_labels(kinds, body, reply)
    if any(word in path for word in ("okenize", "decode", "countTokens", "similarity", "/api/show")) or isinstance(
        body.get("inputs"), dict
    ):
        return "other"
    wanted = asked_of(path, body)
    asked = wanted if isinstance(wanted, list) else [wanted]
    rows = rows_of(reply)
    if sum(len(one.texts) for one in asked) == 0 or (path.startswith("/api/embed") and asked[0].texts == [""]):
        assert rows in ([], [[]])
        return "nothing"
    if any(one.late for one in asked):
        assert len(rows) == sum(len(one.texts) for one in asked)
        return "late"
    expected = [vector for one in asked for vector in vectors_of(kinds, one)]
    assert len(rows) == len(expected)
    for found, vector in zip(rows, expected, strict=True):
        np.testing.assert_allclose(decoded(found, asked[0].dtype), vector, atol=2e-5 if asked[0].dtype == "float" else 1)
    return "vectors"


def check_ranking(kinds: Kinds, body: dict[str, Any], reply: Any) -> str:
    documents = strings(body.get("texts") or body.get("documents") or body["passages"])
    (query,) = strings(body["query"])
    by_cosine = body.get("model") == "embedder"
    if by_cosine:
        left = vectors_of(kinds, Asked([query], input_type="query"))[0]
        scores = vectors_of(kinds, Asked(documents, input_type="document")) @ left
    else:
        pairs = [Pair(query, document) for document in documents]
        request = EmbedRequest(texts=pairs, output_type=OutputType.SCORES, max_tokens=positive(body.get("truncate_prompt_tokens")))
        logits = np.asarray(kinds.engine(RERANKER).submit(request).result().raise_first().embeddings)[:, 0]
        raw = isinstance(reply, dict) and "rankings" in reply
        raw = raw or truth(body.get("raw_scores")) or body.get("use_activation") is False
        scores = logits if raw else 1 / (1 + np.exp(-logits))
    ranks = reply if isinstance(reply, list) else reply.get("results") or reply.get("data") or reply["rankings"]
    top = number(body.get("top_n")) or number(body.get("top_k")) or len(documents)
    assert len(ranks) == min(top, len(documents))
    for rank in ranks:
        found = next(rank[name] for name in ("relevance_score", "score", "logit") if name in rank)
        assert found == pytest.approx(float(scores[rank["index"]]), abs=2e-5)
        shown = rank.get("document") or rank.get("text")
        if shown:
            assert (shown["text"] if isinstance(shown, dict) else shown) == documents[rank["index"]]
    return "ranking"


def check_labels(kinds: Kinds, body: dict[str, Any], reply: Any) -> str:
    given = body.get("input") or body.get("inputs")
    texts = (
        strings(given) if not (isinstance(given, list) and given and isinstance(given[0], list)) else [item[0] for item in given]
    )
    request = EmbedRequest(texts=texts, output_type=OutputType.SCORES)
    logits = np.asarray(kinds.engine(CLASSIFIER).submit(request).result().raise_first().embeddings)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    if "results" in reply:
        found = [max(entry["label"]["scores"].values()) for entry in reply["results"]]
    else:
        lists = reply["data"] if isinstance(reply, dict) else reply
        lists = lists if isinstance(lists[0], list) else [lists]
        found = [labels[0]["score"] for labels in lists]
    wanted = logits if truth(body.get("raw_scores")) else shares
    np.testing.assert_allclose(found, wanted.max(axis=1), atol=2e-5)
    return "labels"


# -- as they come --------------------------------------------------------------------------------------------------------


def test_every_default_request_is_answered_with_the_numbers_asked_for(kinds: Kinds) -> None:
    compared: dict[str, int] = {}
    for row in ROWS:
        answer = send(kinds, row, row["body"])
        assert answer.status_code == row.get("status", 200), (row, answer.text)
        if answer.status_code == 200 and row["method"] == "POST":
            what = check(kinds, row, row["body"], answer)
            compared[what] = compared.get(what, 0) + 1
    assert len(ROWS) > 170
    assert compared["vectors"] > 90
    assert compared["ranking"] > 20
    assert compared["labels"] >= 4


# -- mutated -------------------------------------------------------------------------------------------------------------

VALUES: dict[str, list[Any]] = {
    "dimensions": [8, "8", 8.0, 0, 33, -1, None, 1.5],
    "output_dimension": [8, 0, "16"],
    "encoding_format": ["base64", "float", "BASE64", "bytes"],
    "output_dtype": ["int8", "ubinary", "float", "int4"],
    "embedding_type": ["binary", "float", ["float", "int8"]],
    "input_type": ["query", "passage", "SEARCH_DOCUMENT", "poem", None],
    "task": ["retrieval.query", "retrieval.passage", "poem"],
    "truncate": [True, False, "NONE", "START", "END", "middle"],
    "truncation": [True, False],
    "truncation_side": ["left", "right"],
    "truncation_direction": ["Left", "right"],
    "truncate_prompt_tokens": [6, -1, 0, "7"],
    "normalize": [True, False, "false"],
    "normalized": [False, None],
    "use_activation": [True, False],
    "raw_scores": [True, False, "true"],
    "top_n": [1, 0, -1, "1", 9],
    "top_k": [1, None],
    "return_documents": [True, False, "true"],
    "prompt_name": ["query", "none-such"],
    "add_special_tokens": [True, False],
    "modality": ["text", "image"],
    "late_chunking": [True, False],
    "options": [{"num_ctx": 6}, {"num_ctx": 0}, {"temperature": 1}, None],
    "max_tokens_per_doc": [0, None],
    "messages": [[{"role": "user", "content": "a"}]],
    "x_unknown": [1, {"a": []}],
    "on_error": ["fail"],
    "user": ["somebody", 5],
}
TEXTS = ["", " ", "the sea " * 60, "half \ud83d", "the cat", 5, None, {"text": "the sea"}, {"image": "x"}, "ünï \u00e9\u4e2d"]
INPUTS = ("input", "inputs", "texts", "documents", "content", "passages")


def mutated(body: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    body = copy.deepcopy(body)
    for _ in range(chance.randint(1, 3)):
        match chance.randint(0, 5):
            case 0 | 1:
                name = chance.choice(sorted(VALUES))
                body[name] = chance.choice(VALUES[name])
            case 2 if body:
                body[chance.choice(sorted(body))] = None
            case 3 if len(body) > 1:
                body.pop(chance.choice(sorted(body)))
            case 4:
                name = next((name for name in INPUTS if name in body), None)
                if name is not None and isinstance(body[name], list):
                    body[name].insert(chance.randint(0, len(body[name])), chance.choice(TEXTS))
                elif name is not None:
                    body[name] = chance.choice(TEXTS)
            case _:
                name = next((name for name in INPUTS if name in body), None)
                if name is not None and isinstance(body[name], list):
                    body[name] = body[name] * 2 + body[name][::-1]
    return body


def known_part(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The fields of a body that its API knows; others are ignored, as the API itself does."""
    path = path.partition("?")[0]
    fields = msgspec.json.decode(json.dumps(body), type=BodyFields)
    routes = [route for dialect in DIALECTS for route in dialect.routes if isinstance(route, InferenceRoute)]
    for before in ("", "/.*"):
        for route in routes:
            pattern = before + re.escape(route.path).replace(re.escape("{id:path}"), ".+")
            if re.fullmatch(pattern, path) and route.applies(fields, Settings()):
                return {name: value for name, value in body.items() if name in route.body.__struct_fields__}
    return body


def test_mutated_requests_are_refused_or_answered_with_the_numbers_asked_for(kinds: Kinds) -> None:
    chance = random.Random(28)
    rows = [row for row in ROWS if row["method"] == "POST" and row.get("status", 200) == 200 and "/api/show" not in row["path"]]
    outcomes: dict[str, int] = {}
    for _ in range(MUTATIONS):
        row = chance.choice(rows)
        body = mutated(row["body"], chance)
        answer = send(kinds, row, body)
        assert answer.status_code < 500, (row["path"], body, answer.text)
        if answer.status_code == 200:
            plain = known_part(row["path"], json.loads(json.dumps(body).replace("\\ud83d", "\\ufffd")))
            try:
                what = check(kinds, row, plain, answer)
            except AssertionError as error:
                raise AssertionError(f"{row['path']} {body}: {answer.text[:300]}") from error
        else:
            what = "refused"
        outcomes[what] = outcomes.get(what, 0) + 1
    assert sum(outcomes.values()) == MUTATIONS
    assert outcomes["vectors"] > 60
    assert outcomes["refused"] > 40
