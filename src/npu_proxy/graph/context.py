"""What a model family builds its graph from: configuration, weights with a name prefix, batch inputs, and the style."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from npu_proxy.batch import GraphStyle
from npu_proxy.errors import ModelError
from npu_proxy.graph.activations import ACTIVATIONS
from npu_proxy.graph.inputs import BatchInputs, LayerTokens
from npu_proxy.graph.layers import Attention, FusedLinear, Heads, Transform, layer_norm, linear
from npu_proxy.graph.nodes import Config, Node, Weights, constant, integers, op


@dataclass(frozen=True, kw_only=True)
class GraphContext:
    """The context that is passed from layer to layer.

    config: read by the family's ``KEYS``, with ``max_length``. prefix: prepended to the names of weights;
    ``scope`` extends it.
    """

    config: Config
    weights: Weights
    inputs: BatchInputs
    style: GraphStyle
    prefix: str = ""

    def scope(self, name: str) -> GraphContext:
        """The same context with ``name.`` appended to the prefix of weights."""
        return replace(self, prefix=f"{self.prefix}{name}.")

    def weight(self, name: str) -> npt.NDArray[Any]:
        """The tensor of that name. Raises ModelError if there is none."""
        return self.weights[self.prefix + name]

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return self.prefix + name in self.weights

    def table(self, name: str, key: str, more: int = 0) -> npt.NDArray[Any]:
        """An embedding table [rows, width]. Raises ModelError unless its rows are the configuration's ``key`` and ``more``."""
        return self._rows(f"{name}.weight", key, more=more)

    def vector(self, name: str, count: int) -> npt.NDArray[Any]:
        """The tensor of that name, which has one dimension of ``count``. Raises ModelError."""
        found = self.weight(name)
        if found.shape != (count,):
            raise ModelError(f"tensor `{self.prefix}{name}` has the shape {list(found.shape)}, not [{count}]")
        return found

    def embedding(self, name: str, ids: Node, key: str) -> Node:
        """Rows of an embedding table, as many as ``key`` says: ids [n] -> [n, width]."""
        return op.gather(constant(self.table(name, key)), ids, integers(0))

    def linear(self, name: str, x: Node, key: str = "", *, bias: bool = True) -> Node:
        """The linear layer of that name. key: of its numbers per output, if they do not follow from what comes after it."""
        weight = self._rows(f"{name}.weight", key) if key else self.weight(f"{name}.weight")
        return linear(x, weight, self.weight(f"{name}.bias") if bias else None)

    def layer_norm(self, name: str, x: Node, epsilon: float, *, bias: bool = True) -> Node:
        """The layer normalization of that name."""
        return layer_norm(x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias") if bias else None, epsilon)

    def activation(self, name: str, x: Node) -> Node:
        """The activation that config.json calls ``name``."""
        return ACTIVATIONS[name](x, self.style)

    def tied_linear(self, x: Node, stored: str, tied: str, bias: npt.NDArray[Any] | None) -> Node:
        """The linear layer of a vocabulary head, with the weight ``stored`` if there is one, else the word embeddings ``tied``."""
        if not self.has(stored) and not self.config["tie_word_embeddings"]:
            raise ModelError(f"the weights have no tensor `{stored}`, and config.json says that it is not `{tied}`")
        return linear(x, self._rows(stored if self.has(stored) else tied, "vocab_size"), bias)

    def fused(self, names: Sequence[str], keys: Sequence[str], *, width: int = 1, bias: bool = True) -> FusedLinear:
        """The linear layers of those names, which have the same input, fused into one.

        keys: of the numbers per output of each; width: what they are multiplied by (heads).
        """
        weights = [self._rows(f"{name}.weight", key, times=width) for name, key in zip(names, keys, strict=True)]
        biases = np.concatenate([self.weight(f"{name}.bias") for name in names]) if bias else None
        return FusedLinear(weight=np.concatenate(weights), bias=biases, sizes=[len(weight) for weight in weights])

    def stored_fused(self, name: str, count: int, key: str, *, bias: bool = True) -> FusedLinear:
        """``count`` linear layers of equal size that the checkpoint stores as one; their weights are not copied."""
        weight = self._rows(f"{name}.weight", key, times=count)
        return FusedLinear(weight=weight, bias=self.weight(f"{name}.bias") if bias else None, sizes=[self.config[key]] * count)

    def _rows(self, name: str, key: str, *, times: int = 1, more: int = 0) -> npt.NDArray[Any]:
        weight, rows = self.weight(name), self.config[key] * times + more
        if weight.ndim != 2 or len(weight) != rows:
            shape = list(weight.shape)
            raise ModelError(
                f"tensor `{self.prefix}{name}` has the shape {shape}, but by `{key}` of config.json it has {rows} rows"
            )
        return weight

    def attend(self, x: Node, tokens: LayerTokens, fused: FusedLinear, heads: Heads, mask: Node, *transforms: Transform) -> Node:
        """Self-attention of ``x`` [tokens, width], computed for ``tokens``; see layers.Attention."""
        attention = Attention(heads=heads, mask=mask, style=self.style, transforms=transforms)
        return attention(x, tokens, self.inputs, fused)

    def residual(self, x: Node, tokens: LayerTokens, width: int) -> Node:
        """``x`` [tokens, width] reduced to ``tokens``, for a layer's residual connection."""
        return tokens.take(x, self.inputs.all_tokens.grid, width)
