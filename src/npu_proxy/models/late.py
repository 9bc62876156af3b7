"""Late-interaction folders: how queries and documents differ. A layout is one function.

Source: sentence-transformers' MultiVectorEncoder, PyLate, and Stanford's ColBERT.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer

from npu_proxy.errors import ModelError
from npu_proxy.models.jsons import Json, read_object
from npu_proxy.types import Sides

_OLD = (
    "query_length",
    "document_length",
    "do_query_expansion",
    "attend_to_expansion_tokens",
    "attend_to_mask_tokens",
    "query_prefix",
    "document_prefix",
    "skiplist_words",
)
"""Any of them in config_sentence_transformers.json: PyLate wrote it, and expands queries unless it says no."""
_EXPANDED = 32


@dataclass(frozen=True, kw_only=True)
class Late:
    """What the files say. Lengths are tokens, None for the model's limit; expanded: 0 for no expansion."""

    query_length: int | None
    document_length: int | None
    expanded: int
    attend: bool
    prompts: Mapping[str, str]
    mask: Json = field(default_factory=dict[str, Any])


def pylate(about: Json, limits: Json, mask: Json) -> Late:
    """PyLate's folders and sentence-transformers' own. limits: sentence_bert_config.json. mask: the MultiVectorMask's config."""
    query, document = (limits.get(key) or about.get(key) for key in ("query_length", "document_length"))
    expansion: Any = limits.get("query_expansion", about.get("query_expansion"))
    old = expansion is None and "query_expansion" not in about and any(key in about for key in _OLD)
    if old and about.get("do_query_expansion") is not False:
        attend = about.get("attend_to_expansion_tokens", about.get("attend_to_mask_tokens"))
        expansion, query = {"strategy": "fixed", "attend": bool(attend), "length": query or _EXPANDED}, None
    if "skiplist_words" in about and about["skiplist_words"] is not None:
        mask = {"skiplist_words": about["skiplist_words"], **mask}
    length, attend = 0, False
    if expansion:
        settings = cast("Json", expansion)
        if settings.get("strategy", "fixed") != "fixed" or settings.get("token"):
            raise ModelError("sentence_bert_config.json: query_expansion other than `fixed` with the mask token is not supported")
        length, attend = int(settings["length"]), bool(settings.get("attend"))
    prompts: dict[str, str] = {}
    for side in ("query", "document"):
        prefix = about.get(f"{side}_prefix")
        if prefix:
            stored = str((about.get("prompts") or {}).get(side) or "")
            prompts[side] = prefix + stored.removeprefix(prefix)
    return Late(query_length=length or query, document_length=document, expanded=length, attend=attend, prompts=prompts, mask=mask)


def stanford(folder: Path) -> Late:
    """ColBERT as Stanford's code writes it: ``artifact.metadata`` beside the weights."""
    about = read_object(folder / "artifact.metadata", optional=True)
    length = int(about.get("query_maxlen") or _EXPANDED)
    markers = (str(about.get("query_token_id") or "[unused0]"), str(about.get("doc_token_id") or "[unused1]"))
    return Late(
        query_length=length,
        document_length=about.get("doc_maxlen"),
        expanded=length,
        attend=bool(about.get("attend_to_mask_tokens")),
        prompts={"query": f"{markers[0]} ", "document": f"{markers[1]} "},
        mask={"skiplist_words": list(string.punctuation) if about.get("mask_punctuation", True) else []},
    )


def sides_of(late: Late, limit: int, tokenizer_file: Path) -> Sides:
    """The two sides within a model's limit. Raises ModelError where queries are expanded and there is no mask token."""
    mask_id = 0
    if late.expanded:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
        ids = [tokenizer.token_to_id(token) for token in ("[MASK]", "<mask>")]
        found = next((number for number in ids if number is not None), None)
        if found is None:
            raise ModelError("tokenizer.json: queries are expanded with mask tokens, and the tokenizer has none")
        mask_id = found
    return Sides(
        query_length=min(late.query_length or limit, limit),
        document_length=min(late.document_length or limit, limit),
        expanded=min(late.expanded, limit),
        attend=late.attend,
        mask_id=mask_id,
    )
