"""Where both example models start, and how they are written: SPLADE-tiny with a smaller vocabulary, stored in half precision.

SPLADE-tiny is a BERT of two layers of width 128 (Apache-2.0). Nine tenths of it are the table of tokens; those that hardly
occur in the texts here are left out, and their words fall into shorter pieces that stay. Every single character stays.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import BertConfig, BertForSequenceClassification, BertModel

from peers import splade_folder

SEEN = 3
"""Occurrences of a token that stays."""
LEFT_OUT = re.compile(r"\[unused\d+\]")


def texts_of(data: Path) -> list[dict[str, str]]:
    """The entries of corpus.jsonl."""
    return [json.loads(line) for line in (data / "corpus.jsonl").read_text(encoding="utf-8").split("\n") if line]


def start(texts: Sequence[str], labels: Sequence[str]) -> tuple[BertForSequenceClassification, Tokenizer, dict[str, object]]:
    """The model with a new head, its tokenizer, and that as JSON. texts: what decides which tokens stay."""
    folder = splade_folder()
    written = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    written["truncation"] = written["padding"] = None
    kept = _shrink(written, _counted(written, texts))
    config = BertConfig.from_pretrained(folder, vocab_size=len(kept), num_labels=len(labels), hidden_dropout_prob=0.05)
    config.id2label, config.label2id = dict(enumerate(labels)), {name: number for number, name in enumerate(labels)}
    config.attention_probs_dropout_prob = 0.0
    model = BertForSequenceClassification(config)
    whole = BertModel.from_pretrained(folder, add_pooling_layer=False)
    state = whole.state_dict()
    name = "embeddings.word_embeddings.weight"
    state[name] = state[name][torch.tensor(kept)]
    missing, unexpected = model.bert.load_state_dict(state, strict=False)
    if unexpected or any(not name.startswith("pooler.") for name in missing):
        raise SystemExit(f"the start does not fit: missing {missing}, unexpected {unexpected}")
    return model, Tokenizer.from_str(json.dumps(written)), written


def _counted(written: dict[str, object], texts: Sequence[str]) -> Counter[int]:
    tokenizer = Tokenizer.from_str(json.dumps(written))
    counts: Counter[int] = Counter()
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        counts.update(encoding.ids)
    return counts


def _shrink(written: dict, counts: Counter[int]) -> list[int]:
    """Make the tokenizer's JSON that of the tokens which stay; their old ids in the order of the new ones."""
    special = {token["content"] for token in written["added_tokens"]}
    vocabulary = sorted(written["model"]["vocab"].items(), key=lambda entry: entry[1])
    kept = [
        (token, number)
        for token, number in vocabulary
        if token in special or (not LEFT_OUT.fullmatch(token) and (counts[number] >= SEEN or len(token.removeprefix("##")) == 1))
    ]
    new = {token: number for number, (token, _) in enumerate(kept)}
    written["model"]["vocab"] = new
    for token in written["added_tokens"]:
        token["id"] = new[token["content"]]
    for name, token in written["post_processor"]["special_tokens"].items():
        token["ids"] = [new[name]]
    return [number for _, number in kept]


def padded(lines: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None) -> dict[str, torch.Tensor]:
    """Token ids as a batch, padding masked."""
    shape = (len(lines), max(map(len, lines)))
    ids, mask, kinds = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    for number, line in enumerate(lines):
        ids[number, : len(line)] = torch.tensor(line)
        mask[number, : len(line)] = 1
        if types is not None:
            kinds[number, : len(line)] = torch.tensor(types[number])
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}


def seed() -> None:
    """The same numbers each time, as far as torch's threads allow."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries draw from it
    torch.manual_seed(0)


def write(model: BertForSequenceClassification, tokenizer: dict[str, object], folder: Path, **extra: object) -> None:
    """A folder as transformers and npu-proxy read it. extra: keys of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items() if "position_ids" not in name}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = {**model.config.to_dict(), "dtype": "float16", "architectures": ["BertForSequenceClassification"], **extra}
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False) + "\n", encoding="utf-8")
    about = {"model_max_length": 512, "tokenizer_class": "BertTokenizer", "do_lower_case": True}
    names = {name: f"[{name.split('_')[0].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps({**about, **names}, indent=2) + "\n")
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB")
