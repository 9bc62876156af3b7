"""Make docs/fields.md from the body types of all APIs: which fields of their requests are obeyed, refused or harmless.

Usage: python tools/docs/fields.py > docs/fields.md
"""

from __future__ import annotations

from collections.abc import Iterator

from npu_proxy.server.apis.contract import Dialect, ModelQuery, RequestBody
from npu_proxy.server.http.app import DIALECTS

_HEAD = """# Fields of requests

Which fields of each API's requests npu-proxy obeys, and what becomes of the others. Made by `make docs` from the body types in
`src/npu_proxy/server/apis/`; a test sends every field.

- **obeyed**: the reply is what the field asks for, or the request is refused because it cannot be. `null` means the default.
  Booleans and numbers may be strings, and whole numbers may be floats (`"true"`, `"8"`, `8.0`).
- **refused**: the field would change the result, and is not supported; a request with it is an error that names it. Values in
  brackets ask for nothing, and are accepted.
- **harmless**: the field does not change the result, and is ignored.

Any other field is ignored, as the APIs themselves do, except within `parameters` of text-embeddings-inference. Routes that compute
also have `priority` (the lane of the request) and `on_error` (what a request for vectors gets if some of its texts fail);
`X-Request-Timeout` or `?timeout=` sets a time limit.
"""


def page() -> str:
    """Return the whole page."""
    return "\n".join([_HEAD, *(line for dialect in DIALECTS for line in _section(dialect))]) + "\n"


def _section(dialect: Dialect) -> Iterator[str]:
    bodies: dict[type[RequestBody], list[str]] = {}
    for route in dialect.routes:
        if not isinstance(route, ModelQuery):
            bodies.setdefault(route.body, []).append(f"{route.method} {route.path.replace(':path}', '}')}")
    yield f"## {dialect.name}\n"
    yield f"Below `/{dialect.base}`, this API answers on paths that several share.\n"
    for body, paths in bodies.items():
        yield "### " + ", ".join(f"`{path}`" for path in dict.fromkeys(paths)) + "\n"
        yield "| field | | type, or reason |"
        yield "| --- | --- | --- |"
        yield from map(_row, _rows(body))
        yield ""


def _rows(body: type[RequestBody]) -> Iterator[tuple[str, str, str]]:
    types = {name: text for kind in reversed(body.__mro__) for name, text in getattr(kind, "__annotations__", {}).items()}
    for name in body.__struct_fields__:
        yield name, "obeyed", f"`{types[name]}`"
    for name, refused in body.refused.items():
        neutral = ", ".join(f"`{str(value).lower()}`" for value in refused.neutral)
        yield name, "refused", refused.why + (f" ({neutral})" if neutral else "")
    for name, why in body.harmless.items():
        yield name, "harmless", why


def _row(cells: tuple[str, str, str]) -> str:
    name, kind, text = cells
    return f"| `{name}` | {kind} | {text.replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    print(page(), end="")
