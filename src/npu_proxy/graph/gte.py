"""GTE (Alibaba's "new" encoder, Snowflake arctic-embed v2); Nomic BERT has the same layers: post-norm, rotary, gated MLP.

Source: Zhang et al. 2024 (mGTE); tensor names of transformers' ``gte`` and of the original checkpoints.
"""

from __future__ import annotations

from npu_proxy.graph.activations import gelu
from npu_proxy.graph.bert import classifier_pooling, label_logits
from npu_proxy.graph.context import GraphContext
from npu_proxy.graph.inputs import LayerTokens, attention_mask
from npu_proxy.graph.keys import Keys, Stored, activation, count, flag, model_sizes, one_of, only, real, size
from npu_proxy.graph.layers import FusedLinear, Heads
from npu_proxy.graph.nodes import Node, constant, integers, op
from npu_proxy.graph.rotary import ROTARY_KINDS, RotaryConfig, Rotation, read_rotary

__all__ = [
    "KEYS",
    "MODEL_TYPES",
    "canonical_name",
    "classifier_pooling",
    "encode",
    "label_logits",
    "vocabulary_logits",
]

MODEL_TYPES = ("gte", "new")


def _rotary(stored: Stored) -> RotaryConfig:
    original = stored["model_type"] == "new"
    kinds = ("default", "linear", "dynamic", "yarn", "ntk") if original else ROTARY_KINDS
    return read_rotary(stored, theta=10_000.0 if original else 160_000.0, kinds=kinds)


def even_heads(stored: Stored) -> int:
    """The width of heads, which divide the hidden size evenly."""
    hidden: int = size("hidden_size", "n_embd")(stored)
    heads: int = size("num_attention_heads", "n_head")(stored)
    return int(one_of("head_dim", values=(hidden // heads,), default=hidden // heads)(stored))


KEYS: Keys = {
    **model_sizes(),
    "type_vocab_size": count("type_vocab_size", default=1),
    "hidden_act": activation("hidden_act"),
    "layer_norm_eps": real("layer_norm_eps", default=1e-12),
    "rotary": _rotary,
    "head_dim": even_heads,
    "is_causal": only("is_causal", False),
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
    "position_embedding_type": only("position_embedding_type", "rope"),
    "layer_norm_type": only("layer_norm_type", "layer_norm"),
    "logn_attention_scale": only("logn_attention_scale", False),
    "biases": lambda _: True,
}

_NAMES = {
    "encoder.layer.": "layers.",
    ".attention.qkv_proj.": ".self_attn.qkv_proj.",
    ".attention.o_proj.": ".self_attn.o_proj.",
    ".attn_ln.": ".post_attention_layernorm.",
    ".mlp_ln.": ".post_mlp_layernorm.",
    "lm_head.norm.": "lm_head.layer_norm.",
}


def canonical_name(name: str) -> str:
    """Transformers' name for a checkpoint's tensor."""
    name = name.removeprefix("new.").removeprefix("gte.")
    for old, new in _NAMES.items():
        name = name.replace(old, new)
    return name


def encode(graph: GraphContext) -> Node:
    """Hidden states of the last layer; see ``bert.encode``."""
    config, inputs, embeddings = graph.config, graph.inputs, graph.scope("embeddings")
    head_width = config["hidden_size"] // config["num_attention_heads"]
    rotate = Rotation(config["rotary"], width=head_width, limit=config["max_length"])
    x = embeddings.embedding("word_embeddings", inputs.ids, "vocab_size")
    if config["type_vocab_size"]:
        types = embeddings.table("token_type_embeddings", "type_vocab_size")
        x = op.add(x, constant(types[0]) if inputs.type_ids is None else op.gather(constant(types), inputs.type_ids, integers(0)))
    x = embeddings.layer_norm("LayerNorm", x, config["layer_norm_eps"])
    for number in range(layers := config["num_hidden_layers"]):
        tokens = inputs.layer_tokens(last=number == layers - 1)
        x = _layer(graph.scope(f"layers.{number}"), x, tokens, rotate)
    return x


def vocabulary_logits(graph: GraphContext, hidden: Node) -> Node:
    """Logits [tokens, vocabulary]."""
    head = graph.scope("lm_head")
    x = head.layer_norm("layer_norm", gelu(head.linear("dense", hidden), graph.style), graph.config["layer_norm_eps"])
    bias = head.weight("decoder.bias")
    return graph.tied_linear(x, "lm_head.decoder.weight", "embeddings.word_embeddings.weight", bias)


def _layer(layer: GraphContext, x: Node, tokens: LayerTokens, rotate: Rotation) -> Node:
    config = layer.config
    width, count, epsilon = config["hidden_size"], config["num_attention_heads"], config["layer_norm_eps"]
    biased = config["biases"]
    fused = _fused(layer, "self_attn.qkv_proj", [f"self_attn.{part}_proj" for part in "qkv"], "hidden_size", bias=biased)
    mask = attention_mask(layer.inputs, tokens)
    attended = layer.attend(x, tokens, fused, Heads.of(count, width // count), mask, rotate)
    mixed = layer.linear("self_attn.o_proj", attended, "hidden_size", bias=biased)
    x = op.add(layer.residual(x, tokens, width), mixed)
    x = layer.layer_norm("post_attention_layernorm", x, epsilon)
    up, gate = _fused(layer, "mlp.up_gate_proj", ["mlp.up_proj", "mlp.gate_proj"], "intermediate_size", bias=False)(x)
    inner = op.multiply(layer.activation(config["hidden_act"], gate), up)
    x = op.add(x, layer.linear("mlp.down_proj", inner, "hidden_size", bias=biased))
    return layer.layer_norm("post_mlp_layernorm", x, epsilon)


def _fused(layer: GraphContext, stored: str, names: list[str], key: str, *, bias: bool) -> FusedLinear:
    """Fused linear layers, which original checkpoints store as one tensor and transformers' checkpoints separately."""
    if layer.has(f"{stored}.weight"):
        return layer.stored_fused(stored, len(names), key, bias=bias)
    return layer.fused(names, [key] * len(names), bias=bias)
