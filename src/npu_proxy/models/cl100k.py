"""Token ids of OpenAI's cl100k_base vocabulary back to text: what langchain-openai sends. Source: tiktoken's file of ranks."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from npu_proxy.errors import InputError, ModelError

NAME = "openai/cl100k_base"
FILE = "cl100k_base.tiktoken"


class Cl100k:
    """The vocabulary, 100,256 pieces of bytes by id. Special tokens have no text and are refused."""

    def __init__(self, file: Path) -> None:
        """Reads ``file``, lines of base64 and id. Raises ModelError."""
        try:
            rows = (line.split() for line in file.read_bytes().splitlines() if line)
            self._pieces = {int(number): base64.b64decode(piece, validate=True) for piece, number in rows}
        except (OSError, ValueError) as error:
            raise ModelError(f"{file.name} cannot be read: {error}; `npu-proxy pull {NAME}` repairs it") from error

    def decode(self, ids: Sequence[int]) -> str:
        """The text; a character whose bytes are incomplete becomes U+FFFD. Raises InputError for an unknown id."""
        try:
            return b"".join([self._pieces[one] for one in ids]).decode("utf-8", "replace")
        except KeyError as error:
            message = f"token id {error} is neither of this model's vocabulary nor of cl100k_base; send text"
            raise InputError(message, param="input") from None
