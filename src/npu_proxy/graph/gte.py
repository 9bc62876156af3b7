"""GTE (Alibaba's "new" encoder, Snowflake arctic-embed v2); Nomic BERT has the same layers: post-norm, rotary, gated MLP.

Source: Zhang et al. 2024 (mGTE); tensor names of transformers' ``gte`` and of the original checkpoints.
"""

from __future__ import annotations

from npu_proxy.errors import ModelError
from npu_proxy.graph.activations import check_activation, gelu
from npu_proxy.graph.bert import classifier_pooling, label_logits
from npu_proxy.graph.context import GraphContext
from npu_proxy.graph.inputs import LayerTokens, attention_mask
from npu_proxy.graph.layers import FusedLinear, Heads
from npu_proxy.graph.nodes import Config, Node, constant, integers, op
from npu_proxy.graph.rotary import Rotation, rotary

__all__ = [
    "MODEL_TYPES",
    "canonical_name",
    "check_config",
    "classifier_pooling",
    "encode",
    "label_logits",
    "normalize_config",
    "vocabulary_logits",
]

MODEL_TYPES = ("gte", "new")

_NAMES = {
    "encoder.layer.": "layers.",
    ".attention.qkv_proj.": ".self_attn.qkv_proj.",
    ".attention.o_proj.": ".self_attn.o_proj.",
    ".attn_ln.": ".post_attention_layernorm.",
    ".mlp_ln.": ".post_mlp_layernorm.",
    "lm_head.norm.": "lm_head.layer_norm.",
}


def normalize_config(config: Config) -> Config:
    """config.json with the defaults of either model type filled in."""
    old = config["model_type"] == "new"
    return {
        "rope_theta": 10_000.0 if old else 160_000.0,
        "layer_norm_eps": 1e-12,
        **config,
        "attention_bias": True,
        "mlp_bias": True,
    }


def canonical_name(name: str) -> str:
    """Transformers' name for a checkpoint's tensor."""
    name = name.removeprefix("new.").removeprefix("gte.")
    for old, new in _NAMES.items():
        name = name.replace(old, new)
    return name


def check_config(config: Config) -> None:
    """Raise ModelError for a config that this file would compute wrongly."""
    check_activation(config, "hidden_act")
    for key, wanted in (("position_embedding_type", "rope"), ("layer_norm_type", "layer_norm"), ("logn_attention_scale", False)):
        if config.get(key, wanted) != wanted:
            raise ModelError(f"config.json: {key} `{config[key]}` is not supported for this family, only `{wanted}`")


def encode(graph: GraphContext) -> Node:
    """Hidden states of the last layer; see ``bert.encode``."""
    config, inputs, embeddings = graph.config, graph.inputs, graph.scope("embeddings")
    rotate = rotary(config, width=config["hidden_size"] // config["num_attention_heads"], theta=config["rope_theta"])
    x = embeddings.embedding("word_embeddings", inputs.ids)
    if config.get("type_vocab_size") and embeddings.has("token_type_embeddings.weight"):
        types = embeddings.weight("token_type_embeddings.weight")
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
    biased = config["attention_bias"]
    fused = _fused(layer, "self_attn.qkv_proj", [f"self_attn.{part}_proj" for part in "qkv"], bias=biased)
    mask = attention_mask(layer.inputs, tokens)
    attended = layer.attend(x, tokens, fused, Heads.of(count, width // count), mask, rotate)
    mixed = layer.linear("self_attn.o_proj", attended, bias=biased)
    x = op.add(layer.residual(x, tokens, width), mixed)
    x = layer.layer_norm("post_attention_layernorm", x, epsilon)
    up, gate = _fused(layer, "mlp.up_gate_proj", ["mlp.up_proj", "mlp.gate_proj"], bias=False)(x)
    inner = op.multiply(layer.activation(config.get("hidden_act", "gelu"), gate), up)
    x = op.add(x, layer.linear("mlp.down_proj", inner, bias=config["mlp_bias"]))
    return layer.layer_norm("post_mlp_layernorm", x, epsilon)


def _fused(layer: GraphContext, stored: str, names: list[str], *, bias: bool) -> FusedLinear:
    """Fused linear layers, which original checkpoints store as one tensor and transformers' checkpoints separately."""
    if layer.has(f"{stored}.weight"):
        return layer.stored_fused(stored, len(names), bias=bias)
    return layer.fused(names, bias=bias)
