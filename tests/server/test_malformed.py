"""Wrong input over every dialect: a clear 4xx in the dialect's own shape, never a 5xx, and the next answer is right."""

import asyncio
import json
from collections.abc import Callable

import httpx
import numpy as np
import pytest

from conftest import app_of, golden
from npu_proxy import Engine, Settings

FOLDER, TEXTS, VECTORS = golden("mean")

FIELDS = {
    "/v1/embeddings": "input",
    "/v3/embeddings": "input",
    "/api/embed": "input",
    "/api/embeddings": "prompt",
    "/embed": "inputs",
    "/": "inputs",
    "/tokenize": "inputs",
    "/v1/embed": "texts",
    "/v2/embed": "texts",
    "/pooling": "input",
    "/v1/tokenize": "prompt",
    "/rerank": "documents",
    "/v2/rerank": "documents",
}
SHAPES: dict[str, Callable[[dict], bool]] = {
    "/v1/embeddings": lambda body: set(body["error"]) == {"message", "type", "param", "code"},
    "/v3/embeddings": lambda body: bool(body["error"]["message"]),
    "/api/embed": lambda body: isinstance(body["error"], str),
    "/api/embeddings": lambda body: isinstance(body["error"], str),
    "/embed": lambda body: {"error", "error_type"} == set(body),
    "/": lambda body: {"error", "error_type"} == set(body),
    "/tokenize": lambda body: {"error", "error_type"} == set(body),
    "/v1/embed": lambda body: isinstance(body["message"], str),
    "/v2/embed": lambda body: isinstance(body["message"], str),
    "/pooling": lambda body: isinstance(body["error"]["code"], int),
    "/v1/tokenize": lambda body: isinstance(body["error"]["code"], int),
    "/rerank": lambda body: {"error", "error_type"} == set(body) or isinstance(body["error"]["code"], int),
    "/v2/rerank": lambda body: isinstance(body["message"], str),
}
DEEP = "[" * 5000 + "]" * 5000
RAW: dict[str, bytes] = {
    "nothing": b"",
    "white space": b"  \n ",
    "not JSON": b"hello",
    "cut": b'{"FIELD": ["a", "b"',
    "cut in a string": b'{"FIELD": "abc',
    "cut in an escape": b'{"FIELD": "\\u12',
    "two objects": b'{"FIELD": "a"} {"FIELD": "b"}',
    "trailing comma": b'{"FIELD": "a",}',
    "single quotes": b"{'FIELD': 'a'}",
    "an array": b'["a"]',
    "a string": b'"a"',
    "a number": b"5",
    "null": b"null",
    "true": b"true",
    "UTF-16": '{"FIELD": "a"}'.encode("utf-16"),
    "a bare control character": b'{"FIELD": "a\x01b"}',
    "NaN": b'{"FIELD": NaN}',
    "Infinity": b'{"FIELD": [Infinity]}',
    "deep": b'{"FIELD": ' + DEEP.encode() + b"}",
    "gzip": b"\x1f\x8b\x08\x00garbage",
    "a form": b"FIELD=a&model=b",
    "a huge number": b'{"FIELD": ' + b"9" * 5000 + b"}",
}
VALUES: dict[str, object] = {
    "a number": 5,
    "a float": 1.5,
    "true": True,
    "an object": {"a": 1},
    "a list of null": [None],
    "a list of objects": [{"a": 1}],
    "a list of lists of strings": [["a", "b"]],
    "a mixture": ["a", 5, None],
    "deep lists": [[[["a"]]]],
    "floats as ids": [[1.5, 2.5]],
    "true as an id": [[True]],
}
EXTRAS: dict[str, dict[str, object]] = {
    "model is a number": {"model": 5},
    "model is a list": {"model": ["a"]},
    "model is unknown": {"model": "no/such-model"},
    "model is a path": {"model": "../../../etc/passwd"},
    "model is long": {"model": "x" * 100_000},
    "dimensions is zero": {"dimensions": 0, "output_dimension": 0},
    "dimensions is negative": {"dimensions": -1, "output_dimension": -1},
    "dimensions is huge": {"dimensions": 10**30, "output_dimension": 10**30},
    "dimensions is a string": {"dimensions": "8", "output_dimension": "8"},
    "truncate is a number": {"truncate": 7},
    "a type is unknown": {"encoding_format": "hex", "embedding_types": ["hex"], "truncation_direction": "up", "keep_alive": []},
    "a prompt is unknown": {"prompt_name": "no such prompt", "input_type": "no such type", "options": {"num_ctx": "many"}},
}
FINE = {  # what a dialect's clients may send
    *((path, "dimensions is a string") for path in ("/v1/embeddings", "/v3/embeddings", "/api/embed", "/embed", "/", "/pooling")),
    ("/v2/embed", "dimensions is a string"),
    *((path, "dimensions is zero") for path in ("/v1/embeddings", "/v3/embeddings", "/pooling", "/v2/embed")),
    ("/api/embed", "dimensions is zero"),
    ("/api/embed", "dimensions is negative"),
    ("/api/embed", "dimensions is huge"),
    ("/embed", "a type is unknown"),
}
IGNORED = {  # fields that a dialect does not have, and so ignores
    "/api/embeddings": {
        "dimensions is zero",
        "dimensions is negative",
        "dimensions is huge",
        "dimensions is a string",
        "truncate is a number",
    },
    "/embed": {"model is a number", "model is a list", "model is unknown", "model is a path", "model is long"},
    "/": {"model is a number", "model is a list", "model is unknown", "model is a path", "model is long"},
    "/pooling": {"truncate is a number", "a prompt is unknown"},
    "/v1/tokenize": set(EXTRAS) - {name for name in EXTRAS if name.startswith("model")},
    "/tokenize": set(EXTRAS) - {"a prompt is unknown"},
    "/v1/embed": {"dimensions is zero", "dimensions is negative", "dimensions is huge", "dimensions is a string"},
}


def cases() -> list[tuple[str, str, bytes]]:
    """Path, what is wrong, body."""
    found = []
    for path, field in FIELDS.items():
        found += [(path, name, raw.replace(b"FIELD", field.encode())) for name, raw in RAW.items()]
        found += [(path, f"{field} is {name}", json.dumps({field: value}).encode()) for name, value in VALUES.items()]
        good: object = "a" if field == "prompt" else ["a"]
        for name, extra in EXTRAS.items():
            if name not in IGNORED.get(path, ()) and (path, name) not in FINE:
                found.append((path, name, json.dumps({field: good, **extra}).encode()))
    return found


CASES = cases()


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 500


def test_wrong_input_is_refused_clearly_and_the_next_answer_is_right() -> None:
    wrong: list[str] = []

    async def run() -> None:
        settings = Settings(model=(str(FOLDER),), device="cpu", cache_mb=0)
        engine = Engine(settings=settings).start()
        app = app_of(engine, settings)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=60) as http:
            for number, (path, name, body) in enumerate(CASES):
                answer = await http.post(path, content=body)
                if not 400 <= answer.status_code < 500:
                    wrong.append(f"{path}: {name}: {answer.status_code} {answer.text[:80]}")
                elif not SHAPES[path](answer.json()):
                    wrong.append(f"{path}: {name}: {answer.status_code} not the dialect's: {answer.text[:80]}")
                elif any(words in answer.text for words in ("Traceback", 'File "', str(FOLDER.parent))):
                    wrong.append(f"{path}: {name}: shows our insides: {answer.text[:200]}")
                # Computed again each time: there is no cache, and the text differs from the one before.
                place = number % len(TEXTS)
                after = (await http.post("/embed", json={"inputs": TEXTS[place], "normalize": False})).json()
                np.testing.assert_allclose(after, VECTORS[place : place + 1], atol=2e-5, err_msg=f"after {path}: {name}")
        await asyncio.to_thread(engine.stop)

    asyncio.run(run())
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", sorted(path for path in FIELDS if "rerank" not in path))
@pytest.mark.parametrize("headers", [{"content-type": "text/plain"}, {"content-type": "application/xml"}, {}])
def test_the_content_type_does_not_matter_the_content_does(path: str, headers: dict) -> None:
    async def run() -> httpx.Response:
        settings = Settings(model=(str(FOLDER),), device="cpu")
        engine = Engine(settings=settings).start()
        app = app_of(engine, settings)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=60) as http:
            answer = await http.post(
                path, content=json.dumps({FIELDS[path]: "a" if FIELDS[path] != "texts" else ["a"]}), headers=headers
            )
        await asyncio.to_thread(engine.stop)
        return answer

    assert asyncio.run(run()).status_code == 200
