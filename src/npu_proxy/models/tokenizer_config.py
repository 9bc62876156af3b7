"""The tokenizer that transformers builds from a model's folder, as changes to its tokenizer.json.

tokenizer_config.json names a class, whose pipeline (tokenizer_classes.py) replaces the stored one, and adds tokens. In nearly all
folders nothing changes, because the files agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from npu_proxy.errors import ModelError, model_errors, unread_error
from npu_proxy.models.added_tokens import Vocabulary, added_tokens
from npu_proxy.models.json_files import Json, JsonObject
from npu_proxy.models.tokenizer_classes import (
    AS_STORED,
    BY_MODEL_TYPE,
    CLASSES,
    NOT_BY_NAME,
    SAME,
    ClassInputs,
    TokenizerClass,
)
from npu_proxy.models.tokenizer_json import StoredTokenizer, decode_tokenizer, find_tokenizer_files
from npu_proxy.models.tokenizer_templates import post_processor, template_of
from npu_proxy.models.unread import FolderReader
from npu_proxy.spec import TokenizerSource


def read_tokenizer(
    folder: Path, settings: JsonObject, config: Json, reader: FolderReader, *, lower: bool = False
) -> TokenizerSource:
    """The tokenizer of a folder. settings: tokenizer_config.json. config: config.json. Raises ModelError.

    lower: whether texts are also lower-cased, before the tokenizer's own normalizer.
    """
    files = find_tokenizer_files(folder)
    with model_errors(files[0].name):
        return _read(files, settings, config, reader, lower=lower)


def _read(files: Sequence[Path], settings: JsonObject, config: Json, reader: FolderReader, *, lower: bool) -> TokenizerSource:
    folder = files[0].parent
    stored, text = decode_tokenizer(files)
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
    vocabulary, tokens = added_tokens(settings, stored, chosen, folder, reader)
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
    chosen: TokenizerClass, settings: JsonObject, stored: StoredTokenizer, vocabulary: Vocabulary, tokens: Mapping[str, str]
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


# -- switches ------------------------------------------------------------------------------------------------------------


def _refuse_switches(settings: JsonObject) -> None:
    """Raise ModelError for switches that would change token ids, and are not computed."""
    if settings.get("split_special_tokens") not in (None, False):
        found = str(settings["split_special_tokens"])[:40]
        raise ModelError(f"tokenizer_config.json: `split_special_tokens` is `{found}`, which npu-proxy does not compute")


def _cuts_start(settings: JsonObject, stored: StoredTokenizer) -> bool:
    """Whether long texts are cut at their start."""
    direction = (stored.truncation or {}).get("direction", "Right") if isinstance(stored.truncation, dict) else "Right"
    side = settings.get("truncation_side", str(direction).lower())
    if side not in ("left", "right"):
        raise ModelError(f"tokenizer_config.json: `truncation_side` is `{str(side)[:40]}`, not left or right")
    return side == "left"
