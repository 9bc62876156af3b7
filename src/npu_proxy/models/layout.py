"""Reads a model folder into a ModelSpec: the sentence-transformers layout, or a plain Hugging Face folder.

Everything comes from the model's own files. What is missing or contradictory is a ModelError that names the file;
nothing is guessed, because a wrong pooling gives wrong vectors without an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from npu_proxy.errors import ModelError
from npu_proxy.graph.heads import ACTIVATIONS
from npu_proxy.models.fingerprint import fingerprint
from npu_proxy.models.weights import Tensors
from npu_proxy.types import Dense, ModelSpec, Pooling

Json = Mapping[str, Any]

_POOLING_FLAGS = {
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_max_tokens": Pooling.MAX,
    "pooling_mode_mean_sqrt_len_tokens": Pooling.MEAN_SQRT_LENGTH,
    "pooling_mode_weightedmean_tokens": Pooling.WEIGHTED_MEAN,
    "pooling_mode_lasttoken": Pooling.LAST_TOKEN,
}


def read_spec(folder: Path, *, name: str | None = None, pooling: Pooling | None = None) -> ModelSpec:
    """Read the model in ``folder``.

    pooling: required for a folder without modules.json, refused where it contradicts one.
    Raises ModelError for whatever is missing, contradictory or not supported, naming the file.
    """
    if not folder.is_dir():
        raise ModelError(f"model folder `{folder}` does not exist")
    config = _read_object(folder / "config.json")
    modules = _modules(folder)
    transformer = _transformer_folder(folder, modules)
    if transformer != folder:
        config = _read_object(transformer / "config.json")
    limits = _read_object(transformer / "sentence_bert_config.json", optional=True)
    prompts = _read_object(folder / "config_sentence_transformers.json", optional=True)
    stack = _stack(folder, modules, pooling, hidden=_number(config, "hidden_size", transformer))
    spec = ModelSpec(
        name=name or folder.resolve().name,
        folder=folder,
        family=str(config.get("model_type") or _missing(transformer / "config.json", "model_type")),
        config=config,
        weight_files=_weight_files(transformer),
        tokenizer_file=_existing(transformer / "tokenizer.json", "npu-proxy reads the fast tokenizer only"),
        pooling=stack.pooling,
        dense=stack.dense,
        width=stack.width,
        max_length=_max_length(config, limits, transformer),
        vocabulary=_number(config, "vocab_size", transformer),
        normalizes=stack.normalizes,
        lower_case=bool(limits.get("do_lower_case", False)),
        prompts=cast("dict[str, str]", prompts.get("prompts") or {}),
        default_prompt=prompts.get("default_prompt_name"),
        fingerprint="",
    )
    if spec.default_prompt is not None and spec.default_prompt not in spec.prompts:
        raise ModelError(f"config_sentence_transformers.json: default_prompt_name `{spec.default_prompt}` is not among the prompts")
    return replace(spec, fingerprint=fingerprint(spec))


class _Stack:
    """What stands behind the transformer, read module by module."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.pooling: Pooling = Pooling.MEAN
        self.dense: list[Dense] = []
        self.normalizes = False
        self.pooled = False

    def add_pooling(self, folder: Path) -> None:
        file = folder / "config.json"
        config = _read_object(file)
        if self.pooled:
            raise ModelError(f"{_where(file)}: a second Pooling module; one is supported")
        if "pooling_mode" in config:  # sentence-transformers 5 and later
            named = config["pooling_mode"]
            chosen = [Pooling(mode) for mode in ([named] if isinstance(named, str) else named) if mode in set(Pooling)]
        else:
            chosen = [pooling for flag, pooling in _POOLING_FLAGS.items() if config.get(flag)]
        if len(chosen) != 1:
            found = " and ".join(chosen) if chosen else "none known"
            raise ModelError(f"{_where(file)}: exactly one pooling mode is needed, found {found}")
        width = config.get("word_embedding_dimension", config.get("embedding_dimension", self.width))
        if width != self.width:
            raise ModelError(f"{_where(file)}: pools {width} numbers a token, the transformer makes {self.width}")
        if config.get("include_prompt") is False:
            raise ModelError(f"{_where(file)}: include_prompt=false is not supported yet")
        self.pooling, self.pooled = chosen[0], True

    def add_dense(self, folder: Path) -> None:
        file = folder / "config.json"
        config = _read_object(file)
        activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
        if activation not in ACTIVATIONS:
            raise ModelError(f"{_where(file)}: activation `{activation}` is not supported; known: {', '.join(ACTIVATIONS)}")
        tensors = Tensors([_safetensors(folder)])
        weight = np.asarray(tensors["linear.weight"], np.float32)
        bias = np.asarray(tensors["linear.bias"], np.float32) if "linear.bias" in tensors else None
        if weight.shape != (config.get("out_features"), config.get("in_features")) or weight.shape[1] != self.width:
            raise ModelError(f"{_where(file)}: the weight is {weight.shape}, the config and the module before it say otherwise")
        self.dense.append(Dense(weight=weight, bias=bias, activation=activation))
        self.width = weight.shape[0]

    def add_normalize(self, folder: Path) -> None:
        self.normalizes = True


_MODULES: dict[str, Callable[[_Stack, Path], None]] = {
    "Pooling": _Stack.add_pooling,
    "Dense": _Stack.add_dense,
    "Normalize": _Stack.add_normalize,
}


def _stack(folder: Path, modules: Sequence[Json], pooling: Pooling | None, *, hidden: int) -> _Stack:
    stack = _Stack(hidden)
    if not modules:
        if pooling is None:
            raise ModelError(
                f"{folder.name}: there is no modules.json, so nothing says how the model pools; "
                f"set `pooling` to one of {', '.join(Pooling)} (the model's card names it)"
            )
        stack.pooling = pooling
        return stack
    for module in modules[1:]:
        kind = str(module["type"]).rsplit(".", 1)[-1]
        if kind not in _MODULES:
            raise ModelError(f"modules.json: module type `{module['type']}` is not supported; known: {', '.join(_MODULES)}")
        _MODULES[kind](stack, _inside(folder, str(module["path"])))
    if not stack.pooled:
        raise ModelError("modules.json: there is no Pooling module")
    if pooling is not None and pooling is not stack.pooling:
        raise ModelError(f"modules.json says pooling `{stack.pooling}`, the setting `pooling` says `{pooling}`; leave it unset")
    return stack


def _modules(folder: Path) -> Sequence[Json]:
    file = folder / "modules.json"
    if not file.exists():
        return ()
    modules = _read(file)
    if not isinstance(modules, list) or not modules:
        raise ModelError("modules.json: a list of modules is expected")
    listed = cast("list[Any]", modules)
    for module in listed:
        if not isinstance(module, dict) or not {"type", "path"} <= set(cast("Json", module)):
            raise ModelError("modules.json: each module needs `type` and `path`")
    if not str(listed[0]["type"]).endswith(".Transformer"):
        raise ModelError(f"modules.json: the first module is `{listed[0]['type']}`, only Transformer is supported")
    return sorted(listed, key=lambda module: module.get("idx", listed.index(module)))


def _transformer_folder(folder: Path, modules: Sequence[Json]) -> Path:
    return _inside(folder, str(modules[0]["path"])) if modules else folder


def _inside(folder: Path, path: str) -> Path:
    """A module's folder, which must lie in the model's own."""
    inner = folder / path
    if not inner.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"modules.json: path `{path}` leads out of the model's folder")
    return inner


def _max_length(config: Json, limits: Json, folder: Path) -> int:
    """The model's own limit: sentence_bert_config.json, else the tokenizer's, never beyond its positions."""
    positions = _number(config, "max_position_embeddings", folder)
    stated = limits.get("max_seq_length")
    if stated is None:
        stated = _read_object(folder / "tokenizer_config.json", optional=True).get("model_max_length", positions)
    return max(1, min(int(stated), positions))


def _weight_files(folder: Path) -> Sequence[Path]:
    """model.safetensors, or the shards its index names."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = sorted({str(shard) for shard in _read_object(index)["weight_map"].values()})
        return [_existing(_inside(folder, shard)) for shard in shards]
    return [_safetensors(folder)]


def _safetensors(folder: Path) -> Path:
    file = folder / "model.safetensors"
    if not file.exists() and any(folder.glob("*.bin")):
        raise ModelError(
            f"{folder.name}: only pickled weights (.bin) are there; reading a pickle runs code, so npu-proxy refuses. "
            "Take a revision with model.safetensors, or convert with safetensors' own tool"
        )
    return _existing(file)


def _existing(file: Path, hint: str = "") -> Path:
    if not file.is_file():
        raise ModelError(f"{_where(file)} is missing" + (f"; {hint}" if hint else ""))
    return file


def _read(file: Path) -> Any:
    try:
        return json.loads(_existing(file).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{_where(file)} is no valid JSON: {error}") from error


def _read_object(file: Path, *, optional: bool = False) -> Json:
    if optional and not file.exists():
        return {}
    content = _read(file)
    if not isinstance(content, dict):
        raise ModelError(f"{_where(file)}: a JSON object is expected")
    return cast("Json", content)


def _number(config: Json, key: str, folder: Path) -> int:
    value = config.get(key)
    return value if isinstance(value, int) else _missing(folder / "config.json", key)


def _missing(file: Path, key: str) -> Any:
    raise ModelError(f"{_where(file)}: `{key}` is missing")


def _where(file: Path) -> str:
    """A file by its folder and name, enough to find it and no more."""
    return f"{file.parent.name}/{file.name}"
