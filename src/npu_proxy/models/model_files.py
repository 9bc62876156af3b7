"""The JSON files of a model folder: modules.json, config.json, and the files that sentence-transformers adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

from npu_proxy.errors import ModelError, model_errors, unread_error
from npu_proxy.graph.keys import size
from npu_proxy.models.json_files import MOST_TOKENS, OWN_PATHS, Json, JsonObject, inside, read_json, short_path
from npu_proxy.models.late_interaction import PYLATE_KEYS
from npu_proxy.models.lora import CONFIG, adapter_scale, base_folder
from npu_proxy.models.router import without_router
from npu_proxy.models.unread import FolderReader
from npu_proxy.models.weights import Tensors, weight_files

_FIRST_MODULES = ("Transformer", "MLMTransformer", "StaticEmbedding")
STATIC_LENGTH = 512
"""Maximum number of tokens per text of model2vec, unless config.json says otherwise."""


_LIMITS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
"""Names that sentence-transformers has given to one file; the first that is not empty counts."""
_NEWEST = 6
_OWN_CODE = {"nomic_bert": ("NomicBert",), "new": ("New",), "gte": ("Gte",), "qwen3": ("Qwen3BidirectionalModel",)}
"""Prefixes of classes in a model's own code (`auto_map`) that graph/ computes, by model type."""


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Contents of the files.

    transformer: the folder of the transformer. base: of its config.json and weights. adapter_scale: of a LoRA adapter, else 0.
    modules: modules.json, or empty if it is missing. limits: sentence_bert_config.json. about: config_sentence_transformers.json.
    config: config.json. tokenizer_config: tokenizer_config.json. reader: what was not read of them. query_folder: of the table of
    weights, if queries are not computed; query_default: whether texts are queries by default.
    """

    reader: FolderReader
    query_folder: Path | None
    query_default: bool
    folder: Path
    transformer: Path
    base: Path
    adapter_scale: float
    modules: Sequence[JsonObject]
    limits: JsonObject
    about: JsonObject
    config: JsonObject
    tokenizer_config: JsonObject

    @property
    def module_types(self) -> list[str]:
        """The class names of the modules."""
        return [str(module["type"]).rsplit(".", 1)[-1] for module in self.modules]

    @property
    def architecture(self) -> str:
        """The first entry of config.json's architectures, or ""."""
        stated: Any = self.config.get("architectures") or [""]
        if not isinstance(stated, list):
            raise ModelError(f"config.json: `architectures` is `{str(stated)[:40]}`, not a list")
        return str(cast("list[Any]", stated)[0])

    @property
    def is_late(self) -> bool:
        """Whether the files name a late-interaction model."""
        by_pylate = any(str(module["type"]).startswith("pylate.") for module in self.modules)
        stated = self.about.get("model_type")
        written = "model_type" not in self.about and any(key in self.about for key in PYLATE_KEYS)
        return stated in ("ColBERT", "MultiVectorEncoder") or by_pylate or written

    @property
    def by_model2vec(self) -> bool:
        """Whether a static model's folder has the layout of model2vec, not only that of sentence-transformers."""
        return (self.transformer / "config.json").is_file() and "embeddings" in Tensors(weight_files(self.transformer))

    @property
    def major_version(self) -> int:
        """The major version of sentence-transformers that wrote the folder; of the newest if it is not stated."""
        versions = self.about.get("__version__")
        stated = versions.get("sentence_transformers") if isinstance(versions, JsonObject) else versions
        major = str(stated).split(".", 1)[0]
        return int(major) if major.isdecimal() else _NEWEST

    @property
    def scores_by_modules(self) -> bool:
        """Whether this is a cross-encoder whose scores come from its modules, not from the transformer's classifier."""
        classifies = self.limits.get("transformer_task") == "sequence-classification"
        return bool(self.modules) and self.about.get("model_type") == "CrossEncoder" and not classifies


def read_files(folder: Path, accept: Sequence[str] = ()) -> ModelFiles:
    """Read the files of a model folder. accept: keys that may be unread. Raises ModelError naming the file at fault."""
    reader = FolderReader(accept=accept)
    stored: Sequence[Json] = [reader.track(module, folder / "modules.json") for module in _read_modules(folder)]
    stored, query_folder, query_default = without_router(stored, folder, reader)
    modules = [module if isinstance(module, JsonObject) else JsonObject(module) for module in stored]
    _check_first(modules)
    transformer = inside(folder, str(modules[0]["path"])) if modules else folder
    base, scale = _base_of_adapter(transformer, reader)
    limits = _read_limits(transformer, reader)
    config = _read_config(folder, base, modules, reader)
    with model_errors(_LIMITS[0]):
        config_changes, tokenizer_changes = _overrides(limits, "config"), _overrides(limits, "tokenizer", "processor")
    tokenizer_config = reader.object(transformer / "tokenizer_config.json", optional=True)
    return ModelFiles(
        reader=reader,
        query_folder=query_folder,
        query_default=query_default,
        folder=folder,
        transformer=transformer,
        base=base,
        adapter_scale=scale,
        modules=modules,
        limits=limits,
        # sentence-transformers reads it only together with modules.json.
        about=reader.object(folder / "config_sentence_transformers.json", optional=True) if modules else JsonObject({}),
        config=reader.replace(config, config_changes),
        tokenizer_config=reader.replace(tokenizer_config, tokenizer_changes),
    )


def _read_limits(transformer: Path, reader: FolderReader) -> JsonObject:
    found = [reader.object(transformer / name, kind=_LIMITS[0], optional=True) for name in _LIMITS]
    return next((limits for limits in found if limits), found[0])


def _overrides(limits: JsonObject, *parts: str) -> Json:
    """What sentence_bert_config.json passes on, to be read in place of what another file says."""
    return {
        key: value
        for name in [f"{part}_{suffix}" for part in parts for suffix in ("kwargs", "args")]
        for key, value in (limits.get(name) or {}).items()
        if key != "trust_remote_code"
    }


def _base_of_adapter(transformer: Path, reader: FolderReader) -> tuple[Path, float]:
    """The folder of config.json and the weights, and the factor of a LoRA adapter's updates; 0 if there is no adapter."""
    if not (transformer / CONFIG).exists():
        return transformer, 0.0
    config = reader.object(transformer / CONFIG)
    return base_folder(transformer, config), adapter_scale(config)


def check_code(files: ModelFiles) -> None:
    """Raise ModelError for a model with code of its own that is not computed here."""
    auto_map = files.config.get("auto_map") or {}
    known = _OWN_CODE.get(str(files.config.get("model_type")), ())
    for value in auto_map.values():
        for path in value if isinstance(value, list) else [value]:
            name = str(path).rsplit(".", 1)[-1]
            if path is not None and not name.startswith(known) and not files.reader.accepts("auto_map"):
                raise unread_error(
                    f"config.json: `auto_map` names code of the model's own (`{name}`), which npu-proxy does not run", "auto_map"
                )


def max_length(config: Json, files: ModelFiles) -> int:
    """The model's own limit in tokens: from sentence_bert_config.json or the tokenizer's config, up to its number of positions."""
    positions: int = size("max_position_embeddings")(config)
    stated = files.limits.get("max_seq_length")
    if stated is None:
        stated = files.tokenizer_config.get("model_max_length", positions)
    if isinstance(stated, bool) or not isinstance(stated, int | float) or not stated >= 1:  # NaN is not, either
        found = str(stated)[:40]
        raise ModelError(
            f"{files.transformer.name}: `max_seq_length` or `model_max_length` is `{found}`, not a number of at least 1"
        )
    return int(min(stated, positions, MOST_TOKENS))


def missing(file: Path, key: str) -> NoReturn:
    """Raise ModelError for a key that is missing from a file."""
    raise ModelError(f"{short_path(file)}: `{key}` is missing")


def _read_config(folder: Path, transformer: Path, modules: Sequence[Json], reader: FolderReader) -> JsonObject:
    """config.json, completed from the weights for static models, which may have none."""
    static = bool(modules) and str(modules[0]["type"]).endswith(".StaticEmbedding")
    config = reader.object(transformer / "config.json", optional=static)
    if static or _is_static(transformer, config):
        tensors = Tensors(weight_files(transformer))
        rows, width = tensors.shape("embedding.weight" if "embedding.weight" in tensors else "embeddings")
        vocabulary = tensors.shape("mapping")[0] if "mapping" in tensors else rows
        known = {"hidden_size": width, "vocab_size": vocabulary, "max_position_embeddings": STATIC_LENGTH}
        return reader.replace(config, {"model_type": "model2vec", **known})
    return config or reader.object(folder / "config.json")


def _is_static(folder: Path, config: JsonObject) -> bool:
    """Whether a folder has the layout of model2vec, whose older releases write no `model_type`."""
    if config.get("model_type") == "model2vec" or config.get("architectures") == ["StaticModel"]:
        return True
    file = folder / "model.safetensors"
    return config.get("model_type") is None and file.is_file() and "embeddings" in Tensors([file])


def _read_modules(folder: Path) -> Sequence[Json]:
    file = folder / "modules.json"
    if not file.exists():
        return ()
    modules = read_json(file)
    if not isinstance(modules, list) or not modules:
        raise ModelError("modules.json: expected a list of modules")
    listed = cast("list[Any]", modules)
    for module in listed:
        if not isinstance(module, dict) or not {"type", "path"} <= set(cast("Json", module)):
            raise ModelError("modules.json: each module needs `type` and `path`")
        if not isinstance(module["path"], str) or not isinstance(module["type"], str):
            raise ModelError("modules.json: `type` and `path` of a module must be texts")
    return listed


def _check_first(modules: Sequence[Json]) -> None:
    path = str(modules[0]["type"]) if modules else ""
    if modules and (path.rsplit(".", 1)[-1] not in _FIRST_MODULES or not path.startswith(OWN_PATHS)):
        known = " or ".join(_FIRST_MODULES)
        raise ModelError(
            f"modules.json: the `type` of the first module is `{path}`; only {known} of sentence_transformers is supported"
        )
