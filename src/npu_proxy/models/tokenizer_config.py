"""The tokenizer that transformers builds from a model's folder, as changes to its tokenizer.json.

tokenizer_config.json names a class, whose pipeline (tokenizer_classes.py) replaces the stored one, and adds tokens. In nearly all
folders nothing changes, because the files agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from npu_proxy.errors import ModelError, model_errors, unread_error
from npu_proxy.models.json_files import Json, JsonObject, short_path
from npu_proxy.models.tokenizer_classes import (
    AS_STORED,
    BY_MODEL_TYPE,
    CLASSES,
    NAMED,
    NOT_BY_NAME,
    SAME,
    ClassInputs,
    TokenizerClass,
    post_processor,
    template_of,
)
from npu_proxy.models.tokenizer_file import open_tokenizer, read_tokenizer_file
from npu_proxy.models.unread import FolderReader
from npu_proxy.spec import TokenizerSource

_FILES = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"))
_SENTENCEPIECE = ("sentencepiece.bpe.model", "spiece.model", "spm.model", "tokenizer.model")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class _Token(msgspec.Struct, frozen=True):
    """An added token, as in tokenizer.json. single_word and others: how it is found in a text."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = True
    id: int = -1


class _Model(msgspec.Struct):
    type: str | None = None
    vocab: dict[str, int] | list[tuple[str, float]] = {}
    unk_token: str | None = None
    unk_id: int | None = None
    continuing_subword_prefix: str | None = None
    max_input_chars_per_word: int | None = None
    end_of_word_suffix: str | None = None
    dropout: float | None = None
    fuse_unk: bool = False
    byte_fallback: bool = False
    ignore_merges: bool = False


class _File(msgspec.Struct):
    """What is read of tokenizer.json."""

    model: _Model
    normalizer: Any = None
    pre_tokenizer: Any = None
    post_processor: Any = None
    truncation: Any = None
    added_tokens: list[_Token] | None = None


@dataclass
class _Vocabulary:
    """Ids of tokens: those of the model, then those that are added."""

    ids: Mapping[str, int]
    added: dict[str, _Token] = field(default_factory=dict[str, _Token])

    def add(self, token: _Token) -> None:
        """Add a token, or replace its flags; a new one gets the next free id."""
        known = self.ids.get(token.content, self.added[token.content].id if token.content in self.added else None)
        new = known is None
        number = self._next() if new else known
        self.added[token.content] = msgspec.structs.replace(token, id=number)

    def find(self, token: str) -> int | None:
        return self.added[token].id if token in self.added else self.ids.get(token)

    def _next(self) -> int:
        return len(self.ids) + sum(1 for token in self.added if token not in self.ids)


def read_tokenizer(
    folder: Path, settings: JsonObject, config: Json, reader: FolderReader, *, lower: bool = False
) -> TokenizerSource:
    """The tokenizer of a folder. settings: tokenizer_config.json. config: config.json. Raises ModelError.

    lower: whether texts are also lower-cased, before the tokenizer's own normalizer.
    """
    files = _find_files(folder)
    with model_errors(files[0].name):
        return _read(files, settings, config, reader, lower=lower)


def _read(files: Sequence[Path], settings: JsonObject, config: Json, reader: FolderReader, *, lower: bool) -> TokenizerSource:
    folder = files[0].parent
    stored, text = _decode(files)
    name = _class_name(settings, config, text, reader)
    chosen = CLASSES.get(name)
    if chosen is None and files[0].name != "tokenizer.json":
        raise ModelError(f"{folder.name}: tokenizer.json is missing, which a tokenizer of class `{name}` needs")
    if chosen is not None and stored.model.type not in (chosen.model, None):
        raise ModelError(
            f"tokenizer.json has a {stored.model.type} model, but {name}Tokenizer (`tokenizer_class` in tokenizer_config.json, or"
            f" the class of the model type) has {chosen.model}"
        )
    if chosen is None and stored.model.dropout:
        raise ModelError("tokenizer.json: `dropout` makes token ids random; set it to null")
    if chosen is not None and chosen.template is None and files[0].name != "tokenizer.json":
        wanted = next((key for key in ("add_bos_token", "add_eos_token") if settings.get(key)), None)
        if wanted is not None:  # without tokenizer.json, transformers obeys it
            raise ModelError(f"tokenizer_config.json: `{wanted}` is true; this is not supported without tokenizer.json")
    vocabulary, tokens = _added_tokens(settings, stored, chosen, folder, reader)
    parts: dict[str, Any] = {}
    if chosen is not None:
        parts = _rebuilt(chosen, settings, stored, vocabulary, tokens)
    added = list(vocabulary.added.values())
    if {token.content: token for token in added} != {token.content: token for token in stored.added_tokens or ()}:
        parts["added_tokens"] = [msgspec.to_builtins(token) for token in sorted(added, key=lambda token: token.id)]
    if lower:
        parts |= _lowered(parts.get("normalizer", stored.normalizer))
    _refuse_switches(settings)
    inputs: Any = settings.get("model_input_names")
    if inputs is not None and not (isinstance(inputs, list) and {"input_ids", "attention_mask"} <= set(map(str, inputs))):
        found = str(inputs)[:60]
        raise ModelError(f"tokenizer_config.json: `model_input_names` is `{found}`, without input_ids or attention_mask")
    types = "token_type_ids" in inputs if isinstance(inputs, list) else bool(chosen and chosen.types)
    return TokenizerSource(
        files=files,
        parts=parts,
        types=types,
        cuts_start=_cuts_start(settings, stored),
        tokens=tokens,
    )


def with_markers(source: TokenizerSource, markers: Sequence[str]) -> TokenizerSource:
    """The tokenizer with markers, such as ``[unused0]``, found whole if the vocabulary has them.

    Source: sentence-transformers' ``MultiVectorEncoder._register_prefix_tokens``.
    """
    if not markers:
        return source
    tokenizer, _ = open_tokenizer(source)
    stored, _ = _decode(source.files)
    listed = [msgspec.convert(token, _Token) for token in source.parts.get("added_tokens", ())] or list(stored.added_tokens or ())
    added = {token.content: token for token in listed}
    for marker in markers:
        words = marker.split(None, 1)
        content = next((text for text in (marker, *words[:1]) if tokenizer.token_to_id(text) is not None), None)
        if content is None or tokenizer.encode(content, add_special_tokens=False).tokens == [content]:
            continue
        added[content] = _Token(content, id=tokenizer.token_to_id(content) or 0)
    if list(added.values()) == listed:
        return source
    tokens = [msgspec.to_builtins(token) for token in sorted(added.values(), key=lambda token: token.id)]
    return replace(source, parts={**source.parts, "added_tokens": tokens})


def read_stored_tokenizer(folder: Path) -> TokenizerSource:
    """tokenizer.json as it is, whatever other files say: for static models, whose libraries read nothing else."""
    files = _find_files(folder)
    if files[0].name != "tokenizer.json":
        raise ModelError(f"{folder.name}: tokenizer.json is missing")
    with model_errors(files[0].name):
        stored, _ = _decode(files)
        own = stored.model.vocab
        ids = {**(own if isinstance(own, dict) else {piece: number for number, (piece, _) in enumerate(own)})}
        ids |= {token.content: token.id for token in stored.added_tokens or ()}
        unknown = stored.model.unk_id if stored.model.unk_token is None else ids.get(stored.model.unk_token)
        middle = int(median(map(len, ids))) if ids else 1
        return TokenizerSource(files=files, stored_limit=_stored_limit(stored), unknown_id=unknown, middle_length=middle)


def _find_files(folder: Path) -> Sequence[Path]:
    for names in _FILES:
        files = [folder / name for name in names]
        if all(file.is_file() for file in files):
            return files
    model = next((name for name in _SENTENCEPIECE if (folder / name).is_file()), None)
    if model is None:
        raise ModelError(f"{short_path(folder / 'tokenizer.json')} is missing; npu-proxy needs it, or vocab.txt")
    raise ModelError(
        f"{folder.name}: tokenizer.json is missing. It can be made from {model}, with transformers and sentencepiece installed:"
        ' python -c "import sys, transformers as t; t.AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[1])"'
        " FOLDER"
    )


def _decode(files: Sequence[Path]) -> tuple[_File, bytes]:
    text = read_tokenizer_file(files)
    try:
        return msgspec.json.decode(text, type=_File), text
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{files[0].name} is not what the tokenizers library writes ({str(error)[:200]})") from error


# -- the class -----------------------------------------------------------------------------------------------------------


def _class_name(settings: JsonObject, config: Json, text: bytes, reader: FolderReader) -> str:
    """The name of the class that builds the tokenizer, without ``Tokenizer``; "" for one that takes tokenizer.json as it is."""
    if settings.get("auto_map"):
        raise ModelError("tokenizer_config.json: `auto_map` names a tokenizer with code of its own, which npu-proxy does not run")
    model_type = str(config.get("model_type") or "")
    named = settings.get("tokenizer_class") or config.get("tokenizer_class")
    usual = BY_MODEL_TYPE.get(model_type, "")
    if named is None or (model_type in NOT_BY_NAME and named):
        return usual
    name = str(named)
    full = name.removesuffix("Fast") if name != "PreTrainedTokenizerFast" else name
    short = full.removesuffix("Tokenizer")
    if full == "LlamaTokenizer" and b'"ByteLevel"' in text:
        return ""
    if short in CLASSES or short in SAME:
        return SAME.get(short, short)
    if full in AS_STORED or reader.accepts("tokenizer_class"):
        return ""
    raise unread_error(
        f"tokenizer_config.json: `tokenizer_class` is `{name[:60]}`, which npu-proxy does not know", "tokenizer_class"
    )


def _rebuilt(
    chosen: TokenizerClass, settings: JsonObject, stored: _File, vocabulary: _Vocabulary, tokens: Mapping[str, str]
) -> dict[str, Any]:
    """The parts that differ from the stored ones."""

    def flag(name: str, default: bool | None) -> bool | None:
        value: Any = settings.get(name, default)
        if not isinstance(value, bool) and not (value is None and default is None):
            raise ModelError(f"tokenizer_config.json: `{name}` is `{str(value)[:40]}`, not true or false")
        return value

    own = stored.model.vocab
    made = ClassInputs(
        flag=flag,
        tokens=tokens,
        ids=vocabulary.find,
        scores={} if isinstance(own, dict) else dict(own),
        precompiled=_precompiled(stored.normalizer),
    )
    parts: dict[str, Any] = {}
    normalizer, words = chosen.normalizer(made), chosen.pre_tokenizer(made)
    if _plain(normalizer) != _plain(stored.normalizer):
        parts["normalizer"] = normalizer
    if _plain(words) != _plain(stored.pre_tokenizer):
        parts["pre_tokenizer"] = words
    if chosen.template is not None:
        template = chosen.template(made)
        if _lists(template) != _lists(template_of(stored.post_processor)):
            names = {number: token for token in tokens.values() if (number := vocabulary.find(token)) is not None}
            parts["post_processor"] = post_processor(template, names)
    unknown = {
        key: value for key, value in chosen.unknown(made).items() if _usual(key, value) != _usual(key, getattr(stored.model, key))
    }
    return {**parts, "model": unknown} if unknown else parts


def _lowered(normalizer: Any) -> dict[str, Any]:
    """The change that lower-cases texts first; special tokens in them stay. Source: sentence-transformers' ``Transformer``."""
    kinds = [part.get("type") for part in _sequence(normalizer)]
    if "Lowercase" in kinds or (kinds[:1] == ["BertNormalizer"] and normalizer.get("lowercase")):
        return {}
    return {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *_sequence(normalizer)]}}


def _sequence(normalizer: Any) -> list[Any]:
    if normalizer is None:
        return []
    return list(normalizer["normalizers"]) if normalizer["type"] == "Sequence" else [normalizer]


def _usual(key: str, value: Any) -> Any:
    return None if key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") and not value else value


def _precompiled(part: Any) -> Any:
    if part is None:
        return None
    if part["type"] == "Sequence":
        return next((found for found in map(_precompiled, part["normalizers"]) if found is not None), None)
    return part if part["type"] == "Precompiled" else None


def _plain(part: Any) -> Any:
    """A part in one spelling, without what does not change ids: old names, defaults, and sequences of one."""
    if not isinstance(part, dict):
        return part
    kind: Any = part.get("type")
    for children in ("normalizers", "pretokenizers"):
        if kind == "Sequence" and children in part:
            plain = [_plain(child) for child in part[children]]
            return plain[0] if len(plain) == 1 else {**part, children: plain}
    if kind == "Metaspace":
        old = "always" if part.get("add_prefix_space", True) else "never"
        scheme, split = part.get("prepend_scheme", old), part.get("split", True)
        return {"type": kind, "replacement": part.get("replacement"), "prepend_scheme": scheme, "split": split}
    if kind == "ByteLevel":
        return {"type": kind, "add_prefix_space": part.get("add_prefix_space", True), "use_regex": part.get("use_regex", True)}
    return {"invert": False, **part} if kind == "Split" else part


def _lists(template: Any) -> Any:
    return None if template is None else [[tuple(piece) for piece in pieces] for pieces in template]


# -- added tokens --------------------------------------------------------------------------------------------------------


def _added_tokens(
    settings: JsonObject, stored: _File, chosen: TokenizerClass | None, folder: Path, reader: FolderReader
) -> tuple[_Vocabulary, Mapping[str, str]]:
    """All added tokens with their ids, and the contents of the named special tokens."""
    own = stored.model.vocab
    ids = own if isinstance(own, dict) else {piece: number for number, (piece, _) in enumerate(own)}
    named, listed, extra = _listed_tokens(settings, stored, folder, reader, keep_all=chosen is None)
    if chosen is not None:
        named = {**chosen.tokens, **named}
    if isinstance(extra, JsonObject):
        named |= {key: extra[key] for key in extra}
        extra = []
    vocabulary = _Vocabulary(ids)
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
            vocabulary.add(_Token(token.content))
        elif token.content not in vocabulary.added:
            vocabulary.add(token)
    return vocabulary, tokens


def _listed_tokens(
    settings: JsonObject, stored: _File, folder: Path, reader: FolderReader, *, keep_all: bool
) -> tuple[dict[str, Any], Sequence[_Token], Any]:
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
        _Token(content, normalized=content not in special, special=content in special)
        for content in sorted(more, key=lambda content: int(more[content]))
    ]
    return named, [*(in_file if keep_all else ()), *listed, *in_file], extra


def _is_token(key: str) -> bool:
    return key.endswith("_token") and key not in ("add_bos_token", "add_eos_token", "split_special_token")


def _add_named(vocabulary: _Vocabulary, key: str, value: Any, chosen: TokenizerClass | None) -> None:
    """Add a named special token, unless it is there; that it is special, its entry cannot change."""
    token = _token(value, key)
    known = vocabulary.added.get(token.content)
    if chosen is not None and chosen.plain_flags:
        vocabulary.add(_Token(token.content))
    elif known is not None:
        vocabulary.add(msgspec.structs.replace(known, special=True))
    elif chosen is not None and chosen.splits_left and isinstance(value, str):
        vocabulary.add(msgspec.structs.replace(token, lstrip=key == "mask_token", normalized=False))
    else:
        vocabulary.add(token)


def _content(value: Any) -> str:
    return str(value["content"]) if isinstance(value, Mapping) else str(value)


def _token(value: Any, key: str) -> _Token:
    """An added token from a text or an object."""
    if isinstance(value, str):
        return _Token(value)
    if isinstance(value, Mapping) and isinstance(value.get("content"), str):
        flags = {name: value[name] for name in _FLAGS if name in value}
        value.get("__type")
        if all(isinstance(flag, bool) for flag in flags.values()):
            return _Token(
                value["content"], **{"normalized": True, "special": False, **flags} if key == "added_tokens_decoder" else flags
            )
    raise ModelError(f"tokenizer_config.json: `{key}` is not a token: {str(value)[:80]}")


# -- switches ------------------------------------------------------------------------------------------------------------


def _refuse_switches(settings: JsonObject) -> None:
    """Raise ModelError for switches that would change token ids, and are not computed."""
    if settings.get("split_special_tokens") not in (None, False):
        found = str(settings["split_special_tokens"])[:40]
        raise ModelError(f"tokenizer_config.json: `split_special_tokens` is `{found}`, which npu-proxy does not compute")


def _stored_limit(stored: _File) -> int | None:
    limit: Any = stored.truncation.get("max_length") if isinstance(stored.truncation, dict) else None
    return limit if type(limit) is int and limit > 0 else None


def _cuts_start(settings: JsonObject, stored: _File) -> bool:
    """Whether long texts are cut at their start."""
    direction = (stored.truncation or {}).get("direction", "Right") if isinstance(stored.truncation, dict) else "Right"
    side = settings.get("truncation_side", str(direction).lower())
    if side not in ("left", "right"):
        raise ModelError(f"tokenizer_config.json: `truncation_side` is `{str(side)[:40]}`, not left or right")
    return side == "left"
