"""Static embeddings (model2vec, sentence-transformers' StaticEmbedding): a table of token vectors without any layers.

Source: MinishLab's model2vec.
"""

from __future__ import annotations

import numpy as np

from npu_proxy.errors import ModelError
from npu_proxy.graph.context import GraphContext
from npu_proxy.graph.keys import Keys, size
from npu_proxy.graph.nodes import Config, Node, constant, integers, op
from npu_proxy.types import Pooling

MODEL_TYPES = ("model2vec",)
"""models/model_files.py uses the same name for a folder with a StaticEmbedding module."""

KEYS: Keys = {
    "vocab_size": size("vocab_size"),
    "hidden_size": size("hidden_size"),
    "max_position_embeddings": size("max_position_embeddings"),
}


def canonical_name(name: str) -> str:
    """model2vec's name for a tensor: sentence-transformers stores `embeddings` as `embedding.weight`."""
    return "embeddings" if name == "embedding.weight" else name


def encode(graph: GraphContext) -> Node:
    """Token vectors [tokens, width], multiplied by token weights if the model has them."""
    ids, count = graph.inputs.ids, graph.config["vocab_size"]
    table = graph.weight("embeddings")
    if graph.has("mapping"):  # several tokens share a vector
        mapping = graph.vector("mapping", count)
        if mapping.dtype.kind not in "iu" or mapping.min() < 0 or mapping.max() >= len(table):
            raise ModelError("the tensor `mapping` has numbers that are no rows of `embeddings`")
        ids = op.gather(constant(mapping), ids, integers(0))
    elif len(table) != count:
        raise ModelError(f"the tensor `embeddings` has {len(table)} rows, but the tokenizer has {count} tokens")
    x = op.convert(op.gather(constant(table), ids, integers(0)), "f32")  # the table may be of int8
    if graph.has("weights"):
        factors = op.gather(constant(np.asarray(graph.vector("weights", count), np.float32)), graph.inputs.ids, integers(0))
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
