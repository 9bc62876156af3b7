"""Keys of a model's files that cannot change its numbers. **A key is one word of a row**, with the reason beside it.

What a key means to a family is in the family's file (``KEYS``); whatever neither of them has is refused (unread.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ANY: Any = object()
"""The value of a key that is harmless whatever it says."""


def is_harmless(kind: str, key: str, value: Any) -> bool:
    """Whether a key with this value cannot change numbers."""
    known = HARMLESS.get(kind, {})
    outer, dot, last = key.rpartition(".")
    names = [key, "*", *([f"*.{last}", f"{outer.split('.', 1)[0]}.*"] if dot else [])]
    for name in names:
        for harmless, _ in known.get(name, ()):
            if harmless is ANY or (value == harmless and isinstance(value, bool) == isinstance(harmless, bool)):
                return True
    return False


Harmless = Mapping[str, Sequence[tuple[Any, str]]]


def _harmless(*groups: tuple[str, Mapping[str, Any] | str]) -> Harmless:
    """The table of a file. Each group is a reason, and the keys it holds for: with a value, or (separated by spaces) with any."""
    table: dict[str, list[tuple[Any, str]]] = {}
    for reason, keys in groups:
        for key, value in keys.items() if isinstance(keys, Mapping) else ((name, ANY) for name in keys.split()):
            table.setdefault(key, []).append((value, reason))
    return table


_TOKEN_FLAGS = "*.__type *.content *.lstrip *.rstrip *.normalized *.single_word *.special *.id"
_GTE = _harmless(
    ("how it is computed, not what", "unpad_inputs use_memory_efficient_attention pack_qkv"),
    ("only with `logn_attention_scale`, which is refused", "logn_attention_clip1"),
)
HARMLESS: Mapping[str, Harmless] = {
    "config.json": _harmless(
        (
            "who wrote the file",
            (
                "_name_or_path name_or_path transformers_version _commit_hash unsloth_version unsloth_fixed xla_device license"
                " widget transformers.js_config transformers.js_config.* language vocab_file"
            ),
        ),
        ("the output type follows from the modules, or from the head that the architecture names", "architectures"),
        ("the type in which weights are stored; npu-proxy computes in fp32", "torch_dtype dtype use_bfloat16"),
        (
            "only for training",
            (
                "attention_dropout attention_probs_dropout_prob hidden_dropout_prob hidden_dropout dropout classifier_dropout"
                " embedding_dropout mlp_dropout pooler_dropout cls_dropout qa_dropout seq_classif_dropout summary_last_dropout"
                " activation_dropout resid_pdrop embd_pdrop attn_pdrop initializer_range initializer_factor"
                " initializer_cutoff_factor gradient_checkpointing finetuning_task loss_type classifier_dropout_prob tie_weights_"
            ),
        ),
        (
            "labels of a head; a model with that head reads them",
            (
                "id2label label2id num_labels problem_type sentence_transformers sentence_transformers.*"
                " sbert_ce_default_activation_function matryoshka_dimensions classifier_bias classifier_pooling"
            ),
        ),
        ("what a call returns", "output_hidden_states output_attentions return_dict use_cache use_return_dict output_past"),
        (
            "only for generating text",
            (
                "bos_token_id eos_token_id pad_token_id cls_token_id sep_token_id mask_token_id decoder_start_token_id"
                " forced_bos_token_id forced_eos_token_id max_length min_length do_sample early_stopping num_beams num_beam_groups"
                " diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size"
                " encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate"
                " remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens task_specific_params"
                " prefix is_encoder_decoder tie_encoder_decoder cross_attention_hidden_size tf_legacy_loss cache_implementation"
                " final_logit_softcapping"
            ),
        ),
        (
            "how it is computed, not what",
            (
                "chunk_size_feed_forward _attn_implementation attn_implementation torchscript _attn_implementation_autoset"
                " _attn_implementation_internal _flash_attn_2_enabled use_flash_attention_2"
            ),
        ),
        ("the files of the tokenizer say it", "tokenizer_class model_max_length"),
        (
            "written by old releases, and read by no code",
            (
                "directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type"
                " pooler_hidden_size _num_labels adapters encoder_type emb_size cell pre_trained structure training eos_token_ids"
            ),
        ),
        (
            "a switch that is off",
            {"pruned_heads": {}, "quantization_config": None, "per_layer_config": None, "custom_pipelines": None},
        ),
    ),
    "config.json distilbert": _harmless(("the table of positions is stored", "sinusoidal_pos_embds")),
    "config.json modernbert": _harmless(
        ("how it is computed, not what", "reference_compile repad_logits_with_grad deterministic_flash_attn"),
        ("only for training", "sparse_prediction sparse_pred_ignore_index"),
        ("no code reads it", "layer_norm_eps position_embedding_type"),
    ),
    "config.json gte": _GTE,
    "config.json new": _GTE,
    "config.json nomic_bert": _harmless(
        (
            "how it is computed, not what",
            (
                "use_flash_attn use_xentropy fused_bias_fc fused_dropout_add_ln dense_seq_output last_layer_subset"
                " mlp_checkpoint_lvl pad_vocab_size_multiple reorder_and_upcast_attn scale_attn_by_inverse_layer_idx"
                " scale_attn_weights"
            ),
        ),
        ("only beyond the trained length, where texts end", "rotary_scaling_factor"),
        ("no code reads it", "summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj"),
    ),
    "config.json deberta-v2": _harmless(
        ("only with a convolution", "conv_act conv_groups"),
        ("no code reads it", "padding_idx z_steps is_decoder"),
    ),
    "config.json qwen3": _harmless(
        ("only with a sliding window", "max_window_layers sliding_window"),
        ("no code reads it", "logit_scale attn_logit_softcapping"),
    ),
    "config.json gemma3_text": _harmless(("no code reads it", "_sliding_window_pattern hidden_act")),
    "config.json model2vec": _harmless(
        (
            "how the table was made",
            (
                "apply_pca apply_zipf sif_coefficient hidden_dim tokenizer_name embedding_dtype vocabulary_quantization pooling"
                " seq_length model_name"
            ),
        ),
        ("set by npu-proxy", "vocab_size hidden_size max_position_embeddings"),
    ),
    "modules.json": _harmless(("a number and a name", "idx name"), ("no arguments", {"kwargs": []})),
    "sentence_bert_config.json": _harmless(
        ("how it is computed, not what", "unpad_inputs cache_dir backend"),
        (
            "the value that text models have",
            {
                "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
                "module_output_name": "token_embeddings",
                "tokenizer_name_or_path": None,
                "processing_kwargs": {},
            },
        ),
        ("the value that text models have", {"modality_config": {"text": {"method": "forward", "method_output_name": "logits"}}}),
        ("the value that text models have", {"modality_config.text": {"method": "forward", "method_output_name": "logits"}}),
        (
            "the value that text models have",
            {
                "modality_config.message.method": "forward",
                "modality_config.message.method_output_name": "logits",
                "module_output_name": "causal_logits",
            },
        ),
        (
            "the value that text models have",
            {"module_output_name": "scores", "query_expansion": None, "query_length": None, "document_length": None},
        ),
        ("how the model is loaded", {"model_args": {}, "model_kwargs": {}}),
        *(
            ("how the model is loaded", f"{name}.{key}")
            for name in ("model_args", "model_kwargs")
            for key in ("dtype", "torch_dtype", "attn_implementation", "add_pooling_layer", "trust_remote_code", "device_map")
        ),
    ),
    "config_sentence_transformers.json": _harmless(
        ("who wrote the file", "__version__ __version__.* requirements requirements.*"),
        ("what the modules say", "model_type"),
        ("a switch that is off", {"max_active_dims": None, "activation_fn": None}),
        ("how it is computed, not what", "keep_in_fp32_modules"),
    ),
    "tokenizer_config.json": _harmless(
        (
            "who wrote the file, and where",
            (
                "name_or_path tokenizer_file vocab_file merges_file special_tokens_map_file init_inputs backend is_local use_fast"
                " local_files_only fast_tokenizer_files language device_map cache_dir trust_remote_code full_tokenizer_file"
                " added_tokens_file from_flax tokenizer_object"
            ),
        ),
        (
            "padding, which npu-proxy does not need; the model's limit counts",
            (
                "padding_side padding pad_to_multiple_of pad_token_type_id max_length stride truncation truncation_strategy"
                " tokenizer_padding pad_token_id cls_token_id model_max_length max_len return_token_type_ids bos_token_id"
                " eos_token_id sep_token_id mask_token_id unk_token_id"
            ),
        ),
        (
            "only of tokenizers that are not fast",
            (
                "do_basic_tokenize never_split errors keep_accents remove_space sp_model_kwargs sp_model legacy"
                " use_default_system_prompt vocab vocab_size vocab_type tokenizer_type special_tokens"
                " model_specific_special_tokens from_slow extra_ids"
            ),
        ),
        ("transformers drops it where there is a tokenizer.json", "add_bos_token add_eos_token"),
        ("only for decoding", "clean_up_tokenization_spaces spaces_between_special_tokens trim_offsets"),
        (
            "only for conversations; npu-proxy embeds texts",
            "chat_template response_schema processor_class response_template chat_control_tokens",
        ),
        (
            "arguments of another class",
            "do_lower_case strip_accents tokenize_chinese_chars add_prefix_space split_by_punct unk_id",
        ),
        ("the value that its class has anyway", {"clean_text": True, "wordpieces_prefix": "##"}),
        ("of Mistral's own tokenizers", "fix_mistral_regex"),
        ("the class of the tokenizer", "tokenizer_class auto_map auto_map.*"),
        ("flags of a token that tokenizer.json lists", _TOKEN_FLAGS),
    ),
    "special_tokens_map.json": _harmless(("flags of a token that tokenizer.json lists", _TOKEN_FLAGS)),
    "artifact.metadata": _harmless(
        (
            "for training and for indexes",
            (
                "query_token doc_token ncells centroid_score_threshold ndocs index_path nbits kmeans_niters resume"
                " similarity bsize accumsteps lr maxsteps save_every warmup warmup_bert relu nway use_ib_negatives reranker"
                " distillation_alpha ignore_scores model_name interaction dim checkpoint triples collection queries"
                " index_name overwrite root experiment index_root name rank nranks amp gpus meta meta.*"
                " load_index_with_mmap index_bsize avoid_fork_if_possible"
            ),
        ),
    ),
    "adapter_config.json": _harmless(
        (
            "who wrote the file, and how it was trained",
            (
                "peft_version auto_mapping auto_mapping.* inference_mode revision task_type init_lora_weights lora_dropout"
                " megatron_core qalora_group_size base_model_name_or_path"
            ),
        ),
        ("which layers have tensors", "target_modules exclude_modules layers_to_transform layers_pattern"),
        ("a switch that is off", {"*": None}),
        ("a switch that is off", {"*": False}),
        ("a switch that is off", {"*": {}, "bias": "none"}),
    ),
    "Router": _harmless(("what a text without a route is", "parameters.allow_empty_key types.* structure.*")),
    "SparseStaticEmbedding": _harmless(("only for training", "frozen")),
    "SpladePooling": _harmless(("how it is computed, not what", "chunk_size")),
    "Dropout": _harmless(("only for training", "dropout")),
}
"""Keys that do not change a model's numbers, by file or module type (and family): their harmless values, and why."""
