"""Nomic BERT: GTE's layers without biases in its products.

Source: Nussbaum et al. 2024; tensor names of transformers' ``nomic_bert`` and of the original checkpoints.
"""

from __future__ import annotations

from openvino import opset15 as op

from npu_proxy.errors import ModelError
from npu_proxy.graph.bert import Config, scores_pooling, vocabulary
from npu_proxy.graph.gte import encode
from npu_proxy.graph.layers import check_activation, dense
from npu_proxy.graph.packed import Node, Style, Weights

__all__ = ["MODEL_TYPES", "canonical_name", "check", "encode", "scores", "scores_pooling", "standard", "vocabulary"]

MODEL_TYPES = ("nomic_bert",)

_NAMES = {
    "encoder.layers.": "layers.",
    "emb_ln.": "embeddings.LayerNorm.",
    ".attn.Wqkv.": ".self_attn.qkv_proj.",
    ".attn.out_proj.": ".self_attn.o_proj.",
    ".fc11.": ".up_proj.",
    ".fc12.": ".gate_proj.",
    ".fc2.": ".down_proj.",
    ".norm1.": ".post_attention_layernorm.",
    ".norm2.": ".post_mlp_layernorm.",
    ".transform.layer_norm.": ".transform.LayerNorm.",
}
_OLD = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "layer_norm_epsilon": "layer_norm_eps",
}


def standard(config: Config) -> Config:
    """The names of transformers for those of the original config, which are GPT-2's."""
    named = {"layer_norm_eps": 1e-12, **config, **{new: config[old] for old, new in _OLD.items() if old in config}}
    if "n_positions" in config:
        # Beyond the length it was trained with, the original stretches positions by the length of the batch.
        named["max_position_embeddings"] = min(config["n_positions"], config.get("max_trained_positions") or config["n_positions"])
        named["hidden_act"] = "silu"
    theta = config.get("rotary_emb_base", config.get("rope_theta", 1000.0))
    return {"type_vocab_size": 2, "hidden_act": "silu", **named, "rope_theta": theta, "attention_bias": False, "mlp_bias": False}


def canonical_name(name: str) -> str:
    """The names of transformers."""
    name = name.removeprefix("bert.").removeprefix("nomic_bert.").removeprefix("model.")
    for old, new in _NAMES.items():
        name = name.replace(old, new)
    return name


def check(config: Config) -> None:
    """Refuse what this file would compute wrongly. Raises ModelError."""
    plain = {
        "prenorm": False,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        "qkv_proj_bias": False,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
        "use_rms_norm": False,
        "parallel_block": False,
        "num_experts": None,
        "moe_every_n_layers": 0,
        "activation_function": "swiglu",
    }
    for key, wanted in plain.items():
        if config.get(key, wanted) not in (wanted, None):
            raise ModelError(f"config.json: {key} `{config[key]}` is not supported for Nomic BERT, only `{wanted}`")
    check_activation(config, "hidden_act", "silu")


def scores(config: Config, weights: Weights, pooled: Node, style: Style) -> Node:
    """Logits [n, labels]."""
    return dense(weights, "classifier", op.tanh(dense(weights, "pooler.dense", pooled)))
