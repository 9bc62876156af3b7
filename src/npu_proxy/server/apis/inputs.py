"""The inputs of a body: one text, several texts, or token ids in one of the vocabularies that clients use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.errors import EmptyInputError, InputError
from npu_proxy.server.apis.contract import ServedModel
from npu_proxy.types import TextInput

_OPENAI_PREFIX = "text-embedding-"
"""Prefix of the names of OpenAI's models, whose clients send token ids of cl100k_base."""
_EXAMINED = 32
"""How many lists are tokenized again to determine the vocabulary of their ids."""
_ENOUGH_IDS = 8
"""Number of ids that suffices to tell the model's own from another vocabulary's; fewer are mistaken in one case in seven
(docs/adr/0009)."""


def text_inputs(given: str | Sequence[str | int | list[int]], served: ServedModel, param: str) -> list[TextInput]:
    """Return one text, several texts, token ids, or lists of token ids, but not a mixture. Raises InputError naming ``param``."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise EmptyInputError(f"`{param}` is empty; send at least one text.", param=param)
    kinds = {type(item) for item in given}
    if len(kinds) > 1:
        raise InputError(f"`{param}` mixes texts and token ids; send one or the other.", param=param)
    (kind,) = kinds
    if kind is str:
        return [item for item in given if isinstance(item, str)]
    if kind is int:
        return _token_lists([[item for item in given if isinstance(item, int)]], served)
    return _token_lists([item for item in given if isinstance(item, list)], served)


def _token_lists(lists: list[list[int]], served: ServedModel) -> list[TextInput]:
    """Return token ids of the model's own vocabulary, or the text of cl100k_base ids, depending on the setting `token_ids`."""
    how = served.settings.token_ids
    if how == "reject":
        raise InputError("this server does not accept token ids (setting `token_ids`); send text.", param="input")
    limit = served.settings.max_client_batch
    if len(lists) > limit:
        raise InputError(f"the request has {len(lists)} texts; at most {limit} are allowed (`max_client_batch`)")
    if not all(lists):
        raise EmptyInputError("a list of token ids is empty; send at least one id.", param="input")
    if how == "auto":
        how = "cl100k" if served.requested_name.startswith(_OPENAI_PREFIX) else _vocabulary_of(lists, served.tokenizer)
    if how == "model":
        return list(lists)
    decoder = served.cl100k()
    return [decoder.decode(ids) for ids in lists]


def _vocabulary_of(lists: list[list[int]], tokenizer: RequestTokenizer) -> Literal["model", "cl100k"]:
    """Determine the vocabulary of the ids. Raises InputError if unclear: a wrong guess would give wrong vectors silently."""
    if not all(map(tokenizer.owns, lists[:_EXAMINED])) or not all(0 <= max(ids) < tokenizer.vocabulary for ids in lists):
        return "cl100k"
    if max(map(len, lists)) >= _ENOUGH_IDS:
        return "model"
    raise InputError(
        "there are too few token ids to tell whether they are this model's or cl100k_base's, which langchain-openai sends"
        " (check_embedding_ctx_length=False makes it send text); send text, or set `token_ids` to `model` or `cl100k`",
        param="input",
    )
