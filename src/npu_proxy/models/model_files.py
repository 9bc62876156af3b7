"""The JSON files of a model folder: modules.json, config.json, and the files that sentence-transformers adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

from npu_proxy.errors import ModelError
from npu_proxy.models.json_files import Json, inside, read_json, read_object, short_path
from npu_proxy.models.weights import Tensors, weight_files

_FIRST_MODULES = ("Transformer", "MLMTransformer", "StaticEmbedding")
_STATIC_LENGTH = 512
"""Maximum number of tokens per text for static models, as in their own code."""


_LARGEST_NUMBER = 1 << 24
"""Largest size in a configuration; vocabularies have up to about a million entries."""
_MOST_TOKENS = 1 << 17
"""Largest limit of tokens per text, whatever a model states: position tables of this length already have 100 MB."""


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Contents of the files. transformer: the folder of the transformer.

    modules: modules.json, or empty if it is missing. limits: sentence_bert_config.json. about: config_sentence_transformers.json.
    config: config.json.
    """

    folder: Path
    transformer: Path
    modules: Sequence[Json]
    limits: Json
    about: Json
    config: Json

    @property
    def module_types(self) -> list[str]:
        """The class names of the modules."""
        return [str(module["type"]).rsplit(".", 1)[-1] for module in self.modules]

    @property
    def architecture(self) -> str:
        """The first entry of config.json's architectures, or ""."""
        return str((self.config.get("architectures") or [""])[0])


def read_files(folder: Path) -> ModelFiles:
    """Read the files of a model folder. Raises ModelError naming the file at fault."""
    modules = _read_modules(folder)
    transformer = inside(folder, str(modules[0]["path"])) if modules else folder
    return ModelFiles(
        folder=folder,
        transformer=transformer,
        modules=modules,
        limits=read_object(transformer / "sentence_bert_config.json", optional=True),
        about=read_object(folder / "config_sentence_transformers.json", optional=True),
        config=_read_config(folder, transformer, modules),
    )


def max_length(config: Json, files: ModelFiles) -> int:
    """The model's own limit in tokens: from sentence_bert_config.json or the tokenizer's config, up to its number of positions."""
    positions = number(config, "max_position_embeddings", files.transformer)
    stated = files.limits.get("max_seq_length")
    if stated is None:
        stated = read_object(files.transformer / "tokenizer_config.json", optional=True).get("model_max_length", positions)
    if isinstance(stated, bool) or not isinstance(stated, int | float) or not stated >= 1:  # NaN is not, either
        found = str(stated)[:40]
        raise ModelError(f"{files.transformer.name}: the maximum number of tokens is `{found}`, not a number of at least 1")
    return int(min(stated, positions, _MOST_TOKENS))


def number(config: Json, key: str, folder: Path) -> int:
    """A positive integer in config.json. Raises ModelError if it is missing, or anything else."""
    value = config.get(key)
    if value is None:
        missing(folder / "config.json", key)
    if type(value) is not int or not 1 <= value <= _LARGEST_NUMBER:
        found = str(value)[:40]
        raise ModelError(f"{short_path(folder / 'config.json')}: `{key}` is `{found}`, not a number from 1 to {_LARGEST_NUMBER}")
    return value


def missing(file: Path, key: str) -> NoReturn:
    """Raise ModelError for a key that is missing from a file."""
    raise ModelError(f"{short_path(file)}: `{key}` is missing")


def _read_config(folder: Path, transformer: Path, modules: Sequence[Json]) -> Json:
    """config.json, completed from the weights for static models, which may have none."""
    static = bool(modules) and str(modules[0]["type"]).endswith(".StaticEmbedding")
    config = read_object(transformer / "config.json", optional=static)
    if static or config.get("model_type") == "model2vec":
        tensors = Tensors(weight_files(transformer))
        rows, width = tensors.shape("embedding.weight" if "embedding.weight" in tensors else "embeddings")
        vocabulary = tensors.shape("mapping")[0] if "mapping" in tensors else rows
        return {
            **config,
            "model_type": "model2vec",
            "hidden_size": width,
            "vocab_size": vocabulary,
            "max_position_embeddings": _STATIC_LENGTH,
        }
    return config or read_object(folder / "config.json")


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
    listed = [module for _, module in sorted(enumerate(listed), key=lambda pair: pair[1].get("idx", pair[0]))]
    if str(listed[0]["type"]).rsplit(".", 1)[-1] not in _FIRST_MODULES:
        known = " or ".join(_FIRST_MODULES)
        raise ModelError(f"modules.json: the first module is `{listed[0]['type']}`; only {known} is supported")
    return listed
