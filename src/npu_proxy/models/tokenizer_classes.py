"""What transformers' tokenizer classes make of a vocabulary, as parts of tokenizer.json.

**A class is one row of ``CLASSES``.** A class with a pipeline of its own takes only the vocabulary from tokenizer.json, and
rebuilds the rest from the arguments in tokenizer_config.json. This is what transformers 5 does; version 4 changed single settings
of the stored parts. npu-proxy follows version 5, because it is what sentence-transformers 6 runs on, and both agree on folders
whose files agree. Source: transformers 5.24, ``models/*/tokenization_*.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from npu_proxy.errors import ModelError
from npu_proxy.models.tokenizer_templates import Template

Part = Mapping[str, Any]
"""A part of tokenizer.json: a normalizer, pre-tokenizer or post-processor."""
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that tokenizers name, in the order in which they are added."""
QWEN2_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, kw_only=True)
class ClassInputs:
    """What a class builds from. flag: an argument that is true or false, by name and default. tokens: the named special tokens.

    ids: token to id. scores: of pieces, for a unigram model. precompiled: sentencepiece's normalizer in tokenizer.json, if any.
    """

    flag: Callable[[str, bool | None], bool | None]
    tokens: Mapping[str, str]
    ids: Callable[[str], int | None]
    scores: Mapping[str, float]
    precompiled: Part | None

    def id_of(self, name: str) -> int:
        """The id of a named special token. Raises ModelError."""
        token = self.tokens.get(name)
        found = None if token is None else self.ids(token)
        if found is None:
            raise ModelError(f"tokenizer_config.json: `{name}` is `{token}`, which is not in the vocabulary")
        return found


@dataclass(frozen=True, kw_only=True)
class TokenizerClass:
    """A tokenizer class of transformers.

    model: the type of its model in tokenizer.json. tokens: named special tokens by default. types: whether tokens have types
    unless `model_input_names` says otherwise. template: None keeps the stored one. unknown: what the model must have for unknown
    words.
    """

    model: str
    tokens: Mapping[str, str | None]
    types: bool
    normalizer: Callable[[ClassInputs], Part | None]
    pre_tokenizer: Callable[[ClassInputs], Part]
    template: Callable[[ClassInputs], Template] | None
    unknown: Callable[[ClassInputs], Mapping[str, Any]]
    splits_left: bool = False
    """Whether the mask token takes the space before it, unless its own entry says otherwise."""
    plain_flags: bool = False
    """Whether named tokens lose the flags that their entries have."""


def _bert_normalizer(stored: ClassInputs) -> Part:
    return {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": stored.flag("tokenize_chinese_chars", True),
        "strip_accents": stored.flag("strip_accents", None),
        "lowercase": stored.flag("do_lower_case", True),
    }


def _sequence(kind: str, *parts: Part | None) -> Part | None:
    present = [part for part in parts if part is not None]
    return {"type": "Sequence", kind: present} if present else None


def _metaspace(stored: ClassInputs, *, scheme: str, split: bool = True) -> Part:
    used = scheme if stored.flag("add_prefix_space", True) else "never"
    return {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": used, "split": split}


def _byte_level(stored: ClassInputs) -> Part:
    return {
        "type": "ByteLevel",
        "add_prefix_space": bool(stored.flag("add_prefix_space", False)),
        "trim_offsets": True,
        "use_regex": True,
    }


def _words_then_metaspace(stored: ClassInputs) -> Part:
    parts = [{"type": "WhitespaceSplit"}, _metaspace(stored, scheme="always")]
    return {"type": "Sequence", "pretokenizers": parts}


def _qwen2_words(stored: ClassInputs) -> Part:
    split = {"type": "Split", "pattern": {"Regex": QWEN2_WORDS}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**_byte_level(stored), "use_regex": False}]}


def _deberta_v2_normalizer(stored: ClassInputs) -> Part | None:
    lower = {"type": "Lowercase"} if stored.flag("do_lower_case", False) else None
    spaces = {"type": "Replace", "pattern": {"Regex": r"\s{2,}|[\n\r\t]"}, "content": " "}
    end = {"type": "Strip", "strip_left": False, "strip_right": True}
    return _sequence("normalizers", lower, spaces, {"type": "NFC"}, end)


def _deberta_v2_words(stored: ClassInputs) -> Part | None:
    punctuation = {"type": "Punctuation", "behavior": "Isolated"} if stored.flag("split_by_punct", False) else None
    scheme = "always" if stored.flag("add_prefix_space", True) else "first"
    spaces = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": True}
    return _sequence("pretokenizers", punctuation, spaces)


def _gemma_words(_: ClassInputs) -> Part:
    return {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def _cls_sep(stored: ClassInputs, *, second_type: int = 1, separators: int = 1) -> Template:
    first, last = (stored.id_of("cls_token"), 0), stored.id_of("sep_token")
    between = [(last, 0)] * separators
    single = [first, ("A", 0), (last, 0)]
    return single, [first, ("A", 0), *between, ("B", second_type), (last, second_type)]


def _roberta(stored: ClassInputs) -> Template:
    return _cls_sep(stored, second_type=0, separators=2)


def _bos_eos(stored: ClassInputs) -> Template:
    first, last = (stored.id_of("bos_token"), 0), (stored.id_of("eos_token"), 0)
    return [first, ("A", 0), last], [first, ("A", 0), last, last, ("B", 0), last]


def _eos(stored: ClassInputs) -> Template:
    last = (stored.id_of("eos_token"), 0)
    return [("A", 0), last], [("A", 0), last, ("B", 0), last]


def _word_piece(stored: ClassInputs) -> Mapping[str, Any]:
    return {"unk_token": stored.tokens["unk_token"], "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}


_PLAIN_MERGES = {"continuing_subword_prefix": None, "end_of_word_suffix": None, "dropout": None}


def _deberta_v2_unknown(stored: ClassInputs) -> Mapping[str, Any]:
    if stored.scores.get(stored.tokens["unk_token"]) != 0.0:  # transformers then takes the argument `unk_id`
        raise ModelError(
            "tokenizer.json: the unknown token has a score other than 0, which is not supported for DebertaV2Tokenizer"
        )
    return {"unk_id": stored.id_of("unk_token"), "byte_fallback": False}


def _no_unknown(_: ClassInputs) -> Mapping[str, Any]:
    return {"unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, **_PLAIN_MERGES}


def _nothing(_: ClassInputs) -> None:
    return None


_BERT_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_ROBERTA_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "mask_token": "<mask>",
}
_BERT = TokenizerClass(
    model="WordPiece",
    tokens=_BERT_TOKENS,
    types=True,
    normalizer=_bert_normalizer,
    pre_tokenizer=lambda _: {"type": "BertPreTokenizer"},
    template=_cls_sep,
    unknown=_word_piece,
)
_ROBERTA = TokenizerClass(
    model="BPE",
    tokens=_ROBERTA_TOKENS,
    types=False,
    normalizer=_nothing,
    pre_tokenizer=_byte_level,
    template=_roberta,
    unknown=_no_unknown,
)
CLASSES: Mapping[str, TokenizerClass] = {
    "Bert": _BERT,
    "DistilBert": replace(_BERT, types=False),
    "MPNet": replace(_BERT, tokens={**_ROBERTA_TOKENS, "unk_token": "[UNK]"}, types=False, template=_roberta, splits_left=True),
    "Roberta": _ROBERTA,
    "GPT2": replace(_ROBERTA, tokens=dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>"), template=None),
    "XLMRoberta": TokenizerClass(
        model="Unigram",
        tokens=_ROBERTA_TOKENS,
        types=False,
        normalizer=lambda stored: stored.precompiled,
        pre_tokenizer=_words_then_metaspace,
        template=_bos_eos,
        unknown=lambda _: {"unk_id": 3, "byte_fallback": False},
    ),
    "Camembert": TokenizerClass(
        model="Unigram",
        tokens=_ROBERTA_TOKENS,
        types=False,
        normalizer=lambda stored: stored.precompiled,
        pre_tokenizer=_words_then_metaspace,
        template=_bos_eos,
        unknown=lambda stored: {"unk_id": stored.id_of("unk_token"), "byte_fallback": False},
        splits_left=True,
    ),
    "DebertaV2": TokenizerClass(
        model="Unigram",
        tokens={**_BERT_TOKENS, "bos_token": "[CLS]", "eos_token": "[SEP]"},
        types=True,
        normalizer=_deberta_v2_normalizer,
        pre_tokenizer=lambda stored: _deberta_v2_words(stored) or {},
        template=_cls_sep,
        unknown=_deberta_v2_unknown,
    ),
    "Qwen2": TokenizerClass(
        model="BPE",
        tokens=dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
        types=False,
        normalizer=lambda _: {"type": "NFC"},
        pre_tokenizer=_qwen2_words,
        template=None,
        unknown=_no_unknown,
        plain_flags=True,
    ),
    "Gemma": TokenizerClass(
        model="BPE",
        tokens={"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"},
        types=False,
        normalizer=lambda _: {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        pre_tokenizer=_gemma_words,
        template=None,
        unknown=lambda stored: {"unk_token": stored.tokens["unk_token"], "fuse_unk": True, "byte_fallback": True, **_PLAIN_MERGES},
    ),
    "Llama": TokenizerClass(
        model="BPE",
        tokens={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        types=False,
        normalizer=_nothing,
        pre_tokenizer=lambda stored: _metaspace(stored, scheme="always" if stored.flag("legacy", False) else "first", split=False),
        template=None,
        unknown=lambda _: {"unk_token": None, "fuse_unk": True, "byte_fallback": True, **_PLAIN_MERGES},
    ),
    "T5": TokenizerClass(
        model="Unigram",
        tokens={"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        types=False,
        normalizer=lambda stored: stored.precompiled,
        pre_tokenizer=_words_then_metaspace,
        template=_eos,
        unknown=lambda _: {"unk_id": 2, "byte_fallback": False},
    ),
}
"""Classes with a pipeline of their own, by name without ``Tokenizer`` and ``Fast``."""
SAME = {
    "Electra": "Bert",
    "MobileBert": "Bert",
    "SqueezeBert": "Bert",
    "LayoutLM": "Bert",
    "Lxmert": "Bert",
    "RetriBert": "Bert",
    "Bart": "Roberta",
    "Longformer": "Roberta",
    "LED": "Roberta",
    "Mvp": "Roberta",
}
"""Names of classes that are another class."""
AS_STORED = (
    "PreTrainedTokenizerFast",
    "PreTrainedTokenizer",
    "TokenizersBackend",
    "NomicBertTokenizer",
    "ModernBertTokenizer",
    "MT5Tokenizer",
    "Qwen3Tokenizer",
    "XLMRobertaXLTokenizer",
)
"""Classes that take tokenizer.json as it is."""
BY_MODEL_TYPE = {
    "bert": "Bert",
    "distilbert": "Bert",
    "electra": "Bert",
    "nomic_bert": "Bert",
    "mpnet": "MPNet",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "gte": "XLMRoberta",
    "camembert": "Camembert",
    "deberta-v2": "DebertaV2",
    "qwen2": "Qwen2",
    "qwen3": "Qwen2",
    "gemma3_text": "Gemma",
    "t5": "T5",
    "mt5": "T5",
}
"""The class of a model type, where tokenizer_config.json names none."""
NOT_BY_NAME = ("modernbert", "qwen2")
"""Model types for which transformers takes its own class whatever class the file names."""
