"""GTE (Alibaba's "new" encoder, Snowflake arctic-embed v2) and Nomic BERT's layers: post-norm, rotary, gated feed-forward.

Source: Zhang et al. 2024 (mGTE); tensor names of transformers' ``gte`` and of the original checkpoints.
"""

from __future__ import annotations

from openvino import opset15 as op

from npu_proxy.errors import ModelError
from npu_proxy.graph.bert import Config, scores_pooling
from npu_proxy.graph.layers import (
    ACTIVATIONS,
    Heads,
    Rotation,
    check_activation,
    dense,
    gelu,
    joint,
    layer_norm,
    linear,
    rotary,
    self_attention,
)
from npu_proxy.graph.packed import Node, RowInputs, Rows, Style, Weights, attention_mask, constant, integers

__all__ = ["MODEL_TYPES", "canonical_name", "check", "encode", "scores", "scores_pooling", "standard", "vocabulary"]

MODEL_TYPES = ("gte", "new")

_NAMES = {
    "encoder.layer.": "layers.",
    ".attention.qkv_proj.": ".self_attn.qkv_proj.",
    ".attention.o_proj.": ".self_attn.o_proj.",
    ".attn_ln.": ".post_attention_layernorm.",
    ".mlp_ln.": ".post_mlp_layernorm.",
    "lm_head.norm.": "lm_head.layer_norm.",
}


def standard(config: Config) -> Config:
    """What the two names of the family take for granted, written out."""
    old = config["model_type"] == "new"
    return {
        "rope_theta": 10_000.0 if old else 160_000.0,
        "layer_norm_eps": 1e-12,
        **config,
        "attention_bias": True,
        "mlp_bias": True,
    }


def canonical_name(name: str) -> str:
    """The names of transformers."""
    name = name.removeprefix("new.").removeprefix("gte.")
    for old, new in _NAMES.items():
        name = name.replace(old, new)
    return name


def check(config: Config) -> None:
    """Refuse what this file would compute wrongly. Raises ModelError."""
    check_activation(config, "hidden_act")
    for key, wanted in (("position_embedding_type", "rope"), ("layer_norm_type", "layer_norm"), ("logn_attention_scale", False)):
        if config.get(key, wanted) != wanted:
            raise ModelError(f"config.json: {key} `{config[key]}` is not supported for this family, only `{wanted}`")


def encode(config: Config, weights: Weights, inputs: RowInputs, style: Style) -> Node:
    """As bert.encode."""
    rotate = rotary(config, width=config["hidden_size"] // config["num_attention_heads"], theta=config["rope_theta"])
    x = op.gather(constant(weights["embeddings.word_embeddings.weight"]), inputs.ids, integers(0))
    typed = "embeddings.token_type_embeddings.weight"
    if config.get("type_vocab_size") and typed in weights:
        types = weights[typed]
        x = op.add(x, constant(types[0]) if inputs.types is None else op.gather(constant(types), inputs.types, integers(0)))
    x = layer_norm(weights, "embeddings.LayerNorm", x, config["layer_norm_eps"])
    for number in range(layers := config["num_hidden_layers"]):
        rows = inputs.rows(last=number == layers - 1)
        x = _layer(config, weights, f"layers.{number}.", x, inputs, rows, rotate, style)
    return x


def scores(config: Config, weights: Weights, pooled: Node, style: Style) -> Node:
    """Logits [n, labels]."""
    return dense(weights, "classifier", op.tanh(dense(weights, "pooler.dense", pooled)))


def vocabulary(config: Config, weights: Weights, hidden: Node, style: Style) -> Node:
    """Logits [tokens, vocabulary]."""
    x = layer_norm(weights, "lm_head.layer_norm", gelu(dense(weights, "lm_head.dense", hidden), style), config["layer_norm_eps"])
    stored, tied = "lm_head.decoder.weight", "embeddings.word_embeddings.weight"
    return linear(x, weights[stored if stored in weights else tied], weights["lm_head.decoder.bias"])


def _layer(
    config: Config, weights: Weights, layer: str, x: Node, inputs: RowInputs, rows: Rows, rotate: Rotation, style: Style
) -> Node:
    width, count = config["hidden_size"], config["num_attention_heads"]
    attention, biased = f"{layer}self_attn.", config["attention_bias"]
    parts = joint(weights, [f"{attention}{part}_proj" for part in "qkv"], f"{attention}qkv_proj", bias=biased)
    mask = attention_mask(inputs, rows)
    attended = self_attention(x, rows, inputs, parts, Heads.of(count, width // count), mask, style, rotate)
    mixed = dense(weights, f"{attention}o_proj", attended, bias=biased)
    x = op.add(rows.take(x, inputs.every.grid, width), mixed)
    x = layer_norm(weights, f"{layer}post_attention_layernorm", x, config["layer_norm_eps"])
    names = [f"{layer}mlp.{part}_proj" for part in ("up", "gate")]
    up, gate = joint(weights, names, f"{layer}mlp.up_gate_proj", bias=False)(x)
    inner = op.multiply(ACTIVATIONS[config.get("hidden_act", "gelu")](gate, style), up)
    x = op.add(x, dense(weights, f"{layer}mlp.down_proj", inner, bias=config["mlp_bias"]))
    return layer_norm(weights, f"{layer}post_mlp_layernorm", x, config["layer_norm_eps"])
