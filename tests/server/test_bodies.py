"""Bodies as the world sends them: half an emoji, bytes that are no UTF-8, byte order marks, other encodings, gzip, lax types."""

import asyncio
import gzip
import json
import zlib
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import app_of, golden
from npu_proxy import Engine, Settings
from npu_proxy.server.http.decoding import decompressed, with_replacements

FOLDER, TEXTS, VECTORS = golden("mean")


def post(content: bytes, path: str = "/embed", headers: dict[str, str] | None = None, **settings: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        chosen = Settings(**{"model": str(FOLDER), "device": "cpu", "load_on_demand": False, **settings})
        engine = Engine(settings=chosen).start()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app_of(engine, chosen)), base_url="http://localhost") as http:
            answer = await http.post(path, content=content, headers=headers)
        await asyncio.to_thread(engine.stop)
        return answer

    return asyncio.run(run())


def vectors(content: bytes, **more: Any) -> np.ndarray:
    answer = post(content, **more)
    assert answer.status_code == 200, answer.text
    return np.array(answer.json())


WANTED = json.dumps({"inputs": TEXTS, "normalize": False}).encode()

# -- characters ----------------------------------------------------------------------------------------------------------


@given(
    st.text(
        st.characters(exclude_categories=()) | st.characters(categories=["Cs"]) | st.sampled_from('\\"ud8é\ud83d\ude00'),
        max_size=30,
    )
)
def test_half_a_pair_becomes_the_replacement_character(text: str) -> None:
    body = json.dumps({"a": text}).encode()
    repaired, count = with_replacements(body)
    wanted = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    found = msgspec.json.decode(repaired)["a"]
    halves = sum("\ud800" <= character <= "\udfff" for character in json.loads(body)["a"])
    assert count == halves
    assert len(found) == len(json.loads(body)["a"])
    assert found.replace("\ufffd", "") == wanted.replace("\ufffd", "")


@given(st.binary(max_size=40))
def test_bytes_that_are_no_utf8_become_the_replacement_character(raw: bytes) -> None:
    repaired, _ = with_replacements(b'{"a": "' + raw.replace(b'"', b"").replace(b"\\", b"") + b'"}')
    assert repaired.decode()


def test_escaped_backslashes_are_left_alone() -> None:
    for body in (rb'{"a": "\\ud83d"}', rb'{"a": "\\\\ud83d \ud83d\ude00"}', rb'{"a": "x"}'):
        assert with_replacements(body) == (body, 0)
    assert with_replacements(rb'{"a": "\\\ud83d"}') == (rb'{"a": "\\\ufffd"}', 1)
    assert with_replacements(rb'{"a": "\\ud83d\ude00"}') == (rb'{"a": "\\ud83d\ufffd"}', 1)


@pytest.mark.parametrize(
    ("text", "count"),
    [(b'"the cat \\ud83d"', 1), (b'"the cat \\ude00 \\uD83D"', 2), (b'"the cat \xff"', 1), (b'"the cat \\ud83d\\ude00"', None)],
)
def test_a_text_with_half_an_emoji_is_embedded(text: bytes, count: int | None) -> None:
    for path, body in (
        ("/v1/embeddings", b'{"input": [%s, "ok"]}'),
        ("/api/embed", b'{"input": [%s, "ok"]}'),
        ("/embed", b'{"inputs": [%s]}'),
    ):
        answer = post(body % text, path)
        assert answer.status_code == 200, answer.text
        assert answer.headers.get("x-npu-proxy-replaced") == (None if count is None else str(count))


def test_a_byte_order_mark_is_ignored() -> None:
    np.testing.assert_allclose(vectors(b"\xef\xbb\xbf" + WANTED), VECTORS, atol=2e-5)


@pytest.mark.parametrize("charset", ["iso-8859-1", "windows-1252", "utf-16"])
def test_a_declared_charset_is_honoured(charset: str) -> None:
    body = '{"inputs": ["the cät"]}'
    found = post(body.encode(charset), headers={"content-type": f"application/json; charset={charset}"})
    assert found.json() == post(body.encode()).json()


@pytest.mark.parametrize("charset", ["rot13", "no-such", "x" * 500])
def test_an_unknown_charset_is_refused(charset: str) -> None:
    assert post(WANTED, headers={"content-type": f"application/json; charset={charset}"}).status_code == 415


# -- compression ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [
        ("gzip", gzip.compress),
        ("GZIP", gzip.compress),
        ("x-gzip", lambda body: gzip.compress(body[:30]) + gzip.compress(body[30:])),
        ("deflate", zlib.compress),
        ("gzip", lambda body: gzip.compress(body) + bytes(100_000)),
        ("identity", lambda body: body),
    ],
)
def test_compressed_bodies_are_decompressed(encoding: str, pack: Any) -> None:
    np.testing.assert_allclose(vectors(pack(WANTED), headers={"content-encoding": encoding}), VECTORS, atol=2e-5)


@pytest.mark.parametrize(
    ("content", "encoding", "status", "words"),
    [
        (WANTED, "zstd", 415, "send gzip"),
        (WANTED, "br", 415, "send gzip"),
        (WANTED, "gzip", 422, "not valid gzip"),
        (gzip.compress(WANTED)[:-9], "gzip", 422, "cut short"),
        (gzip.compress(b" " * 30_000_000), "gzip", 413, "20 MB"),
        (gzip.compress(b"") * 2000 + gzip.compress(WANTED), "gzip", 422, "members"),
        (b'{"inputs": "' + b"\xff" * 200_000 + b'"}', "", 422, "not UTF-8"),
        (b'{"inputs": "' + b"\\ud83d" * 200_000 + b'"}', "", 422, "halves"),
    ],
)
def test_other_encodings_and_bombs_are_refused(content: bytes, encoding: str, status: int, words: str) -> None:
    answer = post(content, headers={"content-encoding": encoding} if encoding else None)
    assert (answer.status_code, words in answer.text) == (status, True), answer.text


@given(st.binary(max_size=2000), st.integers(0, 2000))
def test_no_more_is_decompressed_than_allowed(body: bytes, most: int) -> None:
    found = decompressed(gzip.compress(body), most)
    assert found == (body if len(body) <= most else None)


REFUSED = {"query": "a", "passages": ["b", "c"], "top_n": 1}


@pytest.mark.parametrize("spoil", [b"", b"\xef\xbb\xbf"])
def test_what_is_refused_is_refused_in_bodies_that_need_repair(spoil: bytes) -> None:
    for body in (json.dumps(REFUSED), json.dumps(REFUSED).replace('"a"', '"a\\ud800"')):
        answer = post(spoil + body.encode(), "/v1/ranking")
        assert (answer.status_code, "`top_n`" in answer.text) == (400, True)
    assert post(b'{"input": "a", "instruction": "\xff"}', "/v1/embeddings").status_code == 400
    for number in ("1e400", "9" * 5000):
        answer = post(b'{"input": "a", "padding": %s}' % number.encode(), "/v1/embeddings")
        assert (answer.status_code, "`padding`" in answer.text) == (400, True)


def test_a_model_that_is_no_name_costs_nothing() -> None:
    body = b'{"input": "a", "model": [' + b",".join([b"[]"] * 5000) + b"]}"
    assert post(body, "/v1/embeddings").status_code == 400


def test_parts_within_parts_are_refused() -> None:
    for depth in (2, 200, 400):
        body = b'{"input":' + b'{"content":[' * depth + b'{"text":"x"}' + b"]}" * depth + b"}"
        assert post(body, "/v1/embeddings").status_code == 400


# -- types ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "lax", "strict"),
    [
        ("/v1/embeddings", {"input": "a", "dimensions": "8"}, {"input": "a", "dimensions": 8}),
        ("/v1/embeddings", {"input": "a", "dimensions": 8.0}, {"input": "a", "dimensions": 8}),
        ("/embed", {"inputs": "a", "normalize": "false"}, {"inputs": "a", "normalize": False}),
        ("/embed", {"inputs": "a", "normalize": "0"}, {"inputs": "a", "normalize": False}),
        ("/pooling", {"input": "a", "use_activation": "False"}, {"input": "a", "use_activation": False}),
    ],
)
def test_types_are_as_lax_as_those_of_pydantic(path: str, lax: dict, strict: dict) -> None:
    first, second = (post(json.dumps(body).encode(), path).json() for body in (lax, strict))
    for reply in (first, second):
        if isinstance(reply, dict):
            reply.pop("id")
            reply.pop("created")
    assert first == second
