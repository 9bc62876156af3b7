"""Makes the golden models of every family and kind: tiny random ones, written and computed by the reference libraries.

Run it by ``make golden``. Each folder holds a model, ``texts.json`` and ``answers.npz``: one array a text, computed a text at
a time in float32. What sentence-transformers has no class for (bge-m3's three answers) is written out here, from its definition.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make import TEXTS, export, tokenizer, write
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from sentence_transformers.sparse_encoder.modules import SpladePooling
from tokenizers import Tokenizer, processors
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    Gemma3TextConfig,
    GteConfig,
    ModernBertConfig,
    MPNetConfig,
    NomicBertConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    RobertaConfig,
    T5Config,
    XLMRobertaConfig,
)

HERE = Path(__file__).parent
WIDTH, LAYERS, HEADS, INNER, LIMIT = 32, 3, 4, 64, 48
PAIRS = [
    ("the cat", "the cat sleeps on the red house"),
    ("bank card", "payment with the card at the bank"),
    ("one two", "sea " * 60),
    ("moon " * 60, "star " * 60),
    ("?", "x"),
]


def spell(name: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with the special tokens, and their places, that the family has."""
    encode = tokenizer()
    encode.no_truncation()
    encode.no_padding()
    if name in ("qwen3", "gemma3", "t5"):
        after = [("[SEP]", encode.token_to_id("[SEP]"))]
        before = [("[CLS]", encode.token_to_id("[CLS]"))] if name == "gemma3" else []
        frame = ("[CLS] $A [SEP]", "[CLS] $A $B [SEP]") if before else ("$A [SEP]", "$A $B [SEP]")
        encode.post_processor = processors.TemplateProcessing(single=frame[0], pair=frame[1], special_tokens=[*before, *after])
    elif name in ("roberta", "xlm-roberta", "mpnet"):
        stored = json.loads(encode.to_str())
        stored["model"]["vocab"] |= {"[UNK]": 0, "[PAD]": 1}  # these models take a token of id 1 for padding, wherever it is
        encode = Tokenizer.from_str(json.dumps(stored))
        ids = [(token, encode.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
        encode.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] [SEP] $B [SEP]", special_tokens=ids
        )
    else:
        ids = [(token, encode.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
        encode.post_processor = processors.TemplateProcessing(
            single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=ids
        )
    typed = ["token_type_ids"] if name in ("bert", "nomic", "gte", "electra") else []
    return PreTrainedTokenizerFast(
        tokenizer_object=encode,
        model_max_length=LIMIT,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", *typed, "attention_mask"],
    )


def config(name: str, **more: Any) -> PreTrainedConfig:
    """A small config of the family; what is peculiar to it (windows, buckets, shared heads) matters within 48 tokens."""
    size = len(spell(name))
    common = {"vocab_size": size, "initializer_range": 0.4, "pad_token_id": 0}
    layers = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": INNER}
    made: dict[str, Callable[[], PreTrainedConfig]] = {
        "bert": lambda: BertConfig(**common, **layers, max_position_embeddings=64, **more),
        "roberta": lambda: RobertaConfig(**{**common, "pad_token_id": 1}, **layers, max_position_embeddings=66, **more),
        "xlm-roberta": lambda: XLMRobertaConfig(
            **{**common, "pad_token_id": 1}, **layers, max_position_embeddings=66, type_vocab_size=1, **more
        ),
        "mpnet": lambda: MPNetConfig(**{**common, "pad_token_id": 1}, **layers, max_position_embeddings=66, **more),
        "distilbert": lambda: DistilBertConfig(
            **common, dim=WIDTH, n_layers=LAYERS, n_heads=HEADS, hidden_dim=INNER, max_position_embeddings=64, **more
        ),
        "modernbert": lambda: ModernBertConfig(
            **common, **layers, max_position_embeddings=64, local_attention=8, initializer_cutoff_factor=3.0, **more
        ),
        "nomic": lambda: NomicBertConfig(**common, **layers, max_position_embeddings=64, **more),
        "gte": lambda: GteConfig(**common, **layers, max_position_embeddings=64, type_vocab_size=2, **more),
        "deberta": lambda: DebertaV2Config(
            **common,
            **layers,
            max_position_embeddings=64,
            relative_attention=True,
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            pos_att_type=["p2c", "c2p"],
            pooler_hidden_size=WIDTH,
            **{"share_att_key": True, "position_biased_input": False, **more},
        ),
        "electra": lambda: ElectraConfig(**common, **layers, embedding_size=16, max_position_embeddings=64, **more),
        "t5": lambda: T5Config(
            vocab_size=size, d_model=WIDTH, d_kv=8, d_ff=INNER, num_layers=LAYERS, num_heads=HEADS, n_positions=48, **more
        ),
        "qwen3": lambda: Qwen3Config(**common, **layers, head_dim=16, num_key_value_heads=2, max_position_embeddings=64, **more),
        "gemma3": lambda: Gemma3TextConfig(
            **common,
            **{**layers, "num_hidden_layers": 4},
            head_dim=16,
            num_key_value_heads=1,
            max_position_embeddings=64,
            query_pre_attn_scalar=24,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"] * 2,
            **{"use_bidirectional_attention": True, **more},
        ),
    }
    return made[name]()


def stir(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Biases and norms that are not 0 and 1, so that leaving one out shows."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if key.endswith("bias"):
                tensor.normal_(0, 0.2)
            elif "norm" in key.lower() and tensor.ndim == 1:
                tensor.normal_(0 if "gemma" in type(model).__name__.lower() else 1, 0.2)
            elif tensor.ndim > 1:
                tensor.normal_(0, 0.3)
    return model.eval()


def backbone(name: str, how: type, seed: int, **more: Any) -> str:
    """A folder with a model of the family and its tokenizer."""
    torch.manual_seed(seed)
    model = stir(how.from_config(config(name, **more)), seed)
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    spell(name).save_pretrained(folder)
    return folder


def start(name: str) -> Path:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def keep(folder: Path, inputs: object, answers: list[np.ndarray], **more: list[np.ndarray]) -> None:
    write(folder / "texts.json", inputs)
    arrays = {f"{index}": answer for index, answer in enumerate(answers)}
    for key, values in more.items():
        arrays |= {f"{key}{index}": answer for index, answer in enumerate(values)}
    np.savez(folder / "answers.npz", **arrays)
    for extra in ("README.md", "training_args.bin"):
        (folder / extra).unlink(missing_ok=True)
    print(folder.name, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) // 1000, "KB")


def dense(
    label: str, name: str, pooling: str, seed: int, *, outputs: tuple[int, ...] = (), plain: bool = True, **more: Any
) -> Path:
    """An embedder. outputs: widths of Dense modules behind it. plain: whether prompts are pooled."""
    folder = start(label)
    transformer = Transformer(backbone(name, AutoModel, seed, **more))
    modules = [transformer, Pooling(WIDTH, pooling_mode=pooling, include_prompt=plain)]
    width = WIDTH
    for out in outputs:
        modules.append(Dense(width, out, bias=False, activation_function=torch.nn.Identity()))
        width = out
    if outputs:
        modules.append(Normalize())
    model = SentenceTransformer(modules=modules, prompts={"query": "one two ", "document": ""}, device="cpu")
    model.save(str(folder), create_model_card=False)
    if outputs:
        modules.pop()
        model = SentenceTransformer(modules=modules, prompts=model.prompts, device="cpu")
    plain_texts = [model.encode([text])[0] for text in TEXTS]
    queries = [model.encode([text], prompt_name="query")[0] for text in TEXTS]
    keep(folder, TEXTS, plain_texts, query=queries)
    return folder


def scores(label: str, name: str, count: int, seed: int, **more: Any) -> None:
    """A cross-encoder (one label) or classifier: logits of pairs, then of single texts."""
    folder = start(label)
    source = backbone(name, AutoModelForSequenceClassification, seed, num_labels=count, **more)
    model = CrossEncoder(source, device="cpu")
    model.save(str(folder), create_model_card=False)
    raw = torch.nn.Identity()
    logits = [np.atleast_1d(model.predict([pair], activation_fn=raw)[0]) for pair in PAIRS]
    classifier = AutoModelForSequenceClassification.from_pretrained(source).eval()
    if label == "bert_rerank":
        export(classifier, folder / "onnx" / "model.onnx", "logits")
    encode = spell(name)
    singles = []
    with torch.no_grad():
        for text in TEXTS:
            given = encode([text], truncation=True, max_length=LIMIT, return_tensors="pt")
            singles.append(classifier(**given).logits[0].numpy())
    keep(folder, {"pairs": PAIRS, "texts": TEXTS}, logits, single=singles)


def sparse(label: str, name: str, seed: int) -> None:
    folder = start(label)
    transformer = Transformer(backbone(name, AutoModelForMaskedLM, seed), transformer_task="fill-mask")
    model = SparseEncoder(modules=[transformer, SpladePooling(pooling_strategy="max")], device="cpu")
    model.save(str(folder), create_model_card=False)
    keep(folder, TEXTS, [model.encode([text], convert_to_sparse_tensor=False)[0].numpy() for text in TEXTS])


def late(label: str, seed: int, *, attend: bool = False) -> Path:
    folder = start(label)
    length = 12
    transformer = Transformer(
        backbone("bert", AutoModel, seed),
        document_length=40,
        query_expansion={"strategy": "fixed", "attend": attend, "length": length},
    )
    modules = [
        transformer,
        Dense(WIDTH, 16, bias=False, activation_function=torch.nn.Identity(), module_input_name="token_embeddings"),
        MultiVectorMask(skiplist_words=["?", "!", ",", "."]),
        Normalize(module_input_name="token_embeddings"),
    ]
    model = MultiVectorEncoder(modules=modules, prompts={"query": "[UNK] ", "document": "[PAD] "}, device="cpu")
    model.save(str(folder), create_model_card=False)
    queries = [np.asarray(model.encode_query([text])[0]) for text in TEXTS]
    documents = [np.asarray(model.encode_document([text])[0]) for text in TEXTS]
    keep(folder, TEXTS, documents, query=queries)
    return folder


def stanford(like: Path) -> None:
    """The same numbers in the layout of Stanford's code."""
    folder = start("colbert_stanford")
    folder.mkdir()
    weights = {f"bert.{key}": tensor for key, tensor in load_file(like / "model.safetensors").items()}
    weights["linear.weight"] = load_file(like / "1_Dense/model.safetensors")["linear.weight"]
    save_file(weights, folder / "model.safetensors")
    for file in ("tokenizer.json", "tokenizer_config.json", "texts.json", "answers.npz"):
        shutil.copy(like / file, folder / file)
    about = json.loads((like / "config.json").read_text())
    write(folder / "config.json", {**about, "architectures": ["HF_ColBERT"]})
    metadata = {"query_maxlen": 12, "doc_maxlen": 40, "mask_punctuation": True, "attend_to_mask_tokens": False}
    write(folder / "artifact.metadata", {**metadata, "query_token_id": "[UNK]", "doc_token_id": "[PAD]"})


def bge_m3(seed: int) -> None:
    """Dense, lexical and token answers of one pass, as FlagEmbedding defines them."""
    folder = dense("bge_m3", "xlm-roberta", "cls", seed)
    torch.manual_seed(seed)
    lexical, projection = torch.nn.Linear(WIDTH, 1), torch.nn.Linear(WIDTH, WIDTH)
    torch.save(lexical.state_dict(), folder / "sparse_linear.pt")
    torch.save(projection.state_dict(), folder / "colbert_linear.pt")
    model, encode = AutoModel.from_pretrained(folder).eval(), spell("xlm-roberta")
    firsts, weights, tokens = [], [], []
    with torch.no_grad():
        for text in TEXTS:
            given = encode([text], truncation=True, max_length=LIMIT, return_tensors="pt")
            hidden = model(given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state[0]
            firsts.append(hidden[0].numpy())
            tokens.append(projection(hidden[1:]).numpy())
            found: dict[int, float] = {}
            unused = {encode.cls_token_id, encode.sep_token_id, encode.pad_token_id, encode.unk_token_id}
            for number, weight in zip(given["input_ids"][0].tolist(), torch.relu(lexical(hidden))[:, 0].tolist(), strict=True):
                if number not in unused and weight > 0:
                    found[number] = max(found.get(number, 0.0), weight)
            weights.append(np.array(sorted(found.items()), np.float32).reshape(-1, 2))
    keep(folder, TEXTS, firsts, sparse=weights, tokens=tokens)


def static(seed: int) -> None:
    folder = start("static")
    torch.manual_seed(seed)
    encode = tokenizer()
    encode.no_truncation()
    table = torch.randn(encode.get_vocab_size(), WIDTH)
    model = SentenceTransformer(modules=[StaticEmbedding(encode, embedding_weights=table.numpy()), Normalize()], device="cpu")
    model.save(str(folder), create_model_card=False)
    bare = SentenceTransformer(modules=[model[0]], device="cpu")
    keep(folder, TEXTS, [bare.encode([text])[0] for text in TEXTS])


def original(like: Path, label: str, about: dict[str, object]) -> None:
    """The same tensors, which transformers writes under their original names, with a config as the original checkpoints have it."""
    folder = start(label)
    shutil.copytree(like, folder)
    stored = json.loads((like / "config.json").read_text())
    kept = {key: stored[key] for key in ("vocab_size", "layer_norm_eps", "type_vocab_size") if key in stored}
    write(folder / "config.json", {**kept, **about})


def small() -> None:
    """Vectors, and what sentence-transformers makes of them as int8 and as bits."""
    from sentence_transformers.util import quantize_embeddings

    rng = np.random.default_rng(7)
    many, few = rng.normal(size=(300, 24)).astype(np.float32), rng.normal(size=(9, 24)).astype(np.float32)
    many[:, 3] = few[:, 3] = 0
    made = {
        name: quantize_embeddings(few, precision=name, **({"calibration_embeddings": many} if "int8" in name else {}))
        for name in ("int8", "uint8", "binary", "ubinary")
    }
    np.savez(HERE.parent / "engine" / "quantized.npz", calibration=many, vectors=few, **made)


if __name__ == "__main__":
    small()
    dense("roberta_mean", "roberta", "mean", 20)
    dense("xlm_roberta_cls", "xlm-roberta", "cls", 21)
    dense("mpnet_mean", "mpnet", "mean", 22)
    dense("distilbert_mean", "distilbert", "mean", 23)
    dense("modernbert_cls", "modernbert", "cls", 24)
    dense("modernbert_mean", "modernbert", "mean", 25, plain=False)
    nomic = dense("nomic_mean", "nomic", "mean", 26)
    gte = dense("gte_cls", "gte", "cls", 27)
    dense("deberta_cls", "deberta", "cls", 28)
    dense("deberta_mean", "deberta", "mean", 29, share_att_key=False, position_biased_input=True)
    dense("qwen3_last", "qwen3", "lasttoken", 30)
    dense("gemma3_mean", "gemma3", "mean", 31, outputs=(48, 32), plain=False)
    dense("gemma3_causal", "gemma3", "lasttoken", 32, use_bidirectional_attention=False)
    theta = {"rotary_emb_base": 1000, "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False}
    shape = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_inner": INNER, "n_positions": 64, "layer_norm_epsilon": 1e-12}
    flags = {
        "activation_function": "swiglu",
        "qkv_proj_bias": False,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
        "prenorm": False,
    }
    original(nomic, "nomic_original", {"model_type": "nomic_bert", **shape, **theta, **flags})
    standard = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": INNER}
    rope = {"rope_theta": 160000.0, "position_embedding_type": "rope", "max_position_embeddings": 64, "hidden_act": "gelu"}
    original(gte, "gte_original", {"model_type": "new", **standard, **rope, "layer_norm_type": "layer_norm", "pack_qkv": True})
    scores("bert_rerank", "bert", 1, 40)
    scores("roberta_labels", "roberta", 3, 41)
    scores("distilbert_labels", "distilbert", 4, 42, problem_type="multi_label_classification")
    scores("mpnet_rerank", "mpnet", 1, 43)
    scores("modernbert_rerank", "modernbert", 1, 44, classifier_pooling="mean")
    scores("deberta_nli", "deberta", 3, 45)
    scores("gte_rerank", "gte", 1, 46)
    scores("nomic_labels", "nomic", 2, 47)
    scores("qwen3_rerank", "qwen3", 1, 48)
    sparse("bert_splade", "bert", 50)
    sparse("distilbert_splade", "distilbert", 51)
    sparse("roberta_splade", "roberta", 52)
    sparse("modernbert_splade", "modernbert", 53)
    stanford(late("colbert", 60))
    late("colbert_attended", 61, attend=True)
    bge_m3(70)
    static(80)
