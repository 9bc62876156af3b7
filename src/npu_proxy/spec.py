"""What a model is, according to its own files: a plain value that models/layout.py makes and everything else reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from npu_proxy.batch import BatchLayout
from npu_proxy.types import OutputType, Pooling, Similarity

Activation = Literal["sigmoid", "softmax", "identity"]
"""The function that turns a text's logits into scores."""


PROMPT_NAMES: Mapping[str, Sequence[str]] = {
    "query": ("query",),
    "document": ("document", "passage", "corpus"),
    "classification": ("classification", "Classification"),
    "clustering": ("clustering", "Clustering"),
}
"""Prompt names by input type, as used by sentence-transformers and EmbeddingGemma; the first one that a model has is used."""


@dataclass(frozen=True, kw_only=True)
class DenseModule:
    """A Dense module: where its weight [out, in] and bias [out] are, and the activation's stored (torch) name.

    tensors: reads a tensor from the module's files; ``{prefix}weight`` and ``{prefix}bias``. shape: of the weight.
    """

    tensors: Mapping[str, npt.NDArray[Any]] = field(repr=False)
    prefix: str
    shape: Sequence[int]
    activation: str

    @property
    def weight(self) -> npt.NDArray[np.float32]:
        """The weight, read from its file. Raises ModelError."""
        return np.asarray(self.tensors[f"{self.prefix}weight"], np.float32)

    @property
    def bias(self) -> npt.NDArray[np.float32] | None:
        """The bias, read from its file; None if there is none. Raises ModelError."""
        name = f"{self.prefix}bias"
        return np.asarray(self.tensors[name], np.float32) if name in self.tensors else None


@dataclass(frozen=True, kw_only=True)
class LateInteractionConfig:
    """How a late-interaction model treats queries and documents. Lengths are in tokens, including special tokens.

    expanded_length: queries are padded to this length with mask tokens, which attend to the query; 0 disables this.
    attend_to_expansion: whether the query also attends to the mask tokens. skip_ids, query_skip_ids: ids of tokens in documents
    and in queries that get no vector, such as punctuation.
    """

    query_length: int
    document_length: int
    expanded_length: int = 0
    attend_to_expansion: bool = False
    mask_id: int = 0
    skip_ids: frozenset[int] = frozenset()
    query_skip_ids: frozenset[int] = frozenset()

    @property
    def has_unattended(self) -> bool:
        """Whether queries are expanded with mask tokens that the query does not attend to."""
        return bool(self.expanded_length) and not self.attend_to_expansion


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Everything that a model's own files say about how it embeds texts. Nothing in it is guessed."""

    name: str
    folder: Path
    family: str
    """``model_type`` of config.json, the key of graph.build.FAMILIES."""
    config: Mapping[str, Any]
    """The content of config.json; for static models, with the keys that their files lack."""
    weight_files: Sequence[Path]
    tokenizer_file: Path
    pooling: Pooling
    dense: Sequence[DenseModule]
    width: int
    """Numbers per vector of a text or token; the vocabulary size for sparse vectors, the number of labels for scores."""
    max_length: int
    """Maximum number of tokens per text, including special tokens."""
    vocabulary: int
    """Number of token ids."""
    normalizes: bool
    """Whether the model ends in a Normalize module. For information only: the request's `normalize` decides."""
    lower_case: bool
    prompts: Mapping[str, str]
    default_prompt: str | None
    fingerprint: str
    prompt_sources: Mapping[str, str] = field(default_factory=dict[str, str])
    """Where the prompts that are not in the model's files come from, by name."""
    matryoshka: Sequence[int] = ()
    """The dimensions that it was trained for besides its width; empty if that is not known."""
    output_type: OutputType = OutputType.DENSE
    labels: Sequence[str] = ()
    """Names of the scores, in their order."""
    activation: Activation = "identity"
    similarity: Similarity = "cosine"
    include_prompt: bool = True
    """Whether the tokens of a prompt are pooled together with those of the text."""
    instruction: str = ""
    """Template that turns a task into a prompt, with the placeholder `{task}`; empty if the model takes no instructions."""
    type_ids: bool = False
    """Whether the tokens of a pair's second text have another token type than the first text's."""
    special_tokens: bool = True
    """Whether the tokenizer's special tokens are added around a text (static models have none)."""
    late_interaction: LateInteractionConfig | None = None
    precision: str = "fp32"
    """fp32; fp16: the same weights, computed in half precision if the device supports it; int8: the graph in ``graph``."""
    graph: Path | None = None
    """The graph file, for int8 (models/quantized.py)."""
    refused: str = ""
    """Why no graph can be built from the weights, so that only a graph file from its repository can serve it; "" if it can."""

    @property
    def output_types(self) -> Sequence[OutputType]:
        """The output types that requests can ask for, the main one first."""
        if self.output_type is OutputType.MULTI:
            return (OutputType.DENSE, OutputType.SPARSE, OutputType.TOKENS)
        return (self.output_type,)

    @property
    def batch_layout(self) -> BatchLayout:
        """The layout of the model's batches."""
        return BatchLayout(
            pooling=self.pooling,
            type_ids=self.type_ids,
            unattended=self.late_interaction is not None and self.late_interaction.has_unattended,
            per_token=self.output_type.per_token,
            width=self.width + (self.output_type is OutputType.MULTI),
        )
