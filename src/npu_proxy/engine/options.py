"""The options of the Engine's methods, and how to make a request from them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

from npu_proxy.engine.validation import check_options
from npu_proxy.types import Chunking, DType, EmbedRequest, Lane, TextInput, Truncate


class RequestOptions(TypedDict, total=False):
    """Keyword options of the Engine's methods; see EmbedRequest for their meaning."""

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
    expect_fingerprint: str | None
    lane: Lane | Literal["interactive", "bulk"] | None
    timeout: float | None
    """Seconds until DeadlineError; None: the setting `timeout`, and for many texts more, up to `bulk_timeout` (which
    streams have per batch)."""


def make_request(texts: Sequence[TextInput], options: RequestOptions, timeout: float | None) -> EmbedRequest:
    """Make a request from options; its deadline is in ``timeout`` seconds unless they set one. Raises InputError.

    timeout: None leaves it to the engine, which goes by the size of the request.
    """
    check_options(options, RequestOptions.__annotations__)
    fields: dict[str, Any] = {name: value for name, value in options.items() if name != "timeout"}
    seconds = timeout if options.get("timeout") is None else options.get("timeout")
    return EmbedRequest(texts=texts, deadline=None if seconds is None else time.monotonic() + seconds, **fields)
