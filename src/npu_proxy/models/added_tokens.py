"""Tokens that a folder's files add to a tokenizer, with their ids and flags, in the order in which transformers adds them.

Source: transformers 5.24 ``tokenization_utils_base.py`` and ``tokenization_utils_tokenizers.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from npu_proxy.errors import ModelError
from npu_proxy.models.json_files import JsonObject
from npu_proxy.models.tokenizer_classes import NAMED, TokenizerClass
from npu_proxy.models.tokenizer_file import open_tokenizer
from npu_proxy.models.tokenizer_json import AddedToken, StoredTokenizer, decode_tokenizer
from npu_proxy.models.unread import FolderReader
from npu_proxy.spec import TokenizerSource

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass
class Vocabulary:
    """Ids of tokens: those of the model, then those that are added."""

    ids: Mapping[str, int]
    added: dict[str, AddedToken] = field(default_factory=dict[str, AddedToken])

    def add(self, token: AddedToken) -> None:
        """Add a token, or replace its flags; a new one gets the next free id."""
        known = self.ids.get(token.content, self.added[token.content].id if token.content in self.added else None)
        new = known is None
        number = self._next() if new else known
        self.added[token.content] = msgspec.structs.replace(token, id=number)

    def find(self, token: str) -> int | None:
        """The id of a token."""
        return self.added[token].id if token in self.added else self.ids.get(token)

    def _next(self) -> int:
        return len(self.ids) + sum(1 for token in self.added if token not in self.ids)


def added_tokens(
    settings: JsonObject, stored: StoredTokenizer, chosen: TokenizerClass | None, folder: Path, reader: FolderReader
) -> tuple[Vocabulary, Mapping[str, str]]:
    """All added tokens with their ids, and the contents of the named special tokens."""
    named, listed, extra = _listed_tokens(settings, stored, folder, reader, keep_all=chosen is None)
    if chosen is not None:
        named = {**chosen.tokens, **named}
    if isinstance(extra, JsonObject):
        named |= {key: extra[key] for key in extra}
        extra = []
    vocabulary = Vocabulary(stored.ids)
    for token in listed:
        vocabulary.add(token)
    tokens = {key: _content(value) for key, value in named.items() if value is not None}
    order = [*NAMED, *(key for key in named if key not in NAMED)]
    for key in order:
        if (value := named.get(key)) is not None:
            _add_named(vocabulary, key, value, chosen)
    for value in extra:
        token = _token(value, "additional_special_tokens")
        if chosen is not None and chosen.plain_flags:
            vocabulary.add(AddedToken(token.content))
        elif token.content not in vocabulary.added:
            vocabulary.add(token)
    return vocabulary, tokens


def _listed_tokens(
    settings: JsonObject, stored: StoredTokenizer, folder: Path, reader: FolderReader, *, keep_all: bool
) -> tuple[dict[str, Any], Sequence[AddedToken], Any]:
    """The named tokens, the added tokens in the order of their ids, and the additional special tokens of the files.

    keep_all: whether tokens of tokenizer.json are kept although tokenizer_config.json has a list without them.
    """
    in_file = sorted(stored.added_tokens or (), key=lambda token: token.id)
    named = {key: settings.get(key) for key in settings if _is_token(key)}
    extra, additional = settings.get("extra_special_tokens"), settings.get("additional_special_tokens")
    if extra and additional and extra != additional:
        raise ModelError("tokenizer_config.json: `additional_special_tokens` and `extra_special_tokens` contradict each other")
    extra = extra or additional or []
    if "added_tokens_decoder" in settings:
        decoder = settings["added_tokens_decoder"]
        tokens = [_token(decoder[number], "added_tokens_decoder") for number in sorted(decoder, key=int)]
        return named, [*(in_file if keep_all else ()), *tokens], extra
    special_map = reader.object(folder / "special_tokens_map.json", optional=True)
    named |= {key: special_map.get(key) for key in special_map if _is_token(key)}
    more_extra = special_map.get("extra_special_tokens") or special_map.get("additional_special_tokens") or []
    if isinstance(extra, JsonObject) or isinstance(more_extra, JsonObject):
        extra = more_extra or extra
    else:
        extra = [*extra, *(value for value in more_extra if value not in extra)]
    special = {_content(value) for value in (*named.values(), *extra)}
    more = reader.object(folder / "added_tokens.json", optional=True)
    listed = [
        AddedToken(content, normalized=content not in special, special=content in special)
        for content in sorted(more, key=lambda content: int(more[content]))
    ]
    return named, [*(in_file if keep_all else ()), *listed, *in_file], extra


def _is_token(key: str) -> bool:
    return key.endswith("_token") and key not in ("add_bos_token", "add_eos_token", "split_special_token")


def _add_named(vocabulary: Vocabulary, key: str, value: Any, chosen: TokenizerClass | None) -> None:
    """Add a named special token, unless it is there; that it is special, its entry cannot change."""
    token = _token(value, key)
    known = vocabulary.added.get(token.content)
    if chosen is not None and chosen.plain_flags:
        vocabulary.add(AddedToken(token.content))
    elif known is not None:
        vocabulary.add(msgspec.structs.replace(known, special=True))
    elif chosen is not None and chosen.splits_left and isinstance(value, str):
        vocabulary.add(msgspec.structs.replace(token, lstrip=key == "mask_token", normalized=False))
    else:
        vocabulary.add(token)


def _content(value: Any) -> str:
    return str(value["content"]) if isinstance(value, Mapping) else str(value)


def _token(value: Any, key: str) -> AddedToken:
    """An added token from a text or an object."""
    if isinstance(value, str):
        return AddedToken(value)
    if isinstance(value, Mapping) and isinstance(value.get("content"), str):
        flags = {name: value[name] for name in _FLAGS if name in value}
        value.get("__type")
        if all(isinstance(flag, bool) for flag in flags.values()):
            return AddedToken(
                value["content"], **{"normalized": True, "special": False, **flags} if key == "added_tokens_decoder" else flags
            )
    raise ModelError(f"tokenizer_config.json: `{key}` is not a token: {str(value)[:80]}")


def with_markers(source: TokenizerSource, markers: Sequence[str]) -> TokenizerSource:
    """The tokenizer with markers, such as ``[unused0]``, found whole if the vocabulary has them.

    Source: sentence-transformers' ``MultiVectorEncoder._register_prefix_tokens``.
    """
    if not markers:
        return source
    tokenizer, _ = open_tokenizer(source)
    stored, _ = decode_tokenizer(source.files)
    listed = [msgspec.convert(token, AddedToken) for token in source.parts.get("added_tokens", ())] or list(
        stored.added_tokens or ()
    )
    added = {token.content: token for token in listed}
    for marker in markers:
        words = marker.split(None, 1)
        content = next((text for text in (marker, *words[:1]) if tokenizer.token_to_id(text) is not None), None)
        if content is None or tokenizer.encode(content, add_special_tokens=False).tokens == [content]:
            continue
        added[content] = AddedToken(content, id=tokenizer.token_to_id(content) or 0)
    if list(added.values()) == listed:
        return source
    tokens = [msgspec.to_builtins(token) for token in sorted(added.values(), key=lambda token: token.id)]
    return replace(source, parts={**source.parts, "added_tokens": tokens})
