"""The BERT family: post-norm encoder, learned absolute positions, token types.

Source: Devlin et al. 2018, and the ``bert`` model of Hugging Face transformers for tensor names. Similar families
(roberta.py, distilbert.py, mpnet.py) map their tensor names and configs to BERT's and use ``encode``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from npu_proxy.errors import ModelError
from npu_proxy.graph.activations import check_activation
from npu_proxy.graph.context import GraphContext
from npu_proxy.graph.inputs import LayerTokens, attention_mask
from npu_proxy.graph.layers import Heads
from npu_proxy.graph.nodes import Config, Node, constant, integers, op
from npu_proxy.types import Pooling

MODEL_TYPES: tuple[str, ...] = ("bert",)
"""Values of ``model_type`` in config.json that this file builds."""


def normalize_config(config: Config) -> Config:
    """config.json with the keys that this file reads."""
    return config


def canonical_name(name: str) -> str:
    """The name that this file uses for a checkpoint's tensor: without model prefix and TensorFlow spelling."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def check_config(config: Config) -> None:
    """Raise ModelError for a config that this file would compute wrongly."""
    position = config.get("position_embedding_type") or "absolute"
    if position != "absolute":
        raise ModelError(f"config.json: position_embedding_type `{position}` is not supported for BERT, only `absolute`")
    check_activation(config, "hidden_act")
    if config.get("is_decoder"):
        raise ModelError("config.json: is_decoder is true; this graph is a bidirectional encoder")


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
    x = graph.activation(graph.config.get("hidden_act", "gelu"), head.linear("dense", hidden))
    x = head.layer_norm("LayerNorm", x, epsilon(graph.config))
    own_bias = "cls.predictions.decoder.bias"
    bias = graph.weight(own_bias if graph.has(own_bias) else "cls.predictions.bias")
    return graph.tied_linear(x, "cls.predictions.decoder.weight", "embeddings.word_embeddings.weight", bias)


def epsilon(config: Config) -> float:
    """The epsilon of layer normalization."""
    return config.get("layer_norm_eps", 1e-12)


def _embed(graph: GraphContext, first_position: int) -> Node:
    embeddings, inputs = graph.scope("embeddings"), graph.inputs
    words = embeddings.embedding("word_embeddings", inputs.ids)
    table = embeddings.weight("position_embeddings.weight")[first_position:]
    types = embeddings.weight("token_type_embeddings.weight") if embeddings.has("token_type_embeddings.weight") else None
    if types is not None and inputs.type_ids is None:
        table = table + types[0]  # all tokens of single texts have type 0, so its vector is added to the table once
    x = op.add(words, op.gather(constant(table), inputs.positions, integers(0)))
    if types is not None and inputs.type_ids is not None:
        x = op.add(x, op.gather(constant(types), inputs.type_ids, integers(0)))
    return embeddings.layer_norm("LayerNorm", x, epsilon(graph.config))


def _layer(layer: GraphContext, x: Node, tokens: LayerTokens, mask: Node) -> Node:
    """One encoder layer over ``x`` [tokens, width], computed for ``tokens``."""
    width, count = layer.config["hidden_size"], layer.config["num_attention_heads"]
    fused = layer.fused([f"attention.self.{part}" for part in ("query", "key", "value")])
    attended = layer.attend(x, tokens, fused, Heads.of(count, width // count), mask)
    return finish_layer(layer, attended, layer.residual(x, tokens, width))


def finish_layer(layer: GraphContext, attended: Node, before: Node) -> Node:
    """The layer after attention: output, feed-forward, and the norm after each. before: the layer's input, [tokens, width]."""
    mixed = layer.linear("attention.output.dense", attended)
    x = layer.layer_norm("attention.output.LayerNorm", op.add(mixed, before), epsilon(layer.config))
    inner = layer.activation(layer.config.get("hidden_act", "gelu"), layer.linear("intermediate.dense", x))
    outer = op.add(layer.linear("output.dense", inner), x)
    return layer.layer_norm("output.LayerNorm", outer, epsilon(layer.config))
