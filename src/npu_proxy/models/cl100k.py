"""Decode token ids of OpenAI's cl100k_base vocabulary, which langchain-openai sends. Source: tiktoken's file of ranks."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from npu_proxy.errors import InputError, ModelError

NAME = "openai/cl100k_base"
FILE = "cl100k_base.tiktoken"


class Cl100k:
    """The vocabulary: 100,256 byte strings by id. Special tokens have no text and are refused."""

    def __init__(self, file: Path) -> None:
        """Read ``file``, whose lines contain a base64 string and an id. Raises ModelError if it cannot be read."""
        try:
            rows = (line.split() for line in file.read_bytes().splitlines() if line)
            self._pieces = {int(number): base64.b64decode(piece, validate=True) for piece, number in rows}
        except (OSError, ValueError) as error:
            raise ModelError(f"{file.name} cannot be read: {error}; repair it with `npu-proxy pull {NAME}`") from error

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; a character with missing bytes becomes U+FFFD. Raises InputError for an unknown id."""
        try:
            return b"".join([self._pieces[token_id] for token_id in ids]).decode("utf-8", "replace")
        except KeyError as error:
            message = f"token id {error} is neither in this model's vocabulary nor in cl100k_base; send text"
            raise InputError(message, param="input") from None
