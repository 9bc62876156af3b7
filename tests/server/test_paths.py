"""Paths that stand for others: base paths of models and APIs, prefixes that clients double, names with slashes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_proxy.server.http.paths import Meant, meant

EXACT = {
    ("POST", path)
    for path in (
        "/",
        "/rerank",
        "/embed",
        "/embeddings",
        "/v1/embeddings",
        "/v1/rerank",
        "/v2/embed",
        "/api/embed",
        "/pipeline/feature-extraction",
    )
}
EXACT |= {("GET", path) for path in ("/", "/info", "/v1/models", "/health")}
PREFIXED = {"GET": ("/v1/models/", "/models/"), "POST": ("/v1beta/models/",)}


def found(method: str, path: str) -> Meant | None:
    def named(method: str, path: str) -> bool:
        return any(path.startswith(prefix) for prefix in PREFIXED.get(method, ()))

    return meant(method, path, lambda method, path: (method, path) in EXACT, named, ("infinity", "tei"))


@pytest.mark.parametrize(
    ("method", "path", "wanted"),
    [
        ("POST", "//v1/embeddings", Meant("/v1/embeddings")),
        ("POST", "/v1//embeddings", Meant("/v1/embeddings")),
        ("POST", "/v1/v1/embeddings", Meant("/v1/embeddings")),
        ("POST", "/v1/v2/embed", Meant("/v2/embed")),
        ("POST", "/v3/v1/embeddings", Meant("/v1/embeddings")),
        ("POST", "/openai/v1/embeddings", Meant("/v1/embeddings")),
        ("POST", "/api/v1/embeddings", Meant("/v1/embeddings")),
        ("POST", "/v1/api/embed", Meant("/api/embed")),
        ("POST", "/pipeline/feature-extraction", Meant("/pipeline/feature-extraction")),
        ("POST", "/pipeline/feature-extraction/org/name", Meant("/", "org/name")),
        ("POST", "/models/org/name/pipeline/feature-extraction", Meant("/pipeline/feature-extraction", "org/name")),
        ("POST", "/openai/deployments/ada/embeddings", Meant("/embeddings", "ada")),
        ("POST", "/v1/engines/ada/embeddings", Meant("/embeddings", "ada")),
        ("POST", "/models/ada/v1/embeddings", Meant("/v1/embeddings", "ada")),
        ("POST", "/models/org%2Fname/embed", Meant("/embed", "org/name")),
        ("POST", "/models/org/name/embed", Meant("/embed", "org/name")),
        ("POST", "/models/ada", Meant("/", "ada")),
        ("POST", "/models/ada/", Meant("/", "ada")),
        ("POST", "/models/org/name", Meant("/", "org/name")),
        ("GET", "/models/ada/info", Meant("/info", "ada")),
        ("GET", "/models/org%2Fname/info", Meant("/info", "org/name")),
        ("GET", "/models/ada/v1/models", Meant("/v1/models", "ada")),
        ("GET", "/models/org/name", Meant("/models/org/name")),
        ("POST", "/infinity/rerank", Meant("/rerank", None, "infinity")),
        ("POST", "/infinity/models/ada/rerank", Meant("/rerank", "ada", "infinity")),
        ("POST", "/models/ada/tei/rerank", Meant("/rerank", "ada", "tei")),
        ("POST", "/infinity", Meant("/", None, "infinity")),
        ("POST", "/v1beta/models/org/name:embedContent", Meant("/v1beta/models/org/name:embedContent")),
        ("POST", "/models/m:batchEmbedContents", None),
        ("POST", "/nothing", None),
        ("GET", "/models", None),
        ("DELETE", "/models/ada/embed", None),
        ("POST", "/models//embed", Meant("/", "embed")),
        ("POST", "/models/ada/nothing/at/all", None),
        ("POST", "/v1/models/ada/embed", None),
        ("GET", "/v1/engines/a" * 76, None),
        ("POST", "/infinity" * 6 + "/rerank", None),
    ],
)
def test_a_path_stands_for_a_route(method: str, path: str, wanted: Meant | None) -> None:
    assert found(method, path) == wanted


@given(
    st.sampled_from(["GET", "POST", "PUT"]),
    st.lists(st.sampled_from(["models", "v1", "a%2Fb", "infinity", "embed", "", "%", "..", ":"])),
)
def test_any_path_is_a_route_or_none(method: str, parts: list[str]) -> None:
    result = found(method, "/" + "/".join(parts))
    if result is not None and (method, result.path) not in EXACT:
        assert any(result.path.startswith(prefix) for prefix in PREFIXED[method])


@pytest.mark.parametrize(
    "part", ["/models/a", "/models/a:", "/v1/engines/a", "/infinity", "/v1/v1", "/openai/deployments/x", "//", "/%2F"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_a_long_path_takes_a_few_steps(method: str, part: str) -> None:
    steps = 0

    def known(_method: str, _path: str) -> bool:
        nonlocal steps
        steps += 1
        return False

    assert meant(method, part * 200, known, known, ("infinity",)) is None or method == "POST"
    assert steps < 20
