"""What is read of tokenizer.json, or of a vocabulary in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from npu_proxy.errors import ModelError
from npu_proxy.models.json_files import existing, short_path

_FILES = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"))
_SENTENCEPIECE = ("sentencepiece.bpe.model", "spiece.model", "spm.model", "tokenizer.model")
_LARGEST = 256 << 20
_WORD_PIECE = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}


class AddedToken(msgspec.Struct, frozen=True):
    """An added token, as in tokenizer.json. single_word and others: how it is found in a text."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = True
    id: int = -1


class StoredModel(msgspec.Struct):
    """The model of a tokenizer."""

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


class StoredTokenizer(msgspec.Struct):
    """What is read of tokenizer.json."""

    model: StoredModel
    normalizer: Any = None
    pre_tokenizer: Any = None
    post_processor: Any = None
    truncation: Any = None
    added_tokens: list[AddedToken] | None = None

    @property
    def ids(self) -> Mapping[str, int]:
        """The ids of the model's tokens."""
        own = self.model.vocab
        return own if isinstance(own, dict) else {piece: number for number, (piece, _) in enumerate(own)}

    @property
    def limit(self) -> int | None:
        """The limit of tokens per text, if one is stored."""
        limit: Any = self.truncation.get("max_length") if isinstance(self.truncation, dict) else None
        return limit if type(limit) is int and limit > 0 else None


def find_tokenizer_files(folder: Path) -> Sequence[Path]:
    """tokenizer.json, or the files of a vocabulary. Raises ModelError if there is neither."""
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


def decode_tokenizer(files: Sequence[Path]) -> tuple[StoredTokenizer, bytes]:
    """What the files say, and the content of tokenizer.json. Raises ModelError."""
    text = read_tokenizer_file(files)
    try:
        return msgspec.json.decode(text, type=StoredTokenizer), text
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{files[0].name} is not what the tokenizers library writes ({str(error)[:200]})") from error


def read_tokenizer_file(files: Sequence[Path]) -> bytes:
    """The content of tokenizer.json, or what it would be for a vocabulary (and its merges) alone. Raises ModelError."""
    first = files[0]
    try:
        texts = [_read(file) for file in files]
        if first.name == "vocab.txt":
            return msgspec.json.encode(_word_piece(texts[0].decode("utf-8")))
        if first.name == "vocab.json":
            return msgspec.json.encode(_byte_pairs(texts[0], texts[1].decode("utf-8")))
        return texts[0]
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(f"{first.name} cannot be read: {str(error)[:200]}") from error


def _read(file: Path) -> bytes:
    if (size := existing(file).stat().st_size) > _LARGEST:
        raise ModelError(f"{file.name} has {size} bytes; at most {_LARGEST} are allowed")
    return file.read_bytes()


def _word_piece(text: str) -> dict[str, Any]:
    """A tokenizer.json with the tokens of vocab.txt, one per line; the line's number is the id."""
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    vocabulary = {line.rstrip(): number for number, line in enumerate(lines)}
    return {"version": "1.0", "model": {"type": "WordPiece", "unk_token": "[UNK]", **_WORD_PIECE, "vocab": vocabulary}}


def _byte_pairs(vocabulary: bytes, merges: str) -> dict[str, Any]:
    """A tokenizer.json with the tokens of vocab.json, and the pairs of merges.txt, one per line."""
    lines = [line for line in merges.replace("\r\n", "\n").split("\n") if line and not line.startswith("#version")]
    return {"version": "1.0", "model": {"type": "BPE", "vocab": msgspec.json.decode(vocabulary), "merges": lines}}
