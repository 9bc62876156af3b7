"""Static models by the rules of the library that wrote them: model2vec, or sentence-transformers' StaticEmbedding.

Both read tokenizer.json and nothing else of the tokenizer's files.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from npu_proxy.errors import ModelError, model_errors
from npu_proxy.models.json_files import MOST_TOKENS, read_flag
from npu_proxy.models.model_files import STATIC_LENGTH, ModelFiles
from npu_proxy.models.tokenizer_json import decode_tokenizer, find_tokenizer_files
from npu_proxy.spec import ModelSpec, TokenizerSource


def with_static_rules(spec: ModelSpec, files: ModelFiles, limit: int | None) -> ModelSpec:
    """A static model by the rules of the library that wrote it.

    model2vec cuts texts by characters, then by tokens, then drops unknown tokens. sentence-transformers keeps them, and has no
    limit but that in tokenizer.json. Source: model2vec 0.10 ``model.py``, sentence-transformers 6.2 ``static_embedding.py``.
    """
    if not files.by_model2vec:
        most = min(spec.tokenizer.stored_limit or MOST_TOKENS, MOST_TOKENS)
        return replace(spec, max_length=min(most, limit or most), tokenizer=replace(spec.tokenizer, cuts_start=False))
    own: Any = files.config.get("max_length", STATIC_LENGTH)
    if own is not None and (type(own) is not int or own < 1):
        raise ModelError(f"config.json: `max_length` is `{str(own)[:40]}`, not a number of at least 1")
    most = min(own or MOST_TOKENS, MOST_TOKENS)
    unknown = spec.tokenizer.unknown_id
    return replace(
        spec,
        max_length=min(most, limit or most),
        most_characters=None if own is None else own * max(1, spec.tokenizer.middle_length),
        by_model2vec=True,
        dropped_ids=frozenset() if unknown is None else frozenset([unknown]),
        normalizes=read_flag(files.config, "normalize", "config.json"),
        tokenizer=replace(spec.tokenizer, cuts_start=False),
    )


def read_stored_tokenizer(folder: Path) -> TokenizerSource:
    """tokenizer.json as it is, whatever other files say: for static models, whose libraries read nothing else."""
    files = find_tokenizer_files(folder)
    if files[0].name != "tokenizer.json":
        raise ModelError(f"{folder.name}: tokenizer.json is missing")
    with model_errors(files[0].name):
        stored, _ = decode_tokenizer(files)
        ids = {**stored.ids, **{token.content: token.id for token in stored.added_tokens or ()}}
        unknown = stored.model.unk_id if stored.model.unk_token is None else ids.get(stored.model.unk_token)
        middle = int(median(map(len, ids))) if ids else 1
        return TokenizerSource(files=files, stored_limit=stored.limit, unknown_id=unknown, middle_length=middle)
