"""The modules after the transformer in a sentence-transformers folder: a chain, read in the order of modules.json.

A module type is one row of a table; each row moves the chain one step on. What a step needs and the chain does not have at that
point (a pooling after a pooling, a Dense module that reads another module's input) is refused.
Source: the folders that sentence-transformers 2 to 6 and PyLate write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from npu_proxy.errors import ModelError, model_errors, unread_error
from npu_proxy.graph.activations import TORCH_ACTIVATIONS
from npu_proxy.models.json_files import OWN_PATHS, Json, JsonObject, inside, read_flag, short_path
from npu_proxy.models.unread import FolderReader
from npu_proxy.models.weights import Tensors, weight_files
from npu_proxy.spec import DenseModule, LayerNormModule, Module, NormalizeModule, SpladeConfig
from npu_proxy.types import Pooling

_POOLING_FLAGS = {
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_max_tokens": Pooling.MAX,
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_mean_sqrt_len_tokens": Pooling.MEAN_SQRT_LENGTH,
    "pooling_mode_weightedmean_tokens": Pooling.WEIGHTED_MEAN,
    "pooling_mode_lasttoken": Pooling.LAST_TOKEN,
}
_STORED = tuple(_POOLING_FLAGS.values())
_IDENTITY = "torch.nn.modules.linear.Identity"
_TOKENS, _TEXT, _SCORES = "token_embeddings", "sentence_embedding", "scores"


class ModuleStack:
    """The modules after a transformer whose token vectors have ``width`` numbers."""

    def __init__(self, width: int, vocabulary: int, reader: FolderReader, *, late: bool = False) -> None:
        """late: whether the model is one of late interaction, whose modules read token vectors unless they say otherwise."""
        self.width: int = width
        self.token_width: int = width
        """Numbers per token vector that is pooled."""
        self.pooling: Pooling | None = None
        self.token_modules: list[Module] = []
        """Modules before the pooling, or all if there is none."""
        self.modules: list[Module] = []
        """Modules after the pooling."""
        self.include_prompt: bool = True
        self.splade: SpladeConfig = SpladeConfig()
        self.scores: bool = False
        """Whether the last module gives scores."""
        self.mask: Json = {}
        """config.json of a MultiVectorMask."""
        self._vocabulary = vocabulary
        self._reader = reader
        self._default_input = _TOKENS if late else _TEXT

    @property
    def normalizes(self) -> bool:
        """Whether the chain ends in a Normalize module."""
        return self._chain[-1:] == [NormalizeModule()]

    def add(self, modules: Sequence[JsonObject], folder: Path) -> None:
        """Read the modules in order. Raises ModelError for an unknown module type."""
        for module in modules:
            path, kind = str(module["type"]), str(module["type"]).rsplit(".", 1)[-1]
            if kind not in _MODULES or not path.startswith(OWN_PATHS):
                known = ", ".join(_MODULES)
                raise ModelError(f"modules.json: module `type` `{path}` is not supported; known: {known} of sentence_transformers")
            if self.scores:
                raise ModelError(f"modules.json: `{path}` follows the module that gives scores")
            with model_errors(f"{module['path']}/config.json"):
                _MODULES[kind](self, inside(folder, str(module["path"])))

    def final_modules(self) -> list[Module]:
        """The modules after the pooling (of token vectors, if there is none), without a Normalize module at the end."""
        return self._chain[:-1] if self.normalizes else self._chain

    @property
    def _chain(self) -> list[Module]:
        return self.modules if self._pooled else self.token_modules

    @property
    def _pooled(self) -> bool:
        return self.pooling not in (None, Pooling.NONE)

    # -- one method per module type ----------------------------------------------------------------------------------

    def add_pooling(self, folder: Path) -> None:
        file = folder / "config.json"
        config = self._reader.object(file, kind="Pooling")
        if self.pooling is not None:
            raise ModelError(f"{short_path(file)}: only one Pooling module is supported")
        self.pooling = _pooling_mode(config, file)
        for name in ("word_embedding_dimension", "embedding_dimension"):
            if (width := config.get(name)) not in (None, self.width):
                raise ModelError(
                    f"{short_path(file)}: `{name}` is {width}, but the transformer's token vectors have {self.width} numbers"
                    " (`hidden_size`)"
                )
        self.include_prompt = read_flag(config, "include_prompt", short_path(file), default=True)

    def add_splade(self, folder: Path) -> None:
        file = folder / "config.json"
        config = self._reader.object(file, kind="SpladePooling")
        strategy, activation = config.get("pooling_strategy", "max"), config.get("activation_function", "relu")
        if strategy not in ("max", "sum"):
            raise ModelError(f"{short_path(file)}: `pooling_strategy` `{strategy}` is not supported, only max and sum")
        if activation not in ("relu", "log1p_relu"):
            raise ModelError(f"{short_path(file)}: `activation_function` `{activation}` is not supported, only relu and log1p_relu")
        self.splade = SpladeConfig(sums=strategy == "sum", log_twice=activation == "log1p_relu")
        for name in ("word_embedding_dimension", "embedding_dimension"):
            if (width := config.get(name)) not in (None, self._vocabulary):
                raise ModelError(f"{short_path(file)}: `{name}` is {width}, but the vocabulary has {self._vocabulary} tokens")
        if self.pooling is not None or self.token_modules:
            raise ModelError(f"{short_path(file)}: SPLADE must follow the transformer")
        self.pooling, self.width = Pooling.SPLADE, self._vocabulary

    def add_dense(self, folder: Path) -> None:
        file = folder / "config.json"
        config = self._reader.object(file, kind="Dense")
        activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
        if activation not in TORCH_ACTIVATIONS:
            raise ModelError(
                f"{short_path(file)}: `activation_function` `{activation}` is not supported; known: {', '.join(TORCH_ACTIVATIONS)}"
            )
        self._check_names(config, file, scores=True)
        residual = read_flag(config, "use_residual", short_path(file), default=False)
        module = read_dense(_tensors(folder), "linear.", activation, residual=residual)
        sizes, biased = (config.get("out_features"), config.get("in_features")), f"{module.prefix}bias" in module.tensors
        if (
            module.shape != sizes
            or module.shape[1] != self.width
            or read_flag(config, "bias", short_path(file), default=True) != biased
        ):
            raise ModelError(
                f"{short_path(file)}: linear.weight has the shape {module.shape} and {'a' if biased else 'no'} bias, unlike"
                f" `out_features`, `in_features` or `bias`, or unlike the {self.width} numbers of the module before"
            )
        needed = {"linear.weight", *(["linear.bias"] if biased else [])}
        needed |= {"residual.weight"} if residual and module.shape[0] != module.shape[1] else set()
        self._check_tensors(module.tensors, needed, file)
        self._chain.append(module)
        self.width = module.shape[0]
        if not self._pooled:
            self.token_width = self.width

    def add_layer_norm(self, folder: Path) -> None:
        file = folder / "config.json"
        config = self._reader.object(file, kind="LayerNorm")
        tensors = _tensors(folder)
        self._check_tensors(tensors, {"norm.weight", "norm.bias"}, file)
        shape = tuple(tensors.shape("norm.weight"))
        if shape != (self.width,) or tuple(tensors.shape("norm.bias")) != shape or config.get("dimension") != self.width:
            raise ModelError(
                f"{short_path(file)}: norm.weight has the shape {shape}, unlike `dimension`, or unlike the {self.width} numbers of"
                " the module before"
            )
        if not self._pooled:
            raise ModelError(
                f"{short_path(file)}: a LayerNorm module reads the vector of a text, which there is not before Pooling"
            )
        self.modules.append(LayerNormModule(tensors=tensors, prefix="norm.", shape=shape))

    def add_normalize(self, folder: Path) -> None:
        file = folder / "config.json"
        config = self._reader.object(file, kind="Normalize", optional=True)
        if not self._pooled and config.get("module_input_name", self._default_input) == _TEXT:
            config.get("module_output_name")
            return  # there is no vector of the text yet, so it does nothing
        self._check_names(config, file)
        self._chain.append(NormalizeModule())

    def add_dropout(self, folder: Path) -> None:
        self._reader.object(folder / "config.json", kind="Dropout", optional=True)

    def add_mask(self, folder: Path) -> None:
        file = folder / "config.json"
        config = self._reader.object(file, kind="MultiVectorMask", optional=True)
        if config.get("keep_only_token_ids"):
            raise ModelError(f"{short_path(file)}: keep_only_token_ids is not supported")
        self.pooling, self.mask = Pooling.NONE, config

    def _check_names(self, config: JsonObject, file: Path, *, scores: bool = False) -> None:
        """Raise ModelError if a module reads or writes anything but the vectors that the chain has at this point."""
        has = _TEXT if self._pooled else _TOKENS
        reads: Any = config.get("module_input_name", self._default_input)
        writes: Any = config.get("module_output_name") or reads
        if reads != has:
            raise ModelError(f"{short_path(file)}: module_input_name is `{reads}`, but the module before it gives `{has}`")
        if writes == _SCORES and scores and self._pooled:
            self.scores = True
        elif writes != has:
            raise ModelError(f"{short_path(file)}: module_output_name is `{writes}`; only `{has}` is supported here")

    def _check_tensors(self, tensors: Any, needed: set[str], file: Path) -> None:
        for name in sorted(set(tensors) ^ needed):
            if name in needed:
                raise ModelError(f"{short_path(file)}: the weights have no tensor `{name}`")
            if not self._reader.accepts(name):
                raise unread_error(f"{file.parent.name}: nothing reads the tensor `{name}`", name)


_MODULES: dict[str, Callable[[ModuleStack, Path], None]] = {
    "Pooling": ModuleStack.add_pooling,
    "SpladePooling": ModuleStack.add_splade,
    "Dense": ModuleStack.add_dense,
    "LayerNorm": ModuleStack.add_layer_norm,
    "Normalize": ModuleStack.add_normalize,
    "Dropout": ModuleStack.add_dropout,
    "MultiVectorMask": ModuleStack.add_mask,
}


def _tensors(folder: Path) -> Tensors:
    return Tensors(weight_files(folder))


def _pooling_mode(config: JsonObject, file: Path) -> Pooling:
    """The pooling in a Pooling module's config; the mean if none is stated. Raises ModelError unless it is exactly one."""
    if "pooling_mode" in config:  # sentence-transformers 5 and later; older keys do not count then
        named: Any = config["pooling_mode"]
        modes = named if isinstance(named, list) else [named]
        for name in _POOLING_FLAGS:
            config.get(name)
        if len(modes) == 1 and modes[0] in _STORED:
            return Pooling(modes[0])
        raise ModelError(f"{short_path(file)}: `pooling_mode` is `{named}`; exactly one is supported of {', '.join(_STORED)}")
    flags = {name: pooling for name, pooling in _POOLING_FLAGS.items() if read_flag(config, name, short_path(file), default=False)}
    if len(flags) > 1:
        raise ModelError(f"{short_path(file)}: exactly one pooling mode is needed, found {' and '.join(flags)}")
    return next(iter(flags.values()), Pooling.MEAN)


def read_dense(tensors: Tensors, prefix: str, activation: str = _IDENTITY, *, residual: bool = False) -> DenseModule:
    """The linear layer with the tensors ``{prefix}weight`` and ``{prefix}bias``, if any. Raises ModelError without a weight."""
    shape = tuple(tensors.shape(f"{prefix}weight"))
    bias = tuple(tensors.shape(f"{prefix}bias")) if f"{prefix}bias" in tensors else shape[:1]
    if len(shape) != 2 or 0 in shape or bias != shape[:1]:
        raise ModelError(f"the linear layer `{prefix}weight` has shape {shape}, and its bias {bias}")
    return DenseModule(tensors=tensors, prefix=prefix, shape=shape, activation=activation, residual=residual)
