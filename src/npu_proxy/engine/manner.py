"""How the texts of a request are read: prompt, side, limit, chunks. Pure functions over a model's spec and a request."""

from __future__ import annotations

from dataclasses import dataclass

from npu_proxy.errors import InputError
from npu_proxy.types import CHUNKING, Chunking, EmbedRequest, ModelSpec, Truncate

_MEANINGS = {
    "query": ("query",),
    "document": ("document", "passage", "corpus"),
    "classification": ("classification", "Classification"),
    "clustering": ("clustering", "Clustering"),
}
"""Prompt names by input type, in the words of sentence-transformers and EmbeddingGemma; the first that a model has."""


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How the texts of one request are read: all that decides which tokens a text becomes.

    prompt: stands before each text (before the first of a pair). prompted: its tokens, where they are not pooled, else 0.
    document: which side of a late-interaction model, None for the others. limit: tokens of a text, special ones included.
    """

    prompt: str = ""
    prompted: int = 0
    document: bool | None = None
    truncate: Truncate = Truncate.END
    limit: int
    chunking: Chunking = CHUNKING

    @property
    def key(self) -> tuple[object, ...]:
        """Different for manners that give different answers; as it always was for the plain ones, which caches hold."""
        special = [] if self.document is None else [self.document]
        if self.truncate is Truncate.CHUNK:
            special += [self.chunking.overlap, self.chunking.sentences]
        return (self.prompt, self.truncate, self.limit, *special)


def prompt_of(spec: ModelSpec, request: EmbedRequest) -> str:
    """The text put before each text of a request; raises InputError for a prompt the model does not have."""
    prompts = spec.prompts
    given = [name for name in ("prompt", "prompt_name", "instruction") if getattr(request, name) is not None]
    if len(given) > 1:
        raise InputError(f"`{given[0]}` and `{given[1]}` both say what stands before a text; give one", param=given[1])
    if request.prompt is not None:
        return request.prompt
    if request.prompt_name is not None:
        if request.prompt_name not in prompts:
            known = ", ".join(sorted(prompts)) or "none"
            message = f"the model has no prompt `{request.prompt_name}`; its prompts: {known}"
            raise InputError(message, param="prompt_name")
        return prompts[request.prompt_name]
    if request.instruction is not None:
        if not spec.instruction:
            message = f"{spec.name} takes no instructions; give the whole prompt as `prompt` where it should have one"
            raise InputError(message, param="instruction")
        return spec.instruction.replace("{task}", request.instruction)
    if request.input_type is not None:
        names = _MEANINGS.get(request.input_type)
        if names is None:
            message = f"input_type must be one of {', '.join(_MEANINGS)}, not `{request.input_type}`"
            raise InputError(message, param="input_type")
        return next((prompts[name] for name in names if name in prompts), "")
    return prompts.get(spec.default_prompt or "", "")
