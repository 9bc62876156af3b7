"""Makes golden models with one odd thing each that people's folders have, and what the reference libraries compute of them.

Run it by ``make golden``. Each folder of ``odd/`` holds a tiny random model and ``answers.npz``: one array per text of
``texts.json``, computed one text at a time in float32 by sentence-transformers or model2vec. **A case is one function.**
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers as t
from make import tokenizer, write
from model2vec import StaticModel
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Pooling, StaticEmbedding
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

ODD = Path(__file__).parent / "odd"
WIDTH, LIMIT = 32, 24
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NAMED = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
TEXTS = [
    "the cat sleeps",
    "A big RED house, and a small one!",
    "x",
    "?",
    "  many   spaces\t\n ",
    "naïve café ÀÉÎ",
    "zzqq unknown 日本語テキスト 🚀",
    "the [MASK] cat [PAD]",
    "[CLS] the [SEP] cat [UNK] [mask]",
    "<s> the </s> <mask> <pad> <unk>",
    "<|im_end|>the<|endoftext|> cat <ent>",
    "one two three four five " * 2,
    *("sea " * count for count in (20, 21, 22, 23, 24, 25, 60)),
    "a" * 120,
    "don't stop-it",
]
Answers = list[np.ndarray]


def cased_wordpiece(*, lower: bool = False, template: bool = True) -> Tokenizer:
    """The tiny tokenizer, with its special tokens added, capital words and a template for pairs."""
    stored = json.loads(tokenizer().to_str())
    for word in ("A", "RED", "The", "é", "##é"):
        stored["model"]["vocab"].setdefault(word, len(stored["model"]["vocab"]))
    made = Tokenizer.from_str(json.dumps({**stored, "truncation": None, "padding": None, "post_processor": None}))
    made.normalizer = normalizers.BertNormalizer(lowercase=lower)
    made.add_special_tokens(list(SPECIAL))
    if template:
        ids = [(token, made.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
        pair = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
        made.post_processor = processors.TemplateProcessing(single="[CLS]:0 $A:0 [SEP]:0", pair=pair, special_tokens=ids)
    return made


def byte_pairs(*special: str, prefix: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([*TEXTS, "the cat sleeps on the red house"] * 5, trainer)
    return made


def roberta_tokenizer() -> Tokenizer:
    made = byte_pairs("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False)
    return made


def qwen_tokenizer(*, ends: bool = True) -> Tokenizer:
    made = byte_pairs("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    if ends:
        frame = ("$A <|endoftext|>", "$A $B <|endoftext|>")
        made.post_processor = processors.TemplateProcessing(single=frame[0], pair=frame[1], special_tokens=[("<|endoftext|>", 0)])
    return made


def pieces() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=160, special_tokens=special, unk_token="<unk>", show_progress=False)
    made.train_from_iterator([*TEXTS, "the cat sleeps on the red house"] * 5, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return made


def stirred(model: torch.nn.Module) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1 if "norm" in name.lower() and name.endswith("weight") else 0, 0.3)
    return model.eval()


def bert(encode: Tokenizer, head: type = t.BertModel, rows: int = 0, **more: Any) -> Any:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return stirred(head(t.BertConfig(vocab_size=rows or encode.get_vocab_size(), **sizes, max_position_embeddings=32, **more)))


def decoder(config: type, model: type, encode: Tokenizer, **more: Any) -> Any:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "head_dim": 8}
    sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": None}
    return stirred(model(config(vocab_size=encode.get_vocab_size(), **{**sizes, **more})))


def saved(model: Any, encode: Tokenizer, **named: str) -> Path:
    """A plain folder of a model and its tokenizer, which is taken as it is."""
    folder = Path(tempfile.mkdtemp())
    model.save_pretrained(folder)
    inputs = (
        ["input_ids", "token_type_ids", "attention_mask"] if "cls_token" in (named or NAMED) else ["input_ids", "attention_mask"]
    )
    t.PreTrainedTokenizerFast(tokenizer_object=encode, model_input_names=inputs, **(named or NAMED)).save_pretrained(folder)
    return folder


def change(file: Path, **values: Any) -> None:
    """Set keys of a JSON file, or remove those that are ``...``."""
    content = json.loads(file.read_text()) if file.exists() else {}
    write(file, {key: value for key, value in {**content, **values}.items() if value is not ...})


def dense(label: str, *modules: torch.nn.Module, base: Path | None = None) -> Path:
    """An embedder: the tiny BERT (or ``base``) and modules."""
    torch.manual_seed(2)
    transformer = Transformer(str(base or saved(bert(e := cased_wordpiece(lower=True)), e)), max_seq_length=LIMIT)
    SentenceTransformer(modules=[transformer, *modules], device="cpu").save(str(ODD / label), create_model_card=False)
    return ODD / label


def by_hand(label: str, encode: Tokenizer, about: dict[str, Any], model: Any = None, pooling: str = "mean") -> Path:
    """A folder as on the hub: tokenizer.json as the tokenizers library writes it, tokenizer_config.json by hand."""
    folder = dense(label, Pooling(WIDTH, pooling_mode=pooling), base=saved(bert(encode) if model is None else model, encode))
    encode.save(str(folder / "tokenizer.json"))
    write(folder / "tokenizer_config.json", {"model_max_length": LIMIT, **about})
    return folder


def mean() -> Pooling:
    return Pooling(WIDTH, pooling_mode="mean")


# -- A. the module chain -------------------------------------------------------------------------------------------------


def normalize_then_dense() -> Path:
    return dense("normalize_then_dense", mean(), Normalize(), Dense(WIDTH, 8))


def dense_on_tokens() -> Path:
    module = Dense(WIDTH, 12, module_input_name="token_embeddings")
    return dense("dense_on_tokens", module, Pooling(12, pooling_mode="max"), Normalize())


def layer_norm() -> Path:
    module = Dense(WIDTH, 8, activation_function=torch.nn.GELU())
    return dense("layer_norm", Pooling(WIDTH, pooling_mode="cls"), module, stirred(LayerNorm(8)), Normalize())


def residual_and_dropout() -> Path:
    return dense("residual_and_dropout", mean(), Dropout(0.4), Dense(WIDTH, 8, use_residual=True), Dense(8, 8, use_residual=True))


def truncate_dim() -> Path:
    folder = dense("truncate_dim", mean())
    change(folder / "config_sentence_transformers.json", truncate_dim=6, similarity_fn_name="dot_score")
    return folder


def score_modules() -> Path:
    encode = cased_wordpiece(lower=True)
    transformer = Transformer(str(saved(bert(encode), encode)), max_seq_length=LIMIT)
    inner = Dense(WIDTH, WIDTH, activation_function=torch.nn.GELU())
    last = Dense(WIDTH, 1, activation_function=torch.nn.Identity(), module_output_name="scores")
    chain = [transformer, Pooling(WIDTH, pooling_mode="cls"), inner, stirred(LayerNorm(WIDTH)), last]
    CrossEncoder(modules=chain, device="cpu").save(str(ODD / "score_modules"), create_model_card=False)
    return ODD / "score_modules"


# -- B. who sees whom ----------------------------------------------------------------------------------------------------


def qwen(label: str, **more: Any) -> Path:
    encode = qwen_tokenizer()
    model = decoder(t.Qwen3Config, t.Qwen3Model, encode)
    folder = dense(label, mean(), Normalize(), base=saved(model, encode, pad_token="<|endoftext|>", eos_token="<|endoftext|>"))
    change(folder / "config.json", **more)
    return folder


def gemma(label: str, **more: Any) -> Path:
    encode = cased_wordpiece(lower=True)
    windows = {"sliding_window": 6, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}
    model = decoder(t.Gemma3TextConfig, t.Gemma3TextModel, encode, **windows)
    folder = dense(label, mean(), base=saved(model, encode))
    change(folder / "config.json", **more)
    return folder


def qwen_bidirectional() -> Path:
    return qwen("qwen_bidirectional", is_causal=False)


def gemma_not_causal() -> Path:
    return gemma("gemma_not_causal", is_causal=False)


def gemma_both_keys() -> Path:
    return gemma("gemma_both_keys", is_causal=False, use_bidirectional_attention=True)


def yarn() -> Path:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
    return qwen("yarn", rope_parameters=rope)


def llama3_rotation() -> Path:
    rope = {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
    return qwen("llama3_rotation", rope_parameters={**rope, "low_freq_factor": 1.0, "high_freq_factor": 4.0})


def projected_qwen() -> tuple[Path, Answers]:
    """Like voyage-4-nano: bidirectional, and token vectors projected by a tensor that only the model's own code reads."""
    folder = qwen("projected_qwen")
    torch.manual_seed(3)
    projection = torch.randn(12, WIDTH)
    save_file({**load_file(folder / "model.safetensors"), "linear.weight": projection}, folder / "model.safetensors")
    own = "modeling_qwen3_bidirectional.Qwen3BidirectionalModel"
    plain = t.AutoConfig.from_pretrained(folder)
    plain.is_causal = False
    model, encode = t.Qwen3Model.from_pretrained(folder, config=plain).eval(), t.AutoTokenizer.from_pretrained(folder)
    answers = []
    for text in TEXTS:
        given = encode([text], return_tensors="pt", truncation=True, max_length=LIMIT)
        hidden = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state @ projection.T
        answers.append(torch.nn.functional.normalize(hidden.mean(1), dim=-1)[0].numpy())
    about = {"use_bidirectional_attention": True, "num_labels": 12, "architectures": ["Qwen3BidirectionalModel"]}
    change(folder / "config.json", **about, auto_map={"AutoModel": own})
    change(folder / "1_Pooling/config.json", embedding_dimension=12)
    return folder, answers


# -- C. configuration that changes numbers -------------------------------------------------------------------------------


def passed_on() -> Path:
    folder = dense("passed_on", mean())
    given = {"tokenizer_args": {"model_max_length": 9}, "config_args": {"hidden_act": "relu"}, "max_seq_length": ...}
    change(folder / "sentence_bert_config.json", **given)
    return folder


def old_name() -> Path:
    folder = dense("old_name", mean())
    (folder / "sentence_bert_config.json").unlink()
    write(folder / "sentence_roberta_config.json", {"max_seq_length": 9, "do_lower_case": True})
    return folder


def quick_gelu() -> Path:
    encode = cased_wordpiece(lower=True)
    sizes = {"dim": WIDTH, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 32}
    config = t.DistilBertConfig(vocab_size=encode.get_vocab_size(), **sizes, activation="quick_gelu")
    return dense("quick_gelu", mean(), base=saved(stirred(t.DistilBertModel(config)), encode))


# -- D. the tokenizer ----------------------------------------------------------------------------------------------------


def lower_case_argument() -> Path:
    return by_hand("lower_case_argument", cased_wordpiece(), {"tokenizer_class": "BertTokenizer", "do_lower_case": True, **NAMED})


def no_tokenizer_config() -> Path:
    folder = by_hand("no_tokenizer_config", cased_wordpiece(), {})
    (folder / "tokenizer_config.json").unlink()
    return folder


def accents_and_chinese() -> Path:
    about = {"tokenizer_class": "BertTokenizerFast", "strip_accents": False, "tokenize_chinese_chars": False, **NAMED}
    return by_hand("accents_and_chinese", cased_wordpiece(), about)


def as_stored() -> Path:
    return by_hand("as_stored", cased_wordpiece(), {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": True, **NAMED})


def added_by_decoder() -> Path:
    encode = cased_wordpiece(lower=True)
    count = encode.get_vocab_size()
    flags = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    added = {str(encode.token_to_id(token)): {"content": token, **flags} for token in SPECIAL}
    about = {
        "tokenizer_class": "BertTokenizer",
        **NAMED,
        "added_tokens_decoder": {**added, str(count): {"content": "<ent>", **flags}},
    }
    return by_hand("added_by_decoder", encode, about, bert(encode, rows=count + 1))


def added_by_file() -> Path:
    encode = cased_wordpiece(lower=True)
    count = encode.get_vocab_size()
    about = {"tokenizer_class": "BertTokenizer", **NAMED, "additional_special_tokens": ["cat"]}
    folder = by_hand("added_by_file", encode, about, bert(encode, rows=count + 1))
    write(folder / "added_tokens.json", {"<ent>": count})
    return folder


def no_template() -> Path:
    return by_hand("no_template", cased_wordpiece(template=False), {"tokenizer_class": "BertTokenizer", **NAMED})


def prefix_space() -> Path:
    encode = roberta_tokenizer()
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = t.RobertaConfig(vocab_size=encode.get_vocab_size(), **sizes, max_position_embeddings=34, type_vocab_size=1)
    about = {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": True}
    return by_hand("prefix_space", encode, about, stirred(t.RobertaModel(config)))


def sentence_pieces() -> Path:
    encode = pieces()
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = t.XLMRobertaConfig(vocab_size=encode.get_vocab_size(), **sizes, max_position_embeddings=34, type_vocab_size=1)
    return by_hand("sentence_pieces", encode, {"tokenizer_class": "XLMRobertaTokenizer"}, stirred(t.XLMRobertaModel(config)))


def only_vocabulary() -> Path:
    encode = cased_wordpiece()
    folder = by_hand("only_vocabulary", encode, {"do_lower_case": False})
    ids = sorted(encode.get_vocab().items(), key=lambda item: item[1])
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in ids), encoding="utf-8")
    (folder / "tokenizer.json").unlink()
    return folder


def only_merges() -> Path:
    folder = prefix_space()
    folder = folder.rename(folder.with_name("only_merges"))
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    write(folder / "vocab.json", model["vocab"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{' '.join(pair)}\n" for pair in model["merges"]))
    (folder / "tokenizer.json").unlink()
    return folder


def cut_at_start() -> Path:
    return by_hand("cut_at_start", cased_wordpiece(), {"tokenizer_class": "BertTokenizer", "truncation_side": "left", **NAMED})


def lower_case_module() -> Path:
    folder = by_hand("lower_case_module", cased_wordpiece(), {"tokenizer_class": "BertTokenizer", "do_lower_case": False, **NAMED})
    change(folder / "sentence_bert_config.json", do_lower_case=True)
    return folder


def qwen_as_on_the_hub() -> Path:
    encode = qwen_tokenizer()
    flags = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    added = {
        str(encode.token_to_id(token)): {"content": token, **flags} for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    }
    about = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    model = decoder(t.Qwen3Config, t.Qwen3Model, encode)
    return by_hand("qwen_as_on_the_hub", encode, {**about, "unk_token": None, "added_tokens_decoder": added}, model, "lasttoken")


def mpnet_as_on_the_hub() -> Path:
    encode = cased_wordpiece(lower=True)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = t.MPNetConfig(vocab_size=encode.get_vocab_size(), **sizes, max_position_embeddings=34)
    mask = {"__type": "AddedToken", "content": "[MASK]", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    about = {"tokenizer_class": "MPNetTokenizer", **NAMED, "bos_token": "[CLS]", "eos_token": "[SEP]", "mask_token": mask}
    return by_hand("mpnet_as_on_the_hub", encode, about, stirred(t.MPNetModel(config)))


# -- E. heads ------------------------------------------------------------------------------------------------------------


def cross_encoder(label: str, **about: Any) -> Path:
    encode = cased_wordpiece(lower=True)
    base = saved(bert(encode, t.BertForSequenceClassification, num_labels=1), encode)
    CrossEncoder(str(base), device="cpu", max_length=LIMIT, activation_fn=torch.nn.Tanh()).save(
        str(ODD / label), create_model_card=False
    )
    change(ODD / label / "tokenizer_config.json", **about)
    return ODD / label


def tanh_scores() -> Path:
    return cross_encoder("tanh_scores")


def pairs_without_types() -> Path:
    return cross_encoder("pairs_without_types", tokenizer_class="BertTokenizer", model_input_names=["input_ids", "attention_mask"])


def pairs_without_template() -> Path:
    folder = cross_encoder("pairs_without_template", tokenizer_class="BertTokenizer", model_input_names=...)
    change(folder / "tokenizer.json", post_processor=None)
    return folder


def yes_or_no() -> Path:
    encode = qwen_tokenizer(ends=False)
    model = decoder(t.Qwen3Config, t.Qwen3ForCausalLM, encode, tie_word_embeddings=True)
    base = saved(model, encode, pad_token="<|endoftext|>", eos_token="<|endoftext|>")
    turns = "{% if m.role == 'system' %}<|im_start|>{{ m.content }}<|im_end|>\n{% elif m.role == 'query' %}query: {{ m.content }}\n"
    template = "{% for m in messages %}" + turns + "{% else %}text: {{ m.content }}<|im_end|>\nyes or no?{% endif %}{% endfor %}"
    (base / "chat_template.jinja").write_text(template)
    chain = [Transformer(str(base), transformer_task="text-generation", max_seq_length=40), LogitScore(5, 6)]
    prompts: dict[str, Any] = {"prompts": {"find": "find texts"}, "default_prompt_name": "find"}
    CrossEncoder(modules=chain, device="cpu", **prompts).save(str(ODD / "yes_or_no"), create_model_card=False)
    return ODD / "yes_or_no"


# -- F to I --------------------------------------------------------------------------------------------------------------


def unused_markers() -> Path:
    """Like colbertv2.0: the markers of queries and documents are in the vocabulary, but are no added tokens."""
    encode = cased_wordpiece(lower=True)
    stored = json.loads(encode.to_str())
    for word in ("[unused0]", "[unused1]", "unused", "##0", "##1"):
        stored["model"]["vocab"].setdefault(word, len(stored["model"]["vocab"]))
    encode = Tokenizer.from_str(json.dumps(stored))
    shutil.copytree(saved(bert(encode), encode), ODD / "unused_markers")
    weights = load_file(ODD / "unused_markers" / "model.safetensors")
    torch.manual_seed(4)
    renamed = {f"bert.{name}": tensor for name, tensor in weights.items()}
    save_file({**renamed, "linear.weight": torch.randn(8, WIDTH)}, ODD / "unused_markers" / "model.safetensors")
    change(ODD / "unused_markers" / "config.json", architectures=["HF_ColBERT"])
    for_training = {"bsize": 32, "lr": 1e-05, "nway": 64, "nbits": 1, "name": "x", "meta": {"hostname": "y"}, "query_token": "[Q]"}
    lengths = {"query_maxlen": 12, "doc_maxlen": 20, "mask_punctuation": True}
    write(ODD / "unused_markers" / "artifact.metadata", {**for_training, **lengths})
    return ODD / "unused_markers"


def pylate_before_model_types() -> Path:
    """As PyLate wrote folders at first: no `model_type`, no names of inputs, no modules for the mask and for normalizing."""
    encode = cased_wordpiece(lower=True)
    base = saved(bert(encode), encode)
    folder = dense("pylate_before_model_types", mean(), base=base)
    shutil.rmtree(folder / "1_Pooling")
    chain = [("", "sentence_transformers.models.Transformer"), ("1_Dense", "pylate.models.Dense.Dense")]
    write(folder / "modules.json", [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(chain)])
    (folder / "1_Dense").mkdir()
    torch.manual_seed(8)
    save_file({"linear.weight": torch.randn(8, WIDTH)}, folder / "1_Dense" / "model.safetensors")
    identity = "torch.nn.modules.linear.Identity"
    write(folder / "1_Dense/config.json", {"in_features": WIDTH, "out_features": 8, "bias": False, "activation_function": identity})
    about: dict[str, Any] = {"query_prefix": "[UNK] ", "document_prefix": "[PAD] ", "query_length": 12, "document_length": 20}
    about |= {"attend_to_expansion_tokens": False, "skiplist_words": ["?", ","], "similarity_fn_name": "MaxSim", "prompts": {}}
    write(folder / "config_sentence_transformers.json", {"__version__": {"sentence_transformers": "4.0.2"}, **about})
    return folder


def family(label: str, config: type, model: type, **more: Any) -> Path:
    """A family without another oddity, for texts with special tokens and around the limit."""
    encode = cased_wordpiece(lower=True)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"max_position_embeddings": 32, "pad_token_id": 0}
    made = stirred(model(config(vocab_size=encode.get_vocab_size(), **sizes, **more)))
    return dense(label, mean(), Normalize(), base=saved(made, encode))


def modernbert_texts() -> Path:
    special = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    layers = ["full_attention", "sliding_attention"]
    return family("modernbert_texts", t.ModernBertConfig, t.ModernBertModel, local_attention=6, layer_types=layers, **special)


def nomic_texts() -> Path:
    return family("nomic_texts", t.NomicBertConfig, t.NomicBertModel, head_dim=WIDTH // 2)


def gte_texts() -> Path:
    return family("gte_texts", t.GteConfig, t.GteModel)


def lora_adapter() -> tuple[Path, Answers]:
    folder = dense("lora_adapter", mean())
    base = t.AutoModel.from_pretrained(folder)
    how = peft.LoraConfig(r=4, lora_alpha=12, use_rslora=True, target_modules=["query", "value", "dense"], init_lora_weights=False)
    torch.manual_seed(10)
    peft.get_peft_model(base, how).save_pretrained(str(folder))
    change(folder / "adapter_config.json", base_model_name_or_path=str(folder))
    answers = answers_of(folder)
    change(folder / "adapter_config.json", base_model_name_or_path="org/base")
    return folder, answers


def deberta_pieces() -> Path:
    encode = pieces()
    stored = json.loads(encode.to_str())
    vocabulary = [
        [{"<s>": "[CLS]", "<pad>": "[PAD]", "</s>": "[SEP]", "<unk>": "[UNK]"}.get(p, p), v] for p, v in stored["model"]["vocab"]
    ]
    stored["model"]["vocab"] = [*vocabulary, ["[MASK]", 0.0]]
    encode = Tokenizer.from_str(json.dumps({**stored, "added_tokens": [], "post_processor": None}))
    encode.add_special_tokens(list(SPECIAL))
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    relative = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"}
    config = t.DebertaV2Config(
        vocab_size=encode.get_vocab_size(), **sizes, max_position_embeddings=32, share_att_key=True, **relative
    )
    about = {"tokenizer_class": "DebertaV2Tokenizer", "split_by_punct": True, **NAMED}
    return by_hand("deberta_pieces", encode, about, stirred(t.DebertaV2Model(config)))


def static_beside_tokenizer_config() -> Path:
    torch.manual_seed(9)
    table = StaticEmbedding(cased_wordpiece(template=False), embedding_dim=WIDTH)
    folder = ODD / "static_beside_tokenizer_config"
    SentenceTransformer(modules=[table], device="cpu").save(str(folder), create_model_card=False)
    write(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "brand_new": 1})
    return folder


def prompt_before_cls() -> Path:
    folder = dense("prompt_before_cls", Pooling(WIDTH, pooling_mode="cls", include_prompt=False))
    change(folder / "config_sentence_transformers.json", prompts={"query": "one two "}, default_prompt_name="query")
    return folder


def static_without_limit() -> Path:
    torch.manual_seed(5)
    modules = [StaticEmbedding(cased_wordpiece(template=False), embedding_dim=WIDTH), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(ODD / "static_without_limit"), create_model_card=False)
    return ODD / "static_without_limit"


def model2vec_int8() -> Path:
    encode, random = cased_wordpiece(lower=True, template=False), np.random.default_rng(6)
    count = encode.get_vocab_size()
    table, weights = (random.normal(size=(40, WIDTH)) * 30).astype(np.int8), np.abs(random.normal(size=count))
    model = StaticModel(table, encode, normalize=True, weights=weights, token_mapping=random.integers(0, 40, count))
    model.save_pretrained(ODD / "model2vec_int8")
    (ODD / "model2vec_int8" / "modules.json").unlink()
    write(ODD / "model2vec_int8" / "config.json", {"normalize": True, "embedding_dtype": "int8", "max_length": 12})
    return ODD / "model2vec_int8"


def splade(label: str, **more: Any) -> Path:
    encode = cased_wordpiece(lower=True)
    transformer = Transformer(
        str(saved(bert(encode, t.BertForMaskedLM), encode)), transformer_task="fill-mask", max_seq_length=LIMIT
    )
    SparseEncoder(modules=[transformer, SpladePooling(**more)], device="cpu").save(str(ODD / label), create_model_card=False)
    return ODD / label


def splade_sum() -> Path:
    return splade("splade_sum", pooling_strategy="sum")


def splade_two_logarithms() -> Path:
    return splade("splade_two_logarithms", activation_function="log1p_relu")


def queries_by_table() -> Path:
    """Like OpenSearch's sparse models of documents: queries have the weights of a table."""
    encode = cased_wordpiece(lower=True)
    transformer = Transformer(
        str(saved(bert(encode, t.BertForMaskedLM), encode)), transformer_task="fill-mask", max_seq_length=LIMIT
    )
    torch.manual_seed(7)
    weight = torch.rand(encode.get_vocab_size()) * (torch.rand(encode.get_vocab_size()) > 0.1)
    table = SparseStaticEmbedding(tokenizer=transformer.tokenizer, weight=weight, frozen=True)
    routes = Router.for_query_document(query_modules=[table], document_modules=[transformer, SpladePooling()])
    SparseEncoder(modules=[routes], device="cpu").save(str(ODD / "queries_by_table"), create_model_card=False)
    return ODD / "queries_by_table"


CASES: Sequence[Callable[[], Path | tuple[Path, Answers]]] = (
    normalize_then_dense,
    dense_on_tokens,
    layer_norm,
    residual_and_dropout,
    truncate_dim,
    score_modules,
    qwen_bidirectional,
    gemma_not_causal,
    gemma_both_keys,
    yarn,
    llama3_rotation,
    projected_qwen,
    passed_on,
    old_name,
    quick_gelu,
    lower_case_argument,
    no_tokenizer_config,
    accents_and_chinese,
    as_stored,
    added_by_decoder,
    added_by_file,
    no_template,
    only_merges,
    prefix_space,
    sentence_pieces,
    only_vocabulary,
    cut_at_start,
    lower_case_module,
    qwen_as_on_the_hub,
    mpnet_as_on_the_hub,
    tanh_scores,
    pairs_without_types,
    pairs_without_template,
    yes_or_no,
    unused_markers,
    prompt_before_cls,
    static_without_limit,
    model2vec_int8,
    splade_sum,
    splade_two_logarithms,
    queries_by_table,
    pylate_before_model_types,
    deberta_pieces,
    modernbert_texts,
    nomic_texts,
    gte_texts,
    lora_adapter,
    static_beside_tokenizer_config,
)
SCORES = ("score_modules", "tanh_scores", "pairs_without_types", "pairs_without_template", "yes_or_no")


SIDED = ("unused_markers", "queries_by_table", "pylate_before_model_types")


def answers_of(folder: Path, side: str = "document") -> Answers:
    """What the folder's own library computes, one text at a time. side: query or document, if it matters."""
    name = folder.name
    if name in SCORES:
        scorer, raw = CrossEncoder(str(folder), device="cpu"), torch.nn.Identity()
        return [np.atleast_1d(scorer.predict([("the cat", text)], activation_fn=raw)[0]) for text in TEXTS]
    if name == "model2vec_int8":
        static = StaticModel.from_pretrained(folder)
        return [static.encode([text])[0] for text in TEXTS]
    if name.startswith("splade") or name == "queries_by_table":
        sparse = getattr(SparseEncoder(str(folder), device="cpu"), f"encode_{side}")
        return [sparse([text], convert_to_sparse_tensor=False)[0].numpy() for text in TEXTS]
    if name in ("unused_markers", "pylate_before_model_types"):
        late = getattr(MultiVectorEncoder(str(folder), device="cpu"), f"encode_{side}")
        return [np.asarray(late([text])[0]) for text in TEXTS]
    model = SentenceTransformer(str(folder), device="cpu")
    return [model.encode([text], batch_size=1)[0] for text in TEXTS]


def main() -> None:
    torch.set_grad_enabled(False)
    for case in CASES:
        if len(sys.argv) > 1 and case.__name__ not in sys.argv[1:]:
            continue
        shutil.rmtree(ODD / case.__name__, ignore_errors=True)
        made = case()
        folder, answers = made if isinstance(made, tuple) else (made, answers_of(made))
        arrays = {str(index): np.asarray(answer, np.float32) for index, answer in enumerate(answers)}
        if folder.name in SIDED:
            queries = answers_of(folder, "query")
            arrays |= {f"query{index}": np.asarray(answer, np.float32) for index, answer in enumerate(queries)}
        np.savez(folder / "answers.npz", **arrays)
        for extra in ("README.md", "training_args.bin"):
            (folder / extra).unlink(missing_ok=True)
        print(folder.name, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) // 1000, "KB")
    write(ODD / "texts.json", TEXTS)


if __name__ == "__main__":
    main()
