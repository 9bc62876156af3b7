"""The OpenAPI document, made from the dialects' own types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from npu_proxy.server.dialect import Action, Dialect, Endpoint, Query
from npu_proxy.server.ops import Health
from npu_proxy.version import __version__

_REF = "#/components/schemas/{name}"


def document(dialects: Sequence[Dialect]) -> dict[str, Any]:
    """OpenAPI 3.1 of all dialects' paths and of /health."""
    types: list[Any] = [Health]
    for dialect in dialects:
        types += [dialect.error, *(query.response for query in dialect.queries)]
        types += [kind for item in (*dialect.endpoints, *dialect.actions) for kind in (item.body, item.response)]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    schema = dict(zip(types, schemas, strict=True))
    health = {"description": "ready", "content": _json(schema[Health])}
    paths: dict[str, Any] = {
        "/health": {"get": {"summary": "Ready or not", "tags": ["operations"], "responses": {"200": health, "503": health}}}
    }
    for dialect in dialects:
        errors = {str(status): {"description": words, "content": _json(schema[dialect.error])} for status, words in _ERRORS.items()}
        for item in (*dialect.endpoints, *dialect.actions, *dialect.queries):
            answer = {"200": {"description": "done", "content": _json(schema[item.response])}}
            operation: dict[str, Any] = {"summary": item.summary, "tags": [dialect.name], "responses": answer | errors}
            if not isinstance(item, Query):
                operation["requestBody"] = {"required": True, "content": _json(schema[item.body])}
                operation["parameters"] = [_TIMEOUT]
            elif "{id" in item.path:
                operation["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
            paths[item.path.replace(":path}", "}")] = {_method(item): operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "npu-proxy", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {"schemas": components},
    }


_ERRORS = {
    400: "the request is wrong",
    401: "no API key, or a wrong one",
    403: "switched off here",
    404: "no such model",
    413: "the body is too large",
    422: "the request is wrong (text-embeddings-inference)",
    424: "the loaded model has no such head (text-embeddings-inference)",
    429: "overloaded (text-embeddings-inference, Cohere); Retry-After says when to try again",
    500: "a fault of npu-proxy",
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


def _method(item: Endpoint | Action | Query) -> str:
    match item:
        case Query():
            return "get"
        case Action():
            return item.method.lower()
        case _:
            return "post"


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
