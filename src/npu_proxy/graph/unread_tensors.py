"""Tensors of a checkpoint that a graph does not read: those of other heads and old buffers are harmless, all others are refused."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy.typing as npt

from npu_proxy.errors import unread_error
from npu_proxy.graph.nodes import Weights

_HEADS = (
    r"pooler|cls|lm_head|lm_predictions|mask_predictions|vocab_transform|vocab_layer_norm|vocab_projector|pre_classifier"
    r"|classifier|score|qa_outputs|head|decoder|sequence_summary|generator_predictions|generator_lm_head"
    r"|discriminator_predictions"
)
_ONE_HEAD = ("pre_classifier", "classifier", "score")
"""Heads of one task each: if a graph reads one of its tensors, it must read all."""
_HARMLESS = re.compile(
    rf"({_HEADS})\..*"  # heads of other tasks, and of training
    r"|(.*\.)?(position_ids|token_type_ids|inv_freq|masked_bias)"  # buffers, which follow from the configuration
)


class ReadWeights(Weights):
    """Weights that remember which of them were read."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        found = self._weights[name]
        self._read.add(name)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def refuse_unread(self, accept: Sequence[str]) -> None:
        """Raise ModelError for a tensor that was not read, is not harmless, and matches no pattern of ``accept``."""
        used = {name.partition(".")[0] for name in self._read} & {*_ONE_HEAD}
        for name in self._weights:
            harmless = _HARMLESS.fullmatch(name) and name.partition(".")[0] not in used
            if name not in self._read and not harmless and not any(fnmatchcase(name, pattern) for pattern in accept):
                raise unread_error(f"nothing reads the tensor `{name}` of the weights", name)
