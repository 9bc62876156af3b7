"""Nomic BERT: GTE's layers without biases in their linear layers.

Source: Nussbaum et al. 2024; tensor names of transformers' ``nomic_bert`` and of the original checkpoints.
"""

from __future__ import annotations

from npu_proxy.errors import ModelError
from npu_proxy.graph.activations import check_activation
from npu_proxy.graph.bert import classifier_pooling, label_logits, vocabulary_logits
from npu_proxy.graph.gte import encode
from npu_proxy.graph.nodes import Config

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
_GPT2_KEYS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "layer_norm_epsilon": "layer_norm_eps",
}


def normalize_config(config: Config) -> Config:
    """config.json with transformers' keys in place of the original ones, which are GPT-2's."""
    named = {"layer_norm_eps": 1e-12, **config, **{new: config[old] for old, new in _GPT2_KEYS.items() if old in config}}
    if "n_positions" in config:
        # Beyond its training length, the original model scales positions by the length of the batch.
        named["max_position_embeddings"] = min(config["n_positions"], config.get("max_trained_positions") or config["n_positions"])
        named["hidden_act"] = "silu"
    theta = config.get("rotary_emb_base", config.get("rope_theta", 1000.0))
    return {"type_vocab_size": 2, "hidden_act": "silu", **named, "rope_theta": theta, "attention_bias": False, "mlp_bias": False}


def canonical_name(name: str) -> str:
    """Transformers' name for a checkpoint's tensor."""
    name = name.removeprefix("bert.").removeprefix("nomic_bert.").removeprefix("model.")
    for old, new in _NAMES.items():
        name = name.replace(old, new)
    return name


def check_config(config: Config) -> None:
    """Raise ModelError for a config that this file would compute wrongly."""
    supported = {
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
    for key, wanted in supported.items():
        if config.get(key, wanted) not in (wanted, None):
            raise ModelError(f"config.json: {key} `{config[key]}` is not supported for Nomic BERT, only `{wanted}`")
    check_activation(config, "hidden_act", "silu")
