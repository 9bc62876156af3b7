"""Every known field of every API is obeyed, refused by name, or changes nothing; and docs/fields.md says which."""

import asyncio
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from starlette.types import ASGIApp

from conftest import GOLDEN, app_of
from npu_proxy import Engine, Settings
from npu_proxy.models.layout import read_spec
from npu_proxy.server.apis.contract import Dialect, InferenceRoute, RequestBody, TokenizerRoute
from npu_proxy.server.apis.pooling import ScoreBody
from npu_proxy.server.http.app import DIALECTS

ROOT = Path(__file__).parents[2]
MODELS = ("mean", "bert_rerank", "roberta_labels", "bert_splade", "colbert")
RANKED = ("bert_rerank",)
LONG = "the cat sleeps in the red house and the sea " * 9
TEXTS = [LONG, "the cat", "a red dog"]

REQUIRED: dict[str, Any] = {
    "input": TEXTS,
    "inputs": TEXTS,
    "texts": TEXTS,
    "content": TEXTS,
    "prompt": LONG,
    "text": LONG,
    "query": "the cat",
    "documents": TEXTS,
    "passages": TEXTS,
    "contents": [{"parts": [{"text": LONG}]}],
    "requests": [{"content": {"parts": [{"text": text}]}} for text in TEXTS],
    "ids": [2, 5, 6, 3],
    "tokens": [5, 6, 7],
}
SPECIAL: dict[str, dict[str, Any]] = {
    "npu_proxy.server.apis.tei.SimilarityBody": {"inputs": {"source_sentence": "the cat", "sentences": TEXTS}},
    "npu_proxy.server.apis.tei.PredictBody": {"inputs": [[text] for text in TEXTS]},
    "npu_proxy.server.apis.pooling.ScoreBody": {"text_1": "the cat", "text_2": TEXTS},
    "npu_proxy.server.apis.scoring.RerankBody": {"documents": [{"text": text, "title": "sea"} for text in TEXTS]},
    "npu_proxy.server.apis.llama_cpp.TokenizeBody": {"content": LONG},
    "npu_proxy.server.apis.cohere.BodyV1": {"texts": TEXTS},
    "npu_proxy.server.apis.cohere.BodyV2": {"texts": TEXTS},
    "npu_proxy.server.apis.voyage.ContextBody": {"inputs": [TEXTS[1:], [LONG]]},
    "npu_proxy.server.apis.voyage.PartsBody": {"inputs": [{"content": [{"type": "text", "text": text}]} for text in TEXTS]},
    "npu_proxy.server.apis.voyage.RerankBody": {"truncation": True},
    "npu_proxy.server.apis.infinity.RerankBody": {"raw_scores": False},
    "npu_proxy.server.apis.gemini.EmbedContent": {"content": {"parts": [{"text": LONG}]}},
    "npu_proxy.server.apis.llama_cpp.EmbeddingBody": {"content": TEXTS},
    "npu_proxy.server.apis.ollama.EmbedBody": {"input": TEXTS},
    "npu_proxy.server.apis.ollama.PromptBody": {"prompt": LONG},
}
"""What a body needs besides, or instead of, the fields in REQUIRED."""
ASKS: dict[str, list[Any]] = {
    "model": ["no-such-model"],
    "dimensions": [8],
    "output_dimension": [8],
    "output_dimensionality": [8],
    "outputDimensionality": [8],
    "encoding_format": ["base64"],
    "output_encoding": ["base64"],
    "embedding_type": ["ubinary", ["float", "int8"]],
    "embedding_types": [["int8"]],
    "encoding_type": ["base64"],
    "output_dtype": ["int8"],
    "embed_dtype": ["fp8_e4m3"],
    "input_type": ["query"],
    "task": ["retrieval.query"],
    "task_type": ["RETRIEVAL_QUERY"],
    "taskType": ["RETRIEVAL_QUERY"],
    "prompt_name": ["query", "no-such-prompt"],
    "prompt": ["sea: "],
    "truncate": [False, "NONE"],
    "auto_truncate": [False],
    "autoTruncate": [False],
    "truncation": [False],
    "truncation_side": ["left"],
    "truncation_direction": ["left"],
    "truncate_prompt_tokens": [6],
    "max_tokens": [6],
    "max_tokens_per_doc": [4],
    "max_chunks_per_doc": [5],
    "max_length": [3],
    "normalize": [False],
    "normalized": [False],
    "use_activation": [False],
    "raw_scores": [True],
    "embd_normalize": [-1],
    "late_chunking": [True],
    "top_n": [1],
    "top_k": [1],
    "return_documents": [True, False],
    "return_text": [True],
    "return_token_strs": [True],
    "with_pieces": [True],
    "rank_fields": [["title"]],
    "add_special_tokens": [False],
    "add_special": [True],
    "skip_special_tokens": [False],
    "parameters": [{"truncate": False}, {"top_k": 1}],
    "options": [{"num_ctx": 4}],
    "config": [{"task_type": "query"}],
}
"""A value of each field that must make a difference: another answer, or an error."""
WITHOUT_EFFECT = {
    "keep_alive": "for how long the model stays loaded",
    "endianness": "only with base64; tests/server/apis/test_openai.py",
    "queries": "another name; tests/server/apis/test_vllm.py",
    "documents": "another name; tests/server/apis/test_vllm.py",
    "data_1": "another name",
    "data_2": "another name",
    "items": "another name",
    "text_1": "required",
    "text_2": "required",
    "input": "another name, or required",
    "inputs": "another name, or required",
}


def cases() -> Iterator[Any]:
    for dialect in DIALECTS:
        seen: set[type[RequestBody]] = set()
        for route in dialect.routes:
            if isinstance(route, InferenceRoute | TokenizerRoute) and route.body not in seen:
                seen.add(route.body)
                yield pytest.param(dialect, route, id=f"{dialect.base}-{route.body.__name__}")


@pytest.fixture(scope="module")
def apps() -> Iterator[dict[str, ASGIApp]]:
    engines = {}
    for name in MODELS:
        settings = Settings(model=(str(GOLDEN / name),), device="cpu", load_on_demand=False, cache_mb=0)
        engines[name] = (Engine(settings=settings).start(), settings)
    yield {name: app_of(*engine) for name, engine in engines.items()}
    for engine, _ in engines.values():
        engine.stop()


def plain_body(body: type[RequestBody]) -> dict[str, Any]:
    name = f"{body.__module__}.{body.__qualname__}"
    required = {field: REQUIRED[field] for field in body.__struct_fields__ if field in REQUIRED and _is_required(body, field)}
    return {**required, **SPECIAL.get(name, {})}


def _is_required(body: type[RequestBody], field: str) -> bool:
    (found,) = [known for known in msgspec.structs.fields(body) if known.name == field]
    return found.required


def answer(apps: dict[str, ASGIApp], dialect: Dialect, route: Any, body: dict[str, Any]) -> httpx.Response:
    models = RANKED if route.body is ScoreBody else MODELS
    name = next(name for name in models if route.suits(read_spec(GOLDEN / name)))

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(apps[name]), base_url="http://localhost") as http:
            path = f"/{dialect.base}{route.path}".replace("{id:path}", name)
            return await http.post(path, json=body)

    return asyncio.run(run())


def numbers(response: httpx.Response) -> Any:
    """A reply without what differs every time."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            ours = ("id", "created", "total_duration", "load_duration")
            return {key: cleaned(part) for key, part in value.items() if key not in ours or isinstance(part, dict | list)}
        if isinstance(value, list):
            return [cleaned(part) for part in value]
        return round(value, 5) if isinstance(value, float) else value

    return cleaned(response.json())


@pytest.mark.parametrize(("dialect", "route"), list(cases()))
def test_every_field_does_what_the_table_says(apps: dict[str, ASGIApp], dialect: Dialect, route: Any) -> None:
    plain = plain_body(route.body)
    first = answer(apps, dialect, route, plain)
    assert first.status_code == 200, first.text
    without = numbers(first)
    for name in route.body.__struct_fields__:
        if name in WITHOUT_EFFECT or (name in plain and name in REQUIRED):
            continue
        effects = [answer(apps, dialect, route, {**plain, name: value}) for value in ASKS[name]]
        assert any(found.status_code != 200 or numbers(found) != without for found in effects), f"{name} is ignored"
        assert all(found.status_code < 500 for found in effects), name
        wrong = answer(apps, dialect, route, {**plain, name: {"no": ["such"]}})
        if name not in ("parameters", "options", "config"):
            assert 400 <= wrong.status_code < 500, name
        assert numbers(answer(apps, dialect, route, {**plain, name: None})) == without or name in plain, name
    for name, refused in route.body.refused.items():
        for value in ("something", ["something"], 7):
            found = answer(apps, dialect, route, {**plain, name: value})
            assert 400 <= found.status_code < 500, name
            assert name in found.text, found.text
        for value in (None, *refused.neutral):
            assert numbers(answer(apps, dialect, route, {**plain, name: value})) == without, name
    for name in route.body.harmless:
        where, _, within = name.partition(".")
        for value in ("something", 7, None, {"a": [1]}):
            if name == "priority":
                value = "bulk"  # noqa: PLW2901
            given = {within.replace("*", "temperature"): value} if within else value
            found = answer(apps, dialect, route, {**plain, where: given})
            assert numbers(found) == without, (name, found.text)


def test_fields_that_nobody_knows_are_ignored(apps: dict[str, ASGIApp]) -> None:
    for param in cases():
        dialect, route = param.values
        plain = plain_body(route.body)
        more = {**plain, "x_unknown": {"a": [None, 1]}}
        assert numbers(answer(apps, dialect, route, more)) == numbers(answer(apps, dialect, route, plain))


def test_the_page_says_what_the_tables_say() -> None:
    specification = importlib.util.spec_from_file_location("fields", ROOT / "tools" / "docs" / "fields.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert (ROOT / "docs" / "fields.md").read_text(encoding="utf-8") == module.page(), "run `make docs`"
