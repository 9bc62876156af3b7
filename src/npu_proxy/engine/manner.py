"""How the texts of a request are read: prompt, side, limit, chunks. Pure functions over a model's spec and a request."""

from __future__ import annotations

from dataclasses import dataclass, replace

from npu_proxy.errors import InputError
from npu_proxy.types import CHUNKING, Chunking, EmbedRequest, Kind, ModelSpec, Pooling, Truncate

_MEANINGS = {
    "query": ("query",),
    "document": ("document", "passage", "corpus"),
    "classification": ("classification", "Classification"),
    "clustering": ("clustering", "Clustering"),
}
"""Prompt names by input type, in the words of sentence-transformers and EmbeddingGemma; the first that a model has."""

_OVERLAP = 32
"""Tokens that neighbouring chunks share at most, unless a request says how many."""
_LATE = 256
"""Tokens of a late chunk, unless a request says how many."""
_LEAST, _MOST = 32, 30
"""Tokens of a late chunk at least, and how many of them a text has: ended at half their size, they still find room in a bin,
which takes a vector for eight positions, and 64 at most (devices/shapes.py)."""


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
    def late(self) -> bool:
        """Whether chunks are pooled apart in one text."""
        return self.truncate is Truncate.CHUNK and self.chunking.late

    @property
    def key(self) -> tuple[object, ...]:
        """Different for manners that give different answers; as it always was for the plain ones, which caches hold."""
        special = [] if self.document is None else [self.document]
        if self.truncate is Truncate.CHUNK:
            special += [self.chunking.overlap, self.chunking.sentences]
            special += [self.chunking.size, "late"] if self.chunking.late else []
        return (self.prompt, self.truncate, self.limit, *special)


def check_chunking(chunking: Chunking, spec: ModelSpec, limit: int, special: int) -> Chunking:
    """How long texts are chunked with nothing left open, for texts of ``limit`` tokens, ``special`` of them special.

    Raises InputError for what leaves nothing of a chunk, and for late chunks that the model or a row cannot have.
    """
    if chunking.size is not None and chunking.size < 1:
        raise InputError(f"chunks of {chunking.size} tokens are none; `size` is at least 1", param="size")
    if not chunking.late:
        room = min(limit, chunking.size or limit)
        overlap = min(_OVERLAP, room // 8) if chunking.overlap is None else chunking.overlap
        if not 0 <= overlap < room - special:
            raise InputError(f"an overlap of {overlap} tokens leaves nothing of chunks of {room}", param="overlap")
        return replace(chunking, overlap=overlap)
    if spec.kind is not Kind.DENSE or spec.pooling not in (Pooling.MEAN, Pooling.MAX):
        has = f"gives {spec.kind} answers, pooled by {spec.pooling}"
        message = f"late chunks are for vectors pooled by mean or maximum; {spec.name} {has}"
        raise InputError(message, param="late")
    if chunking.overlap:
        raise InputError("late chunks see the text around them, so they do not overlap; leave `overlap` out", param="overlap")
    size, least = chunking.size or _LATE, max(_LEAST, -(-limit // _MOST))
    if chunking.size is None:
        size = max(size, least)
    if size < least:
        raise InputError(f"late chunks of {size} tokens are too small; {spec.name} takes {least} at least", param="size")
    return replace(chunking, size=size, overlap=0)


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
