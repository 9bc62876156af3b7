"""What callers say besides their texts, and the request it becomes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal, TypedDict, cast

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
    seconds = options.get("timeout")
    try:
        return EmbedRequest(
            texts=texts,
            input_type=options.get("input_type"),
            prompt_name=options.get("prompt_name"),
            prompt=options.get("prompt"),
            instruction=options.get("instruction"),
            chunking=options.get("chunking", Chunking()),
            max_tokens=options.get("max_tokens"),
            dimensions=options.get("dimensions"),
            normalize=options.get("normalize", True),
            truncate=Truncate(options.get("truncate", Truncate.END)),
            dtype=DType(options.get("dtype", DType.FLOAT32)),
            deadline=time.monotonic() + (timeout if seconds is None else seconds),
        )
    except ValueError as error:
        raise InputError(f"{error}; truncate is one of {', '.join(Truncate)}, dtype one of {', '.join(DType)}") from error


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
