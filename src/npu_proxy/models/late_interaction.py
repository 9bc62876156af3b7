"""Late-interaction models: how queries and documents differ. Each layout of the folder is one function.

Source: sentence-transformers' MultiVectorEncoder, PyLate, and Stanford's ColBERT.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from tokenizers import Tokenizer

from npu_proxy.errors import ModelError, model_errors
from npu_proxy.models.json_files import Json
from npu_proxy.models.tokenizer_file import open_tokenizer
from npu_proxy.spec import LateInteractionConfig, TokenizerSource

PYLATE_KEYS = (
    "query_length",
    "document_length",
    "do_query_expansion",
    "attend_to_expansion_tokens",
    "attend_to_mask_tokens",
    "query_prefix",
    "document_prefix",
    "skiplist_words",
)
"""Keys of config_sentence_transformers.json that show that PyLate wrote it; PyLate expands queries unless the file disables it."""
_EXPANDED = 32


@dataclass(frozen=True, kw_only=True)
class LateInteractionFiles:
    """Contents of the files. Lengths are in tokens; None means the model's limit. expanded_length: 0 for no expansion.

    markers: texts before queries and documents that are one token if the vocabulary has them. normalizes: whether token vectors
    are normalized although no module says so. by_stanford: whether the folder has the layout of Stanford's code. mask: the
    config.json of a MultiVectorMask.
    """

    query_length: int | None
    document_length: int | None
    expanded_length: int
    attend_to_expansion: bool
    prompts: Mapping[str, str]
    markers: Sequence[str] = ()
    normalizes: bool = False
    by_stanford: bool = False
    mask: Json = field(default_factory=dict[str, Any])


def read_pylate(about: Json, limits: Json, mask: Json) -> LateInteractionFiles:
    """Read the layouts of PyLate and sentence-transformers.

    about: config_sentence_transformers.json. limits: sentence_bert_config.json. mask: the config of the MultiVectorMask.
    """
    with model_errors("sentence_bert_config.json"):
        return _read_pylate(about, limits, mask)


def _read_pylate(about: Json, limits: Json, mask: Json) -> LateInteractionFiles:
    query, document = (limits.get(key) or about.get(key) for key in ("query_length", "document_length"))
    expansion: Any = limits.get("query_expansion", about.get("query_expansion"))
    by_pylate = expansion is None and "query_expansion" not in about and any(key in about for key in PYLATE_KEYS)
    attend = about.get("attend_to_expansion_tokens", about.get("attend_to_mask_tokens"))
    if by_pylate and about.get("do_query_expansion") is not False:
        expansion, query = {"strategy": "fixed", "attend": bool(attend), "length": query or _EXPANDED}, None
    if "skiplist_words" in about and about["skiplist_words"] is not None:
        mask = {"skiplist_words": about["skiplist_words"], **mask}
    length, attend = 0, False
    if expansion:
        settings = cast("Json", expansion)
        if settings.get("strategy", "fixed") != "fixed" or settings.get("token"):
            raise ModelError("sentence_bert_config.json: only the query_expansion `fixed` with the mask token is supported")
        length, attend = int(settings["length"]), bool(settings.get("attend"))
    prompts: dict[str, str] = {}
    old = by_pylate or about.get("model_type") == "ColBERT"
    for side in ("query", "document"):
        prefix = about.get(f"{side}_prefix")
        if prefix:
            stored = str((about.get("prompts") or {}).get(side) or "")
            prompts[side] = prefix + stored.removeprefix(prefix)
    return LateInteractionFiles(
        query_length=length or query,
        document_length=document,
        expanded_length=length,
        attend_to_expansion=attend,
        prompts=prompts,
        markers=[about[key] for key in ("query_prefix", "document_prefix") if about.get(key)],
        normalizes=old,
        mask={"skiplist_words": list(string.punctuation), **mask} if old else mask,
    )


def read_stanford(about: Json) -> LateInteractionFiles:
    """Read the layout of Stanford's ColBERT. about: ``artifact.metadata``, next to the weights."""
    length = int(about.get("query_maxlen") or _EXPANDED)
    markers = (str(about.get("query_token_id") or "[unused0]"), str(about.get("doc_token_id") or "[unused1]"))
    return LateInteractionFiles(
        query_length=length,
        document_length=about.get("doc_maxlen"),
        expanded_length=length,
        attend_to_expansion=bool(about.get("attend_to_mask_tokens")),
        prompts={"query": f"{markers[0]} ", "document": f"{markers[1]} "},
        markers=markers,
        normalizes=True,
        by_stanford=True,
        mask={"skiplist_words": list(string.punctuation) if about.get("mask_punctuation", True) else []},
    )


def late_interaction_config(
    late: LateInteractionFiles, limits: tuple[int, int], source: TokenizerSource, vocabulary: int
) -> LateInteractionConfig:
    """The config of queries and documents. Raises ModelError if the mask token is missing.

    limits: tokens of a text that has no length of its own, and of any text.
    """
    usual, most = limits
    tokenizer, _ = open_tokenizer(source)
    mask_id = 0
    if late.expanded_length:
        ids = [tokenizer.token_to_id(token) for token in (source.tokens.get("mask_token"), "[MASK]", "<mask>") if token]
        first_id = next((token_id for token_id in ids if token_id is not None), None)
        if first_id is None or first_id >= vocabulary:
            raise ModelError(
                "tokenizer.json: queries are expanded with mask tokens, but the tokenizer has none, or one without vector"
            )
        mask_id = first_id
    skip_ids, query_skip_ids = (_skipped_ids(late.mask, side, tokenizer) for side in ("document", "query"))
    return LateInteractionConfig(
        query_length=min(late.query_length or usual, most),
        document_length=min(late.document_length or usual, most),
        expanded_length=min(late.expanded_length, most),
        attend_to_expansion=late.attend_to_expansion,
        mask_id=mask_id,
        skip_ids=skip_ids,
        query_skip_ids=query_skip_ids,
    )


def _skipped_ids(mask: Json, side: str, tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the words in a MultiVectorMask that get no vector on this ``side``, if they are in the vocabulary."""
    tasks: Any = mask.get("skiplist_tasks") or ["document"]
    if side not in ([tasks] if isinstance(tasks, str) else tasks):
        return frozenset()
    words: Any = mask.get("skiplist_words") or []
    ids = (tokenizer.token_to_id(str(word)) for word in words)
    return frozenset(token_id for token_id in ids if token_id is not None)
