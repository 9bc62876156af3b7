"""Sparse models whose queries are not computed: a Router with a table of weights (IDF) for queries, and SPLADE for documents.

A query's vector has the table's weight at each of its tokens. Other routers, with two models, are refused.
Source: sentence-transformers 6.2 ``router.py`` and ``sparse_static_embedding.py``; Geng et al. 2024 (inference-free retrievers).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from npu_proxy.errors import ModelError, model_errors, unread_error
from npu_proxy.models.json_files import MOST_TOKENS, OWN_PATHS, Json, JsonObject, inside, read_object, short_path
from npu_proxy.models.tokenizer_json import read_tokenizer_file
from npu_proxy.models.unread import FolderReader
from npu_proxy.models.weights import KeptTensors, weight_files
from npu_proxy.spec import ModelSpec, QueryWeights, StoredLayer

_ROUTERS = ("Router", "Asym")


def without_router(modules: Sequence[Json], folder: Path, reader: FolderReader) -> tuple[Sequence[Json], Path | None, bool]:
    """The modules for documents, the folder of the query's table if there is one, and whether a text is a query by default.

    Raises ModelError for a router of another kind.
    """
    path = str(modules[0]["type"]) if modules else ""
    if path.rsplit(".", 1)[-1] not in _ROUTERS or not path.startswith(OWN_PATHS):
        return modules, None, False
    place = str(modules[0]["path"])
    file = inside(folder, place) / "router_config.json"
    if not file.is_file():
        file = file.with_name("config.json")
    config = reader.object(file, kind="Router")
    with model_errors(short_path(file)):
        types, structure = dict(config["types"]), dict(config["structure"])
        parameters = config.get("parameters") or {}
        if set(structure) != {"query", "document"} or parameters.get("route_mappings"):
            raise ModelError(
                f"{short_path(file)}: `structure` has the routes {', '.join(structure)}; only query and document are supported"
            )
        query = [(name, str(types[name])) for name in structure["query"]]
        if len(query) != 1 or not query[0][1].endswith(".SparseStaticEmbedding") or not query[0][1].startswith(OWN_PATHS):
            kinds = ", ".join(kind for _, kind in query)
            raise ModelError(f"{short_path(file)}: the route `query` is {kinds}; only a SparseStaticEmbedding is supported")
        default = parameters.get("default_route") or next(iter(structure))
        prefix = f"{place}/" if place not in ("", ".") else ""
        documents = [{"type": types[name], "path": f"{prefix}{name}"} for name in structure["document"]]
        return [*documents, *modules[1:]], inside(folder, f"{prefix}{query[0][0]}"), default == "query"


def query_weights(spec: ModelSpec, folder: Path, settings: JsonObject, reader: FolderReader, *, default: bool) -> QueryWeights:
    """The table of weights of a query's tokens. settings: tokenizer_config.json of documents. Raises ModelError."""
    config = reader.object(folder / "config.json", kind="SparseStaticEmbedding", optional=True)
    if config.get("path"):
        raise ModelError(f"{folder.name}/config.json: `path` names a file elsewhere; only weights in the folder are supported")
    tensors = KeptTensors(weight_files(folder))
    other = next((name for name in tensors if name != "weight"), None)
    if other is not None and not reader.accepts(other):
        raise unread_error(f"{folder.name}: nothing reads the tensor `{other}`", other)
    shape = tuple(tensors.shape("weight"))
    if len(shape) != 1 or not 0 < shape[0] <= spec.vocabulary:
        raise ModelError(
            f"{folder.name}: `weight` has the shape {list(shape)}, unlike the {spec.vocabulary} tokens of `vocab_size`"
        )
    _check_tokenizer(spec, folder)
    stated = _own_settings(folder, settings).get("model_max_length", MOST_TOKENS)
    if isinstance(stated, bool) or not isinstance(stated, int | float) or not stated >= 1:
        raise ModelError(
            f"{folder.name}/tokenizer_config.json: `model_max_length` is `{str(stated)[:40]}`, not a number of at least 1"
        )
    layer = StoredLayer(tensors=tensors, prefix="", shape=shape)
    return QueryWeights(layer=layer, limit=int(min(stated, MOST_TOKENS)), default=default)


def _own_settings(folder: Path, settings: JsonObject) -> Json:
    """The query's tokenizer_config.json. Raises ModelError if it says more than its limit otherwise than that of documents."""
    own, known = read_object(folder / "tokenizer_config.json", optional=True), settings.content
    for key in sorted({*own, *known} - {"model_max_length"} if own else ()):
        if own.get(key) != known.get(key):
            raise ModelError(
                f"{folder.name}/tokenizer_config.json: `{key}` is `{str(own.get(key))[:40]}`, unlike that of documents"
            )
    return own


def _check_tokenizer(spec: ModelSpec, folder: Path) -> None:
    """Raise ModelError if queries have another tokenizer than documents; their settings are those of the documents' tokenizer."""
    own = [folder / file.name for file in spec.tokenizer.files]
    if not all(file.is_file() for file in own) or read_tokenizer_file(own) != read_tokenizer_file(spec.tokenizer.files):
        raise ModelError(f"{folder.name}: queries have another tokenizer than documents, which is not supported")
