"""Static embeddings (model2vec, sentence-transformers' StaticEmbedding): a table of token vectors, no layers at all.

Source: MinishLab's model2vec.
"""

from __future__ import annotations

from openvino import opset15 as op

from npu_proxy.errors import ModelError
from npu_proxy.graph.bert import Config
from npu_proxy.graph.packed import Node, RowInputs, Style, Weights, constant, integers
from npu_proxy.types import Pooling

MODEL_TYPES = ("model2vec",)
"""And what models/layout.py calls a folder with a StaticEmbedding module."""


def standard(config: Config) -> Config:
    """As it stands."""
    return config


def canonical_name(name: str) -> str:
    """model2vec says `embeddings`, sentence-transformers `embedding.weight`."""
    return "embeddings" if name == "embedding.weight" else name


def check(config: Config) -> None:
    """Nothing can be wrong."""


def encode(config: Config, weights: Weights, inputs: RowInputs, style: Style) -> Node:
    """Token vectors [tokens, width], each times its weight where the model has weights."""
    ids = inputs.ids
    if "mapping" in weights:  # several tokens share a vector
        ids = op.gather(constant(weights["mapping"]), ids, integers(0))
    x = op.gather(constant(weights["embeddings"]), ids, integers(0))
    if "weights" in weights:
        x = op.multiply(x, op.unsqueeze(op.gather(constant(weights["weights"]), inputs.ids, integers(0)), integers(1)))
    return x


def scores(config: Config, weights: Weights, pooled: Node, style: Style) -> Node:
    """No such head. Raises ModelError."""
    raise ModelError("config.json: a static model has no classifier")


def scores_pooling(config: Config) -> Pooling:
    """As the others."""
    return Pooling.MEAN


def vocabulary(config: Config, weights: Weights, hidden: Node, style: Style) -> Node:
    """No such head. Raises ModelError."""
    raise ModelError("config.json: a static model has no masked language model")
