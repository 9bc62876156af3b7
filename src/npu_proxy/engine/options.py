"""What callers say besides their texts, and the request it becomes."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any, Literal, TypedDict, cast

import numpy as np

from npu_proxy.errors import EmptyInputError, InputError
from npu_proxy.types import Chunking, DType, EmbedRequest, Pair, TextInput, Truncate


class Options(TypedDict, total=False):
    """What every verb takes besides the texts; see EmbedRequest for the meanings."""

    input_type: str | None
    prompt_name: str | None
    prompt: str | None
    instruction: str | None
    dimensions: int | None
    normalize: bool
    truncate: Truncate | Literal["error", "end", "start", "chunk"]
    chunking: Chunking
    max_tokens: int | None
    dtype: DType | str
    timeout: float | None
    """Seconds until DeadlineError; None takes the setting `timeout` (`bulk_timeout` a batch when streaming)."""


def request_of(texts: Sequence[TextInput], options: Options, timeout: float) -> EmbedRequest:
    """A request from a verb's options; ``timeout`` seconds unless they say. Raises InputError for words that are unknown."""
    check_options(options, Options.__annotations__)
    given: dict[str, Any] = {name: value for name, value in options.items() if name != "timeout"}
    seconds = options.get("timeout")
    return EmbedRequest(texts=texts, deadline=time.monotonic() + (timeout if seconds is None else seconds), **given)


def check_options(options: Options, known: Collection[str]) -> None:
    """Raise InputError for an option that is none of ``known``: it would change nothing, without a word."""
    for name in options:
        if name not in known:
            raise InputError(f"there is no option `{name}` here; there are {', '.join(known)}", param=name)


def check_texts(texts: Sequence[TextInput]) -> None:
    """Raise InputError for what is no text, EmptyInputError where there is none."""
    if not texts:
        raise EmptyInputError("there is no text to embed", param="input")
    for index, text in enumerate(texts):
        if isinstance(text, Pair):
            if not all(isinstance(side, str) for side in cast("tuple[object, object]", text)):
                raise InputError(f"pair {index} must be of two strings", param="input")
        elif not isinstance(text, str | list | tuple | np.ndarray):
            raise InputError(f"text {index} is a {type(text).__name__}; expected a string or a list of token ids", param="input")
