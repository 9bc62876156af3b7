"""The BERT family: post-norm encoder, learned absolute positions, token types.

Source: Devlin et al. 2018, and the ``bert`` model of Hugging Face transformers for tensor names. Similar families
(roberta.py, distilbert.py, mpnet.py) map their tensor names and configs to BERT's and use ``encode``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from npu_proxy.graph.context import GraphContext
from npu_proxy.graph.inputs import LayerTokens, attention_mask
from npu_proxy.graph.keys import Keys, activation, count, flag, model_sizes, only, real
from npu_proxy.graph.layers import Heads
from npu_proxy.graph.nodes import Config, Node, constant, integers, op
from npu_proxy.types import Pooling

MODEL_TYPES: tuple[str, ...] = ("bert",)
"""Values of ``model_type`` in config.json that this file builds."""

KEYS: Keys = {
    **model_sizes(),
    "type_vocab_size": count("type_vocab_size", default=2),
    "hidden_act": activation("hidden_act"),
    "layer_norm_eps": real("layer_norm_eps", default=1e-12),
    "position_embedding_type": only("position_embedding_type", "absolute"),
    "is_decoder": only("is_decoder", False),
    "is_causal": only("is_causal", False),
    "add_cross_attention": only("add_cross_attention", False),
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
}


def canonical_name(name: str) -> str:
    """The name that this file uses for a checkpoint's tensor: without model prefix."""
    return name.removeprefix("bert.")


def encode(graph: GraphContext, *, first_position: int = 0, bias: Callable[[LayerTokens], Node] | None = None) -> Node:
    """Hidden states of the last layer, [tokens, width]; only of ``inputs.last_tokens`` if pooling reads one token per text.

    first_position: row of the position table for a text's first token. bias: returns the term added to the attention scores
    of tokens, [bins, heads, tokens, positions].
    """

    @cache
    def mask_for(tokens: LayerTokens) -> Node:
        mask = attention_mask(graph.inputs, tokens)
        return mask if bias is None else op.add(mask, bias(tokens))

    x = _embed(graph, first_position)
    for number in range(layers := graph.config["num_hidden_layers"]):
        tokens = graph.inputs.layer_tokens(last=number == layers - 1)
        x = _layer(graph.scope(f"encoder.layer.{number}"), x, tokens, mask_for(tokens))
    return x


def label_logits(graph: GraphContext, pooled: Node) -> Node:
    """Logits [n, labels] of pooled hidden states [n, width]."""
    return graph.linear("classifier", op.tanh(graph.linear("pooler.dense", pooled)))


def classifier_pooling(config: Config) -> Pooling:
    """The pooling that ``label_logits`` expects."""
    return Pooling.CLS


def vocabulary_logits(graph: GraphContext, hidden: Node) -> Node:
    """Logits [tokens, vocabulary] of the masked language model. The word embeddings are its last layer unless one is stored."""
    head = graph.scope("cls.predictions.transform")
    x = graph.activation(graph.config["hidden_act"], head.linear("dense", hidden))
    x = head.layer_norm("LayerNorm", x, graph.config["layer_norm_eps"])
    own_bias = "cls.predictions.decoder.bias"
    bias = graph.weight(own_bias if graph.has(own_bias) else "cls.predictions.bias")
    return graph.tied_linear(x, "cls.predictions.decoder.weight", "embeddings.word_embeddings.weight", bias)


def _embed(graph: GraphContext, first_position: int) -> Node:
    embeddings, inputs = graph.scope("embeddings"), graph.inputs
    config = graph.config
    words = embeddings.embedding("word_embeddings", inputs.ids, "vocab_size")
    table = embeddings.table("position_embeddings", "max_position_embeddings", first_position)
    if first_position:  # the row of padding comes last, as in ModelSpec.batch_layout
        table = np.concatenate([table[first_position:], table[first_position - 1 : first_position]])
    types = embeddings.table("token_type_embeddings", "type_vocab_size") if config["type_vocab_size"] else None
    if types is not None and inputs.type_ids is None:
        table = table + types[0]  # all tokens of single texts have type 0, so its vector is added to the table once
    x = op.add(words, op.gather(constant(table), inputs.positions, integers(0)))
    if types is not None and inputs.type_ids is not None:
        x = op.add(x, op.gather(constant(types), inputs.type_ids, integers(0)))
    return embeddings.layer_norm("LayerNorm", x, config["layer_norm_eps"])


def _layer(layer: GraphContext, x: Node, tokens: LayerTokens, mask: Node) -> Node:
    """One encoder layer over ``x`` [tokens, width], computed for ``tokens``."""
    width, count = layer.config["hidden_size"], layer.config["num_attention_heads"]
    fused = layer.fused([f"attention.self.{part}" for part in ("query", "key", "value")], ["hidden_size"] * 3)
    attended = layer.attend(x, tokens, fused, Heads.of(count, width // count), mask)
    return finish_layer(layer, attended, layer.residual(x, tokens, width))


def finish_layer(layer: GraphContext, attended: Node, before: Node) -> Node:
    """The layer after attention: output, feed-forward, and the norm after each. before: the layer's input, [tokens, width]."""
    mixed = layer.linear("attention.output.dense", attended)
    x = layer.layer_norm("attention.output.LayerNorm", op.add(mixed, before), layer.config["layer_norm_eps"])
    inner = layer.activation(layer.config["hidden_act"], layer.linear("intermediate.dense", x, "intermediate_size"))
    outer = op.add(layer.linear("output.dense", inner), x)
    return layer.layer_norm("output.LayerNorm", outer, layer.config["layer_norm_eps"])
