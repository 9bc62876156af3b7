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

Activation = Literal["sigmoid", "softmax", "identity", "tanh", "relu", "softplus"]
"""The function that turns a text's logits into scores."""


PROMPT_NAMES: Mapping[str, Sequence[str]] = {
    "query": ("query",),
    "document": ("document", "passage", "corpus"),
    "classification": ("classification", "Classification"),
    "clustering": ("clustering", "Clustering"),
}
"""Prompt names by input type, as used by sentence-transformers and EmbeddingGemma; the first one that a model has is used."""


@dataclass(frozen=True, kw_only=True)
class StoredLayer:
    """A layer of a module: where its weight and bias are.

    tensors: reads a tensor from the module's files; ``{prefix}weight`` and ``{prefix}bias``. shape: of the weight.
    """

    tensors: Mapping[str, npt.NDArray[Any]] = field(repr=False)
    prefix: str
    shape: Sequence[int]

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
class DenseModule(StoredLayer):
    """``activation(x W^T + b)``, with the weight [out, in], the bias [out] and the activation's stored (torch) name.

    residual: adds the input after the activation; projected by ``residual.weight`` [out, in] if the widths differ.
    """

    activation: str
    residual: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerNormModule(StoredLayer):
    """Layer normalization, with the weight and bias [width], and torch's epsilon."""

    epsilon: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class NormalizeModule:
    """Division by the Euclidean length, between other modules. At the end of all, the host normalizes."""


@dataclass(frozen=True, kw_only=True)
class TruncateModule:
    """Only the first ``width`` numbers are kept (`truncate_dim`)."""

    width: int


Module = DenseModule | LayerNormModule | NormalizeModule | TruncateModule
"""What follows the pooling of a model, or its transformer."""


@dataclass(frozen=True, kw_only=True)
class TokenizerSource:
    """Where a tokenizer comes from.

    files: tokenizer.json, or a vocabulary and its merges. parts: parts of it that its class makes otherwise (models/
    tokenizer_config.py). types: whether the tokens of a pair's texts have types. cuts_start: whether long texts are cut at their
    start. stored_limit: the limit in tokens in tokenizer.json. unknown_id: of the token for unknown words. middle_length: the
    median number of characters per token. tokens: the named special tokens, such as `mask_token`.
    """

    files: Sequence[Path]
    parts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    types: bool = False
    cuts_start: bool = False
    stored_limit: int | None = None
    unknown_id: int | None = None
    middle_length: int = 1
    tokens: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class QueryWeights:
    """The weight of each token of a query, which the model does not compute: ``layer.weight`` [tokens].

    A query still takes a place in a batch, so that it has one way through the engine; what the device computes of it is not used.

    limit: tokens of a query, without special tokens. default: whether a text is a query if the request does not say what it is.
    """

    layer: StoredLayer
    limit: int
    default: bool = False

    def is_query(self, input_type: str | None) -> bool:
        """Whether a text of this input type is a query."""
        return self.default if input_type is None else input_type == "query"


@dataclass(frozen=True, kw_only=True)
class PairTemplate:
    """What is put around the two texts of a pair, which are then one text.

    keeps_end: whether the tokens of ``after`` replace the last ones of a pair that is cut.
    """

    before: str
    between: str
    after: str
    keeps_end: bool = True

    def join(self, first: str, second: str) -> str:
        """The two texts as one."""
        return self.before + first + self.between + second + self.after


@dataclass(frozen=True, kw_only=True)
class SpladeConfig:
    """How a sparse vector is made of a text's logits, log(1 + relu(x)).

    sums: summed over the tokens, not their maximum. log_twice: log(1 + y) of the result again.
    """

    sums: bool = False
    log_twice: bool = False


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
    """What config.json says, by the names of the family's file (``KEYS``)."""
    stored_config: Mapping[str, Any]
    """The content of config.json, for the fingerprint; for static models, with the keys that their files lack."""
    weight_files: Sequence[Path]
    tokenizer: TokenizerSource
    pooling: Pooling
    modules: Sequence[Module]
    """Applied in their order to pooled vectors, or to token vectors if nothing is pooled. bge-m3: its two heads."""
    token_modules: Sequence[Module] = ()
    """Applied to token vectors before they are pooled."""
    module_tensors: Sequence[str] = ()
    """Tensors that modules read of the transformer's own weight files (Stanford's ColBERT)."""
    hidden_width: int = 0
    """Numbers per token vector of the transformer."""
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
    splade: SpladeConfig = SpladeConfig()
    query_weights: QueryWeights | None = None
    """For sparse models whose queries are not computed."""
    pair_template: PairTemplate | None = None
    """Makes one text of a pair; None if the tokenizer's special tokens separate its texts."""
    dropped_ids: frozenset[int] = frozenset()
    """Token ids that are left out after a text was cut (model2vec: the unknown token)."""
    most_characters: int | None = None
    """Characters of a text that are tokenized at most (model2vec); None for all."""
    adapter_scale: float = 0.0
    """The factor of a LoRA adapter's updates (models/lora.py); 0 if there is none."""
    by_model2vec: bool = False
    """Whether model2vec wrote it."""
    padding_id: int | None = None
    """The id of the padding token according to config.json."""
    accept_unread: Sequence[str] = ()
    """Patterns of keys and tensors that may be unread (the setting of that name)."""
    accepted: Sequence[str] = ()
    """Those of them that this model needs."""
    precision: str = "fp32"
    """fp32; fp16: the same weights, computed in half precision if the device supports it; int8: the graph in ``graph``."""
    graph: Path | None = None
    """The graph file, for int8 (models/quantized.py)."""
    refused: str = ""
    """Why no graph can be built from the weights, so that only a graph file from its repository can serve it; "" if it can."""

    @property
    def has_sides(self) -> bool:
        """Whether queries and documents are computed in different ways."""
        return self.late_interaction is not None or self.query_weights is not None

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
            unplaced=self.config.get("unplaced"),
        )
