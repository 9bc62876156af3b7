"""Nomic BERT: GTE's layers without biases in their linear layers.

Source: Nussbaum et al. 2024; tensor names of transformers' ``nomic_bert`` and of the original checkpoints.
"""

from __future__ import annotations

from typing import Any

from npu_proxy.errors import ModelError
from npu_proxy.graph.bert import classifier_pooling, label_logits, vocabulary_logits
from npu_proxy.graph.gte import encode, even_heads
from npu_proxy.graph.keys import Key, Keys, Stored, absent, activation, count, flag, only, real, size
from npu_proxy.graph.rotary import read_rotary

__all__ = [
    "KEYS",
    "MODEL_TYPES",
    "canonical_name",
    "classifier_pooling",
    "encode",
    "label_logits",
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


def _positions(stored: Stored) -> int:
    """Positions of a text. Beyond its training length, the original model scales positions by the length of the batch."""
    positions: int = size("max_position_embeddings", "n_positions")(stored)
    trained: int = count("max_trained_positions", default=0)(stored)
    return min(positions, trained or positions)


def _stated(name: str, key: Key) -> Key:
    """A key whose default differs in the original code, so that original configurations must state it."""

    def read(stored: Stored) -> Any:
        if "n_embd" in stored and name not in stored:
            raise ModelError(f"config.json: `{name}` is missing")
        return key(stored)

    return read


def _activation(stored: Stored) -> str:
    if "n_embd" in stored:
        _stated("activation_function", only("activation_function", "swiglu"))(stored)
        return "silu"
    return str(activation("hidden_act", default="silu")(stored))


KEYS: Keys = {
    "vocab_size": size("vocab_size"),
    "hidden_size": size("hidden_size", "n_embd"),
    "num_hidden_layers": size("num_hidden_layers", "n_layer"),
    "num_attention_heads": size("num_attention_heads", "n_head"),
    "intermediate_size": size("intermediate_size", "n_inner"),
    "max_position_embeddings": _positions,
    "type_vocab_size": count("type_vocab_size", default=2),
    "hidden_act": _activation,
    "layer_norm_eps": _stated("layer_norm_epsilon", real("layer_norm_eps", "layer_norm_epsilon", default=1e-12)),
    "rotary": _stated("rotary_emb_base", lambda stored: read_rotary(stored, "rotary_emb_base", "rope_theta", theta=1000.0)),
    "biases": lambda _: False,
    "head_dim": even_heads,
    "is_causal": only("is_causal", False),
    "causal": only("causal", False),
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
    "prenorm": only("prenorm", False),
    "rotary_emb_fraction": _stated("rotary_emb_fraction", only("rotary_emb_fraction", 1.0)),
    "rotary_emb_interleaved": only("rotary_emb_interleaved", False),
    "rotary_emb_scale_base": absent("rotary_emb_scale_base"),
    "rotary_head_dim": only("rotary_head_dim", False),
    "qkv_proj_bias": _stated("qkv_proj_bias", only("qkv_proj_bias", False)),
    "mlp_fc1_bias": _stated("mlp_fc1_bias", only("mlp_fc1_bias", False)),
    "mlp_fc2_bias": _stated("mlp_fc2_bias", only("mlp_fc2_bias", False)),
    "num_heads_kv": absent("num_heads_kv"),
    "parallel_block_tied_norm": only("parallel_block_tied_norm", False),
    "use_rms_norm": only("use_rms_norm", False),
    "parallel_block": only("parallel_block", False),
    "num_experts": only("num_experts", None, 0),
    "moe_every_n_layers": only("moe_every_n_layers", 0),
}


def canonical_name(name: str) -> str:
    """Transformers' name for a checkpoint's tensor."""
    name = name.removeprefix("bert.").removeprefix("nomic_bert.").removeprefix("model.")
    for old, new in _NAMES.items():
        name = name.replace(old, new)
    return name
