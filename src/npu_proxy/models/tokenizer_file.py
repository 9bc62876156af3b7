"""Open tokenizer.json: what would make a text grow is refused, and a tokenizer that is not known is first tried elsewhere.

The tokenizers library ends the process when it runs out of memory, and nothing can catch that. So the parts of the file that
multiply a text are read before it is opened, and a file that is not pinned in the catalog first encodes a few texts in a process
of its own, whose memory is limited.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, cast

import msgspec
from tokenizers import Tokenizer

from npu_proxy.errors import ModelError
from npu_proxy.models.catalog import CATALOG
from npu_proxy.models.tokenizer_json import read_tokenizer_file
from npu_proxy.spec import TokenizerSource
from npu_proxy.system import run_python

MOST_GROWTH = 64
"""How many times as many characters normalizing may make of a text."""
_MOST_SPECIAL = 1000
"""Special tokens around a text or a pair."""
LONGEST_WORD = 200
"""Characters of a word that WordPiece searches for pieces, in cubic time; BERT has 100."""
_LONGEST_TOKEN = 1000
"""Characters of a token, of which a text of unknown words, special tokens or ids may have many."""
_UNICODE_GROWTH = 32
"""How many characters a table of Unicode's own forms makes of one at most; the longest has 18."""
_TRIAL_SECONDS = 20.0
_TRIAL_BYTES, _BYTES_PER_BYTE = 1 << 30, 60
"""Memory for the trial: some, and more for each byte of the file."""
_TRIAL = """
import os, sys
os.environ["TOKENIZERS_PARALLELISM"] = "false"
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_buffer(sys.stdin.buffer.read())
tokenizer.no_truncation()
tokenizer.no_padding()
for text in ("a" * 10_000, "The cat sat. " * 500, "".join(map(chr, range(32, 3000))), " \\t\\n" * 1000, "\\u6771\\u4eac" * 1000):
    for pair in (None, text[:100]):
        ids = tokenizer.encode(text, pair).ids
        tokenizer.decode(ids[:1000])
print("ok")
"""
_PINNED = frozenset(checksum for entry in CATALOG for path, checksum in entry.sha256.items() if path.endswith("tokenizer.json"))
_tried: set[str] = set()
"""Checksums of the tokenizers that were tried in this process."""


_Token = Annotated[str, msgspec.Meta(max_length=_LONGEST_TOKEN)]


class _Added(msgspec.Struct):
    content: _Token


class _Model(msgspec.Struct):
    vocab: dict[_Token, int] | list[tuple[_Token, float]] = {}
    unk_token: _Token | None = None
    max_input_chars_per_word: int | None = None


class _Parts(msgspec.Struct):
    """The parts of tokenizer.json that can multiply a text; the rest is not decoded."""

    normalizer: Any = None
    decoder: Any = None
    post_processor: Any = None
    added_tokens: list[_Added] | None = None
    model: _Model | None = None


_DECODER = msgspec.json.Decoder(_Parts)


def open_tokenizer(source: TokenizerSource) -> tuple[Tokenizer, float]:
    """A tokenizer without truncation and padding, and how many characters it may make of one.

    Raises ModelError naming what it must not contain.
    """
    name, text = source.files[0].name, _with_parts(read_tokenizer_file(source.files), source.parts)
    growth = check_growth(text, name)
    _try(text, name)
    try:
        tokenizer: Tokenizer = Tokenizer.from_buffer(text)
    except Exception as error:  # the bindings raise a bare Exception for any error in the file
        raise ModelError(f"{name} cannot be read: {str(error)[:200]}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, growth


def _with_parts(text: bytes, parts: Mapping[str, Any]) -> bytes:
    if not parts:
        return text
    content: dict[str, Any] = msgspec.json.decode(text)
    model = {**content["model"], **parts.get("model", {})}
    return msgspec.json.encode({**content, **parts, "model": model, "truncation": None, "padding": None})


def check_growth(text: bytes, name: str = "tokenizer.json") -> float:
    """How many times as many characters the normalizer may make of a text. Raises ModelError if a part makes too many.

    text: the content of tokenizer.json.
    """
    try:
        parts = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{name} cannot be read: {str(error)[:200]}") from error
    try:
        growth = _growth(parts.normalizer, "normalizers")
        decoded = _growth(parts.decoder, "decoders")
        special = _special_tokens(parts.post_processor)
        word = (parts.model and parts.model.max_input_chars_per_word) or 0
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, OverflowError) as error:
        cause = f"{type(error).__name__}: {str(error)[:100]}"
        raise ModelError(f"{name} is not what the tokenizers library writes ({cause})") from error
    most = max(growth, decoded)
    if most > MOST_GROWTH:
        raise ModelError(f"{name}: replacing makes up to {most:.3g} characters of one; at most {MOST_GROWTH} are allowed")
    if special > _MOST_SPECIAL:
        raise ModelError(f"{name}: the template adds {special} tokens to every text; at most {_MOST_SPECIAL} are allowed")
    if word > LONGEST_WORD:
        raise ModelError(f"{name}: max_input_chars_per_word is {word}; at most {LONGEST_WORD} is allowed")
    return growth


def _growth(part: Any, children: str) -> float:
    """The product of what each replacement, one after the other, makes of a character at most."""
    if part is None:
        return 1.0
    kind = part["type"]
    if kind == "Sequence":
        growth = 1.0
        for child in part[children]:
            growth = min(growth * _growth(child, children), 1e30)
        return growth
    if kind == "Prepend":
        return 1.0 + len(part["prepend"])
    if kind == "Precompiled":
        longest = _longest_replacement(part["precompiled_charsmap"])
        return longest if longest > _UNICODE_GROWTH else 1.0
    if kind != "Replace":
        return 1.0  # what Unicode's own forms and byte-level alphabets make of a character is bounded
    content, pattern = len(part["content"]), part["pattern"]
    text = pattern.get("String")
    # An expression may match between any two characters, and puts its replacement there.
    return max(1.0, content / len(text)) if text else 1.0 + content


def _longest_replacement(charsmap: str) -> float:
    """The most characters that sentencepiece's table puts in place of others: after its trie, texts that end in a zero byte."""
    table = base64.b64decode(charsmap, validate=True)
    trie = int.from_bytes(table[:4], "little")
    if trie > len(table) - 4:
        raise ValueError("the table of characters is cut")
    return float(max((len(text.decode(errors="replace")) for text in table[4 + trie :].split(b"\0")), default=0))


def _special_tokens(part: Any) -> int:
    """How many special tokens a post-processor adds at most. Raises ValueError if it repeats the text itself."""
    if part is None:
        return 0
    if part["type"] == "Sequence":
        return sum(map(_special_tokens, part["processors"]))
    if part["type"] != "TemplateProcessing":
        return 4  # the fixed templates of BERT and RoBERTa
    sizes = {name: len(token["ids"]) for name, token in part["special_tokens"].items()}
    if any(len(text) > _LONGEST_TOKEN for token in part["special_tokens"].values() for text in token["tokens"]):
        raise ValueError("a special token is too long")
    most = 0
    for template in (part["single"], part["pair"]):
        pieces = cast("list[dict[str, Any]]", template)
        texts = [piece["Sequence"]["id"] for piece in pieces if "Sequence" in piece]
        if len(texts) > len(set(texts)):
            raise ValueError("a template repeats the text")
        most = max(most, sum(sizes[piece["SpecialToken"]["id"]] for piece in pieces if "SpecialToken" in piece))
    return most


def _try(text: bytes, name: str) -> None:
    """Let a process of its own encode a few texts, unless the tokenizer is pinned or was tried. Raises ModelError if that fails."""
    checksum = hashlib.sha256(text).hexdigest()
    if checksum in _tried:
        return
    if checksum not in _PINNED:
        _run_trial(text, name, _TRIAL_BYTES + _BYTES_PER_BYTE * len(text))
    _tried.add(checksum)


def _run_trial(text: bytes, name: str, limit: int) -> None:
    code, printed = run_python(_TRIAL, text, _TRIAL_SECONDS, limit)
    if code is None:
        raise ModelError(f"{name}: encoding a few texts took over {_TRIAL_SECONDS:g} seconds")
    if "ok" not in printed:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        memory = f"{limit >> 20} MB of memory"
        raise ModelError(f"{name}: encoding a few texts within {memory} failed ({how}); is the file damaged?")
