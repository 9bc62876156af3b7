"""The OpenAPI document, made from the dialects' own types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from npu_proxy.server.dialect import Dialect, Query, Route
from npu_proxy.server.ops import Health
from npu_proxy.version import __version__

_REF = "#/components/schemas/{name}"
Json = dict[str, Any]


def document(dialects: Sequence[Dialect]) -> Json:
    """OpenAPI 3.1 of all dialects' paths and of /health. A path of several dialects takes the body of any of them."""
    types: list[Any] = [Health]
    for dialect in dialects:
        types += [dialect.error, *(route.response for route in dialect.routes if route.response is not None)]
        types += [route.body for route in dialect.routes if not isinstance(route, Query)]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF, schema_hook=lambda _: {})
    schema = dict(zip(map(repr, types), schemas, strict=True))
    health = {"description": "ready", "content": _json(schema[repr(Health)])}
    paths: Json = {
        "/health": {"get": {"summary": "Ready or not", "tags": ["operations"], "responses": {"200": health, "503": health}}},
        "/": {"get": {"summary": "A sign of life", "tags": ["operations"], "responses": {"200": _plain("alive")}}},
    }
    for dialect in dialects:
        for route in dialect.routes:
            operation = _operation(dialect, route, schema)
            methods = paths.setdefault(route.path.replace(":path}", "}"), {})
            known = methods.get(route.method.lower())
            methods[route.method.lower()] = _merged(known, operation) if known else operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "npu-proxy", "version": __version__, "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}},
        "paths": paths,
        "components": {"schemas": components},
    }


def _operation(dialect: Dialect, route: Route, schema: Json) -> Json:
    error = schema[repr(dialect.error)]
    answers: Json = {str(status): {"description": words, "content": _json(error)} for status, words in _ERRORS.items()}
    if route.response is not None:
        answers["200"] = {"description": "done", "content": _json(schema[repr(route.response)])}
    operation: Json = {"summary": route.summary, "tags": [dialect.name], "responses": answers}
    if not isinstance(route, Query):
        operation["requestBody"] = {"required": True, "content": _json(schema[repr(route.body)])}
        operation["parameters"] = [_TIMEOUT]
    elif "{id" in route.path:
        operation["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}]
    return operation


def _merged(one: Json, other: Json) -> Json:
    """Two operations of one path: either body, either answer."""
    responses: Json = dict(one["responses"])
    for status, answer in other["responses"].items():
        responses[status] = _either(responses[status], answer) if status in responses else answer
    return {
        **one,
        "summary": f"{one['summary']}; or: {other['summary']}" if one["summary"] != other["summary"] else one["summary"],
        "tags": [*one["tags"], *other["tags"]],
        "requestBody": {"required": True, **_either(one["requestBody"], other["requestBody"])},
        "responses": responses,
    }


def _either(one: Json, other: Json) -> Json:
    parts: list[Json] = []
    for content in (one["content"], other["content"]):
        found = content["application/json"]["schema"]
        parts += [part for part in found.get("anyOf", [found]) if part not in parts]
    return {**one, "content": _json({"anyOf": parts} if len(parts) > 1 else parts[0])}


_ERRORS = {
    400: "the request is wrong",
    401: "no API key, or a wrong one",
    403: "switched off here",
    404: "no such model",
    413: "the body is too large",
    422: "the request is wrong (text-embeddings-inference, Infinity)",
    424: "the loaded model has no such head (text-embeddings-inference)",
    429: "overloaded (text-embeddings-inference, Cohere); Retry-After says when to try again",
    500: "a fault of npu-proxy",
    502: "a model could not be fetched",
    503: "overloaded or not ready; Retry-After says when to try again",
    504: "the deadline has passed",
}
_TIMEOUT = {
    "name": "timeout",
    "in": "query",
    "required": False,
    "description": "Seconds until 504; the header X-Request-Timeout does the same",
    "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": 3600},
}


def _json(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


def _plain(words: str) -> Json:
    return {"description": words, "content": {"text/plain": {"schema": {"type": "string"}}}}
