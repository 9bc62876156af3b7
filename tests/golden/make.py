"""Makes the golden models: tiny random BERTs in the sentence-transformers layout, and what transformers computes with them.

Run it by ``make golden``. Each folder holds a model, ``texts.json`` and ``vectors.npy`` [n, width] float32, not
normalized, computed a text at a time by transformers in float32 with pooling written out here, from its definition.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel

HERE = Path(__file__).parent
WIDTH, DENSE_WIDTH, LIMIT = 32, 16, 48
WORDS = (
    "the a of and to in is it that for on with as was cat dog house red green blue runs sleeps eats fast slow big small "
    "bank card payment river tree sun moon star sea ship day night one two three four five"
).split()
TEXTS = [
    "the cat sleeps",
    "A big RED house, and a small one!",
    "payment with the card at the bank",
    "sea " * 60,
    "x",
    "one two three four five " * 3,
    "naïve café — 日本",
    "?",
    "the river runs fast and the moon is slow",
]
POOLINGS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


def tokenizer() -> Tokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?-"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ids = [(token, made.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    made.decoder = decoders.WordPiece()
    made.enable_truncation(8)  # the trap of real files: a limit baked in that is not the model's
    made.enable_padding(length=8)
    return made


def pool(hidden: torch.Tensor, pooling: str) -> torch.Tensor:
    """Hidden [tokens, width] of one text."""
    count = len(hidden)
    weights = torch.arange(1, count + 1, dtype=hidden.dtype)[:, None]
    return {
        "cls": lambda: hidden[0],
        "lasttoken": lambda: hidden[-1],
        "mean": lambda: hidden.mean(0),
        "mean_sqrt_len_tokens": lambda: hidden.sum(0) / count**0.5,
        "max": lambda: hidden.max(0).values,
        "weightedmean": lambda: (hidden * weights).sum(0) / weights.sum(),
    }[pooling]()


def make(
    name: str, pooling: str, seed: int, *, dense: bool = False, legacy: bool = False, layers: int = 2, onnx: bool = False
) -> None:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "1_Pooling").mkdir(parents=True)
    torch.manual_seed(seed)
    encode = tokenizer()
    encode.save(str(folder / "tokenizer.json"))
    config = BertConfig(
        vocab_size=encode.get_vocab_size(),
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.4,
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():  # biases and norms that are not 0 and 1, so that leaving one out shows
        for key, tensor in model.named_parameters():
            if key.endswith("bias"):
                tensor.normal_(0, 0.2)
            elif "LayerNorm.weight" in key:
                tensor.normal_(1, 0.2)
    state = {key: value.contiguous() for key, value in model.state_dict().items() if "position_ids" not in key}
    if legacy:
        renames = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
        for old, new in renames:
            state = {f"{key.replace(old, new)}": value for key, value in state.items()}
        state = {f"bert.{key}": value for key, value in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    write(
        folder / "1_Pooling/config.json",
        {"word_embedding_dimension": WIDTH, **{flag: mode == pooling for mode, flag in POOLINGS.items()}},
    )
    modules = ["models.Transformer", "models.Pooling", *(["models.Dense"] if dense else []), "models.Normalize"]
    paths = ["", "1_Pooling", *(["2_Dense"] if dense else []), f"{3 if dense else 2}_Normalize"]
    entries = zip(modules, paths, strict=True)
    write(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{kind}"}
            for i, (kind, path) in enumerate(entries)
        ],
    )
    write(folder / "sentence_bert_config.json", {"max_seq_length": LIMIT, "do_lower_case": False})
    prompts = {"query": "one two ", "document": ""}
    write(folder / "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": None})
    if dense:
        (folder / "2_Dense").mkdir()
        layer = torch.nn.Linear(WIDTH, DENSE_WIDTH)
        tensors = {"linear.weight": layer.weight.detach().contiguous(), "linear.bias": layer.bias.detach().contiguous()}
        save_file(tensors, folder / "2_Dense/model.safetensors")
        about = {"in_features": WIDTH, "out_features": DENSE_WIDTH, "bias": True}
        write(folder / "2_Dense/config.json", {**about, "activation_function": "torch.nn.modules.activation.Tanh"})
    if onnx:
        export(model, folder / "onnx" / "model.onnx")
    encode.no_padding()
    encode.enable_truncation(LIMIT)
    vectors = []
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([encode.encode(text).ids])
            vector = pool(model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0], pooling)
            vectors.append(torch.tanh(layer(vector)) if dense else vector)
    np.save(folder / "vectors.npy", torch.stack(vectors).numpy())
    write(folder / "texts.json", TEXTS)
    print(name, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) // 1000, "KB")


def export(model: torch.nn.Module, file: Path, output: str = "last_hidden_state") -> None:
    """The model as repositories carry it: three integer inputs, token vectors or logits out, free batch and length."""

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)[output]

    file.parent.mkdir()
    names = ["input_ids", "attention_mask", "token_type_ids"]
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    ids, mask, types = (torch.ones([2, 7], dtype=torch.long) for _ in names)  # three: one tensor would become one input
    program = torch.onnx.export(
        Encoder().eval(),
        (ids, mask, types),
        input_names=names,
        output_names=[output],
        dynamic_shapes=(free, free, free),
        dynamo=True,
    )
    made = program.model_proto
    for part in (*made.graph.node, *made.graph.value_info, *made.graph.input, *made.graph.output, made.graph, made):
        del part.metadata_props[:]  # stack traces of the exporter, twice the size of the weights
    file.write_bytes(made.SerializeToString())


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for number, mode in enumerate(POOLINGS):
        make(mode, mode, number, onnx=mode in ("mean", "cls"))
    make("dense", "mean", 10, dense=True)
    make("legacy", "mean", 11, legacy=True)
    make("one_layer_cls", "cls", 12, layers=1)
