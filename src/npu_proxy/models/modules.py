"""The modules after the transformer in a sentence-transformers folder, read one by one. A module type is one row of a table.

Source: the folders that sentence-transformers 2 to 6 and PyLate write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from npu_proxy.errors import ModelError
from npu_proxy.graph.activations import TORCH_ACTIVATIONS
from npu_proxy.models.json_files import Json, inside, read_object, short_path
from npu_proxy.models.tokenizer_file import open_tokenizer
from npu_proxy.models.weights import Tensors, weight_files
from npu_proxy.spec import DenseModule
from npu_proxy.types import Pooling

_POOLING_FLAGS = {
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_max_tokens": Pooling.MAX,
    "pooling_mode_mean_sqrt_len_tokens": Pooling.MEAN_SQRT_LENGTH,
    "pooling_mode_weightedmean_tokens": Pooling.WEIGHTED_MEAN,
    "pooling_mode_lasttoken": Pooling.LAST_TOKEN,
}
_STORED = tuple(_POOLING_FLAGS.values())


class ModuleStack:
    """The modules after a transformer whose token vectors have ``width`` numbers."""

    def __init__(self, width: int, vocabulary: int) -> None:
        self.width: int = width
        self.pooling: Pooling | None = None
        self.dense: list[DenseModule] = []
        self.normalizes: bool = False
        self.include_prompt: bool = True
        self.mask: Json = {}
        """config.json of a MultiVectorMask."""
        self._vocabulary = vocabulary

    def add(self, modules: Sequence[Json], folder: Path) -> None:
        """Read the modules in order. Raises ModelError for an unknown module type."""
        for module in modules:
            kind = str(module["type"]).rsplit(".", 1)[-1]
            if kind not in _MODULES:
                raise ModelError(f"modules.json: module type `{module['type']}` is not supported; known: {', '.join(_MODULES)}")
            _MODULES[kind](self, inside(folder, str(module["path"])))

    def add_pooling(self, folder: Path) -> None:
        file = folder / "config.json"
        config = read_object(file)
        if self.pooling is not None:
            raise ModelError(f"{short_path(file)}: only one Pooling module is supported")
        if "pooling_mode" in config:  # sentence-transformers 5 and later
            named = config["pooling_mode"]
            chosen = [Pooling(mode) for mode in ([named] if isinstance(named, str) else named) if mode in _STORED]
        else:
            chosen = [pooling for flag, pooling in _POOLING_FLAGS.items() if config.get(flag)]
        if len(chosen) != 1:
            found = " and ".join(chosen) if chosen else "none that is supported"
            raise ModelError(f"{short_path(file)}: exactly one pooling mode is needed, found {found}")
        width = config.get("word_embedding_dimension", config.get("embedding_dimension", self.width))
        if width != self.width:
            raise ModelError(
                f"{short_path(file)}: Pooling expects {width} numbers per token, but the transformer produces {self.width}"
            )
        self.include_prompt = config.get("include_prompt") is not False
        self.pooling = chosen[0]

    def add_splade(self, folder: Path) -> None:
        file = folder / "config.json"
        config = read_object(file)
        strategy, activation = config.get("pooling_strategy", "max"), config.get("activation_function", "relu")
        if strategy != "max" or activation != "relu":
            raise ModelError(f"{short_path(file)}: SPLADE with {strategy} of {activation} is not supported, only max of relu")
        self.pooling, self.width = Pooling.SPLADE, self._vocabulary

    def add_dense(self, folder: Path) -> None:
        file = folder / "config.json"
        config = read_object(file)
        activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
        if activation not in TORCH_ACTIVATIONS:
            raise ModelError(
                f"{short_path(file)}: activation `{activation}` is not supported; known: {', '.join(TORCH_ACTIVATIONS)}"
            )
        if config.get("use_residual"):
            raise ModelError(f"{short_path(file)}: use_residual is not supported")
        module = read_dense(Tensors(weight_files(folder)), "linear.", activation)
        if module.shape != (config.get("out_features"), config.get("in_features")) or module.shape[1] != self.width:
            raise ModelError(f"{short_path(file)}: the weight has shape {module.shape}, unlike the config or the previous module")
        self.dense.append(module)
        self.width = module.shape[0]

    def add_normalize(self, folder: Path) -> None:
        self.normalizes = True

    def add_mask(self, folder: Path) -> None:
        config = read_object(folder / "config.json", optional=True)
        if config.get("keep_only_token_ids"):
            raise ModelError(f"{short_path(folder / 'config.json')}: keep_only_token_ids is not supported")
        self.pooling, self.mask = Pooling.NONE, config


_MODULES: dict[str, Callable[[ModuleStack, Path], None]] = {
    "Pooling": ModuleStack.add_pooling,
    "SpladePooling": ModuleStack.add_splade,
    "Dense": ModuleStack.add_dense,
    "Normalize": ModuleStack.add_normalize,
    "MultiVectorMask": ModuleStack.add_mask,
}


def read_dense(tensors: Tensors, prefix: str, activation: str = "torch.nn.modules.linear.Identity") -> DenseModule:
    """The linear layer with the tensors ``{prefix}weight`` and ``{prefix}bias``, if any. Raises ModelError without a weight."""
    shape = tuple(tensors.shape(f"{prefix}weight"))
    bias = tuple(tensors.shape(f"{prefix}bias")) if f"{prefix}bias" in tensors else shape[:1]
    if len(shape) != 2 or 0 in shape or bias != shape[:1]:
        raise ModelError(f"the linear layer `{prefix}weight` has shape {shape}, and its bias {bias}")
    return DenseModule(tensors=tensors, prefix=prefix, shape=shape, activation=activation)


def skipped_ids(mask: Json, side: str, tokenizer_file: Path) -> frozenset[int]:
    """Ids of the words in a MultiVectorMask that get no vector on this ``side``, if they are in the vocabulary."""
    tasks: Any = mask.get("skiplist_tasks") or ["document"]
    if side not in ([tasks] if isinstance(tasks, str) else tasks):
        return frozenset()
    words: Any = mask.get("skiplist_words") or []
    tokenizer, _ = open_tokenizer(tokenizer_file)
    ids = (tokenizer.token_to_id(str(word)) for word in words)
    return frozenset(token_id for token_id in ids if token_id is not None)
