"""The OpenAPI document, built from the dialects' own types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from npu_proxy.server.apis.contract import Dialect, InferenceRoute, ModelQuery, Route
from npu_proxy.server.ops.health import Health
from npu_proxy.version import __version__

_REF = "#/components/schemas/{name}"
Json = dict[str, Any]


def document(dialects: Sequence[Dialect]) -> Json:
    """Return OpenAPI 3.1 for /health and the paths of all dialects. A path that dialects share accepts the body of any."""
    types: list[Any] = [Health]
    for dialect in dialects:
        types += [dialect.error, *(route.reply for route in dialect.routes if route.reply is not None)]
        types += [route.body for route in dialect.routes if not isinstance(route, ModelQuery)]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF, schema_hook=lambda _: {})
    schema = dict(zip(map(repr, types), schemas, strict=True))
    health = {"description": "the server's state", "content": _json(schema[repr(Health)])}
    paths: Json = {
        "/health": {
            "get": {"summary": "Whether the server is ready", "tags": ["operations"], "responses": {"200": health, "503": health}}
        },
        "/": {
            "get": {
                "summary": "Whether the server is running",
                "tags": ["operations"],
                "responses": {"200": _plain("the server is running")},
            }
        },
    }
    for dialect in dialects:
        for route in dialect.routes:
            operation = _operation(dialect, route, schema)
            methods = paths.setdefault(route.path.replace(":path}", "}"), {})
            known = methods.get(route.method.lower())
            methods[route.method.lower()] = _merged(known, operation) if known else operation
    if (root := paths["/"].get("post")) is not None and "/models/{id}" in paths:  # the base path of a model (http/paths.py)
        paths["/models/{id}"]["post"] = {**root, "parameters": [*root["parameters"], _ID]}
    return {
        "openapi": "3.1.0",
        "info": {"title": "npu-proxy", "version": __version__, "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}},
        "paths": paths,
        "components": {"schemas": components},
    }


def _operation(dialect: Dialect, route: Route, schema: Json) -> Json:
    error = schema[repr(dialect.error)]
    responses: Json = {str(status): {"description": words, "content": _json(error)} for status, words in _ERRORS.items()}
    if route.reply is not None:
        responses["200"] = {"description": "success", "content": _json(schema[repr(route.reply)])}
    operation: Json = {"summary": route.summary, "tags": [dialect.name], "responses": responses}
    if not isinstance(route, ModelQuery):
        operation["requestBody"] = {"required": True, "content": _json(schema[repr(route.body)])}
        operation["parameters"] = [_TIMEOUT, *([_PRIORITY] if isinstance(route, InferenceRoute) else [])]
    if "{id" in route.path:
        operation["parameters"] = [*operation.get("parameters", []), _ID]
    return operation


def _merged(first: Json, second: Json) -> Json:
    """Merge two operations of one path into one that accepts either body and returns either response."""
    responses: Json = dict(first["responses"])
    for status, response in second["responses"].items():
        responses[status] = _either(responses[status], response) if status in responses else response
    return {
        **first,
        "summary": f"{first['summary']}; or: {second['summary']}" if first["summary"] != second["summary"] else first["summary"],
        "tags": [*first["tags"], *second["tags"]],
        "requestBody": {"required": True, **_either(first["requestBody"], second["requestBody"])},
        "responses": responses,
    }


def _either(first: Json, second: Json) -> Json:
    parts: list[Json] = []
    for content in (first["content"], second["content"]):
        schema = content["application/json"]["schema"]
        parts += [part for part in schema.get("anyOf", [schema]) if part not in parts]
    return {**first, "content": _json({"anyOf": parts} if len(parts) > 1 else parts[0])}


_ERRORS = {
    400: "the request is invalid",
    401: "the API key is missing or invalid",
    403: "not allowed on this server",
    404: "the model does not exist",
    413: "the body is too large",
    422: "the request is invalid (text-embeddings-inference, Infinity)",
    424: "the model does not support the request, or a device failed (text-embeddings-inference)",
    429: "overloaded (text-embeddings-inference, Cohere); retry after the seconds in Retry-After",
    500: "internal error",
    502: "a model could not be downloaded",
    503: "overloaded or not ready; retry after the seconds in Retry-After",
    504: "the deadline has passed",
}
_ID = {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
_TIMEOUT = {
    "name": "timeout",
    "in": "query",
    "required": False,
    "description": "Seconds after which the server responds 504; the header X-Request-Timeout has the same effect",
    "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": 3600},
}


def _json(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


def _plain(words: str) -> Json:
    return {"description": words, "content": {"text/plain": {"schema": {"type": "string"}}}}


_PRIORITY = {
    "name": "priority",
    "in": "header",
    "required": False,
    "description": "The lane among the requests of the same client; a field `priority` in the body has the same effect",
    "schema": {"type": "string", "enum": ["interactive", "bulk"]},
}
