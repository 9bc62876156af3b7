"""Options that decide how a request's texts are tokenized: prompt, side, limit, chunks. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from npu_proxy.errors import InputError
from npu_proxy.spec import PROMPT_NAMES, ModelSpec
from npu_proxy.types import DEFAULT_CHUNKING, Chunking, EmbedRequest, Truncate

_MOST_CHUNKS = 1 << 20
"""Stands for any number of chunks."""


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """Everything that decides how a text is tokenized.

    prompt: put before each text (before the first text of a pair). unpooled_prompt: number of leading tokens of it that are not
    pooled. document: whether texts are documents or queries; None if the model treats both alike. limit: tokens per
    text, including special tokens. document_limit: tokens of the second text of a pair, without special tokens.
    on_empty: in place of the setting, if the request has texts that may be empty.
    """

    prompt: str = ""
    unpooled_prompt: int = 0
    document: bool | None = None
    truncate: Truncate = Truncate.END
    limit: int
    document_limit: int | None = None
    on_empty: Literal["error", "placeholder", "embed"] | None = None
    chunking: Chunking = DEFAULT_CHUNKING

    @property
    def late_chunking(self) -> bool:
        """Whether chunks see the text around them and are pooled separately."""
        return self.truncate is Truncate.CHUNK and self.chunking.late

    @property
    def most_tokens(self) -> int:
        """Tokens of a text that are computed at most."""
        if self.truncate is not Truncate.CHUNK:
            return self.limit
        return self.limit * (self.chunking.most or _MOST_CHUNKS)

    @property
    def key(self) -> tuple[object, ...]:
        """A key that differs if the vectors may differ. Cache keys contain it, so the keys of existing options must not change."""
        special = [] if self.document is None else [self.document]
        if self.truncate is Truncate.CHUNK:
            special += [self.chunking.overlap, self.chunking.sentences]
            special += [self.chunking.size, "late", *self.chunking.boundaries] if self.chunking.late else []
            special += ["most", self.chunking.most] if self.chunking.most is not None else []
        if self.document_limit is not None:
            special += ["document", self.document_limit]
        if self.on_empty is not None:
            special += ["empty", self.on_empty]
        return (self.prompt, self.truncate, self.limit, *special)


def has_prompt(spec: ModelSpec, input_type: str) -> bool:
    """Whether a model treats an input type in a way of its own: by an instruction, or because it has queries and documents."""
    return spec.has_sides or any(name in spec.prompts for name in PROMPT_NAMES.get(input_type, ()))


def find_prompt(spec: ModelSpec, request: EmbedRequest) -> str:
    """The prompt of a request, put before each of its texts. Raises InputError if the model does not have the prompt."""
    prompts = spec.prompts
    chosen = [name for name in ("prompt", "prompt_name", "instruction") if getattr(request, name) is not None]
    if len(chosen) > 1:
        raise InputError(f"`{chosen[0]}` and `{chosen[1]}` both set the prompt; send only one of them", param=chosen[1])
    if request.prompt is not None:
        return request.prompt
    if request.prompt_name is not None:
        if request.prompt_name not in prompts:
            known = ", ".join(sorted(prompts)) or "none"
            message = f"the model has no prompt named `{request.prompt_name}`; its prompts: {known}"
            raise InputError(message, param="prompt_name")
        return prompts[request.prompt_name]
    if request.instruction is not None:
        if not spec.instruction:
            message = f"{spec.name} takes no instructions; to set a prompt anyway, send all of it as `prompt`"
            raise InputError(message, param="instruction")
        return spec.instruction.replace("{task}", request.instruction)
    if request.input_type is not None:
        names = PROMPT_NAMES.get(request.input_type)
        if names is None:
            message = f"input_type must be one of {', '.join(PROMPT_NAMES)}, not `{request.input_type}`"
            raise InputError(message, param="input_type")
        return next((prompts[name] for name in names if name in prompts), "")
    return prompts.get(spec.default_prompt or "", "")
