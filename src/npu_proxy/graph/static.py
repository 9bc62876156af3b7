"""Static embeddings (model2vec, sentence-transformers' StaticEmbedding): a table of token vectors without any layers.

Source: MinishLab's model2vec.
"""

from __future__ import annotations

from npu_proxy.errors import ModelError
from npu_proxy.graph.context import GraphContext
from npu_proxy.graph.nodes import Config, Node, constant, integers, op
from npu_proxy.types import Pooling

MODEL_TYPES = ("model2vec",)
"""models/model_files.py uses the same name for a folder with a StaticEmbedding module."""


def normalize_config(config: Config) -> Config:
    """Return config.json unchanged."""
    return config


def canonical_name(name: str) -> str:
    """model2vec's name for a tensor: sentence-transformers stores `embeddings` as `embedding.weight`."""
    return "embeddings" if name == "embedding.weight" else name


def check_config(config: Config) -> None:
    """Accept any config."""


def encode(graph: GraphContext) -> Node:
    """Token vectors [tokens, width], multiplied by token weights if the model has them."""
    ids = graph.inputs.ids
    if graph.has("mapping"):  # several tokens share a vector
        ids = op.gather(constant(graph.weight("mapping")), ids, integers(0))
    x = op.gather(constant(graph.weight("embeddings")), ids, integers(0))
    if graph.has("weights"):
        factors = op.gather(constant(graph.weight("weights")), graph.inputs.ids, integers(0))
        x = op.multiply(x, op.unsqueeze(factors, integers(1)))
    return x


def label_logits(graph: GraphContext, pooled: Node) -> Node:
    """Raise ModelError: static models do not have this head."""
    raise ModelError("config.json: a static model has no classifier")


def classifier_pooling(config: Config) -> Pooling:
    """Mean pooling, which is not used."""
    return Pooling.MEAN


def vocabulary_logits(graph: GraphContext, hidden: Node) -> Node:
    """Raise ModelError: static models do not have this head."""
    raise ModelError("config.json: a static model has no masked language model")
