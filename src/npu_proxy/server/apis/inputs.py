"""What bodies of all APIs contain: texts in several forms, token ids, and how long texts are cut, in each API's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.errors import EmptyInputError, InputError
from npu_proxy.server.apis.contract import ServedModel
from npu_proxy.types import TextInput, Truncate

_OPENAI_PREFIX = "text-embedding-"
"""Prefix of the names of OpenAI's models, whose clients send token ids of cl100k_base."""
_EXAMINED = 32
"""How many lists are tokenized again to determine the vocabulary of their ids."""
_ENOUGH_IDS = 8
"""Number of ids that suffices to tell the model's own from another vocabulary's; fewer are mistaken in one case in seven
(docs/adr/0009)."""


_INPUT_TYPES = {
    "query": "query search_query retrieval_query code_query code_retrieval_query nl2code_query qa_query question_answering"
    " fact_verification",
    "document": "document passage search_document retrieval_document retrieval_passage code_passage nl2code_passage"
    " qa_passage corpus",
    "classification": "classification",
    "clustering": "clustering separation",
    None: "none text_matching semantic_similarity task_type_unspecified",
}
_INPUT_TYPE_OF = {word: name for name, words in _INPUT_TYPES.items() for word in words.split()}
_CUTS = {
    "false": Truncate.ERROR,
    "none": Truncate.ERROR,
    "error": Truncate.ERROR,
    "chunk": Truncate.CHUNK,
    "true": Truncate.END,
    "end": Truncate.END,
    "start": Truncate.START,
}


# -- texts ---------------------------------------------------------------------------------------------------------------


class TextPart(msgspec.Struct, kw_only=True):
    """A text in an object: `{"text": ...}`, a content part `{"type": "text", ...}`, or `{"content": [...]}` of such parts."""

    text: str | None = None
    type: str | None = None
    content: str | list[TextPart] | None = None
    image: Any = None
    image_url: Any = None


Text = str | TextPart
Inputs = str | TextPart | list[str | int | list[int] | TextPart]
"""One text or several, token ids or lists of them."""


def text_of(given: Text, param: str) -> str:
    """Return the text of an object; the texts of several parts are joined by line feeds. Raises InputError for other parts."""
    if isinstance(given, str):
        return given
    if given.type not in (None, "text", "input_text"):
        raise InputError(f"`{param}` has a part of type `{given.type[:40]}`; this server takes only text", param=param)
    if given.image is not None or given.image_url is not None or (given.text is not None and given.content is not None):
        raise InputError(f"`{param}` has an object with more than a text; this server takes only text", param=param)
    if isinstance(given.content, str):
        return given.content
    if given.content is not None:
        if any(part.content is not None for part in given.content):
            raise InputError(f"`{param}` has parts within parts; send texts", param=param)
        return "\n".join(text_of(part, param) for part in given.content)
    if given.text is None:
        raise InputError(f"`{param}` has an object without `text`; send texts", param=param)
    return given.text


def texts_of(given: Text | Sequence[Text], param: str) -> list[str]:
    """Return one text or several. Raises EmptyInputError for an empty list."""
    if isinstance(given, str | TextPart):
        return [text_of(given, param)]
    if not given:
        raise EmptyInputError(f"`{param}` is empty; send at least one text", param=param)
    return [text_of(item, param) for item in given]


def text_inputs(given: Inputs, served: ServedModel, param: str) -> list[TextInput]:
    """Return one text, several texts, token ids, or lists of token ids, but not a mixture. Raises InputError naming ``param``."""
    if isinstance(given, str | TextPart):
        return [text_of(given, param)]
    if not given:
        raise EmptyInputError(f"`{param}` is empty; send at least one text.", param=param)
    kinds = {type(item) for item in given}
    if kinds <= {str, TextPart}:
        return [text_of(item, param) for item in given if isinstance(item, str | TextPart)]
    if len(kinds) > 1:
        raise InputError(f"`{param}` mixes texts and token ids; send one or the other.", param=param)
    (kind,) = kinds
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


# -- options -------------------------------------------------------------------------------------------------------------


def input_type(given: str | None, param: str = "input_type") -> str | None:
    """Return the input type that the word of any API means (`search_query`, `passage`, `RETRIEVAL_DOCUMENT`, ...); None for none.

    Raises InputError for another word.
    """
    if not given:
        return None
    word = given.lower().replace(".", "_").replace("-", "_")
    if word not in _INPUT_TYPE_OF:
        known = "query, document, classification, clustering (or the words of Cohere, Gemini, Jina, NVIDIA and Voyage)"
        raise InputError(f"`{param}` is `{given[:40]}`; it must be one of {known}", param=param)
    return _INPUT_TYPE_OF[word]


def cut_of(
    truncate: bool | str | None = None, side: str | None = None, *, truncation: bool | None = None, param: str = "truncate"
) -> Truncate:
    """Return how long texts are cut: `truncate` as a boolean or a word, `truncation` (Voyage), and the side (vLLM, TEI).

    The default is their end. Raises InputError for an unknown word, or for words that contradict each other.
    """
    word = str(truncate).lower()
    if truncate is not None and word not in _CUTS:
        known = "true, false, error, end, start, chunk (or NONE, END, START)"
        raise InputError(f"`{param}` is `{word[:40]}`; it must be one of {known}", param=param)
    cut = Truncate.END if truncate is None else _CUTS[word]
    if truncation is False:
        if truncate is not None and cut is not Truncate.ERROR:
            raise InputError(f"`{param}` and `truncation` contradict each other; send one of them", param="truncation")
        cut = Truncate.ERROR
    if side is not None and side.lower() not in ("left", "right"):
        raise InputError(f"the side of truncation is `{side[:40]}`; it must be left or right", param="truncation_side")
    return Truncate.START if cut is Truncate.END and (side or "").lower() == "left" else cut


def token_limit(tokens: int | None, param: str = "truncate_prompt_tokens") -> int | None:
    """Return a limit on tokens per text; None for -1, which means the model's own. Raises InputError for 0 and below -1."""
    if tokens is not None and tokens < 1 and tokens != -1:
        raise InputError(f"`{param}` is {tokens}; it must be at least 1, or -1 for the model's own limit", param=param)
    return None if tokens == -1 else tokens


def unit_length(embd_normalize: int | None) -> bool | None:
    """Return whether llama.cpp's `embd_normalize` asks for vectors of length 1; None if it is missing. Raises InputError."""
    if embd_normalize not in (None, -1, 2):
        message = f"`embd_normalize` is {embd_normalize}; it must be 2 (unit length) or -1 (as the model computes them)"
        raise InputError(message, param="embd_normalize")
    return None if embd_normalize is None else embd_normalize == 2


def only_one(**given: int | str | bool | None) -> tuple[str, object]:
    """Return the name and the value of the only field that is set, of several that mean the same; None if there is none.

    Raises InputError if two have different values.
    """
    chosen = [(name, value) for name, value in given.items() if value is not None]
    for name, value in chosen[1:]:
        if value != chosen[0][1]:
            raise InputError(f"`{chosen[0][0]}` is {chosen[0][1]}, but `{name}` is {value}; send one of them", param=name)
    return chosen[0] if chosen else (next(iter(given)), None)
