"""Checks before any work is done: whether a request is valid, and whether the model supports it. Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from npu_proxy.engine.inputs import as_text
from npu_proxy.errors import AnswerTooLargeError, EmptyInputError, FingerprintError, InputError, UnsupportedError
from npu_proxy.spec import ModelSpec
from npu_proxy.types import DType, EmbedRequest, OutputType, TextInput

OnEmpty = Literal["error", "placeholder", "embed"]

_PART = 1_000_000
"""Characters that are checked at once."""
PLACEHOLDER = "[EMPTY]"
"""The text embedded in place of an empty one if ``on_empty`` is `placeholder`."""


# -- texts ---------------------------------------------------------------------------------------------------------------


def check_texts(texts: Sequence[TextInput]) -> None:
    """Raise InputError if an item is not a text, EmptyInputError if there are no texts."""
    if not texts:
        raise EmptyInputError("there are no texts to embed", param="input")
    for index, text in enumerate(texts):
        if type(text) is not str:
            as_text(text, index)


def text_error(text: str) -> InputError | None:
    """The error of a single text that is no valid Unicode; None if it is valid."""
    try:
        for start in range(0, len(text), _PART):  # in parts, so that other threads get their turn
            text[start : start + _PART].encode()
    except UnicodeEncodeError:
        message = "the text contains a lone surrogate, which is not a Unicode character; sanitize=`basic` removes it"
        return InputError(message, param="input")
    return None


def empty_text_error(text: str) -> EmptyInputError:
    """The error of a text that has no tokens but special ones."""
    what = "is empty" if not text else "has no tokens: it consists of spaces or of characters that the tokenizer ignores"
    hint = "remove it, or set `on_empty` to `placeholder` to embed `[EMPTY]`, or to `embed` to embed the special tokens alone"
    return EmptyInputError(f"the text {what}; {hint}", param="input")


def token_ids_error(ids: Sequence[int], vocabulary: int) -> InputError | None:
    """The error of token ids sent in place of a text; None if they are valid."""
    if not ids:
        return EmptyInputError("the list of token ids is empty", param="input")
    invalid = next((number for number in ids if not 0 <= number < vocabulary), None)
    if invalid is None:
        return None
    message = (
        f"token id {invalid} is outside this model's vocabulary of {vocabulary}; ids of another tokenizer"
        " (langchain-openai sends cl100k ids unless check_embedding_ctx_length=False) have no meaning here: send text"
    )
    return InputError(message, param="input")


# -- options -------------------------------------------------------------------------------------------------------------


def check_options(options: Mapping[str, object], known: Collection[str]) -> None:
    """Raise InputError if an option is not in ``known``, since it would have no effect."""
    for name in options:
        if name not in known:
            raise InputError(f"unknown option `{name}`; valid options: {', '.join(known)}", param=name)


def check_top_n(top_n: int | None) -> None:
    """Raise InputError if the number of results is below 1."""
    if top_n is not None and top_n < 1:
        raise InputError(f"top_n must be at least 1, not {top_n}", param="top_n")


def check_ranking(query: str, documents: Sequence[str], top_n: int | None, *, empty_query: bool = False) -> None:
    """Raise InputError unless there is a query, and a list of documents. empty_query: accept an empty query."""
    check_top_n(top_n)
    if not query and not empty_query:
        raise EmptyInputError("the query is empty", param="query")
    if isinstance(documents, str):
        raise InputError("documents must be a list of texts; put a single document in a list", param="documents")
    if not documents:
        raise EmptyInputError("there are no documents to rank", param="documents")


def check_output(request: EmbedRequest, spec: ModelSpec) -> None:
    """Raise InputError if the model is another than expected, lacks the output type, or cannot give the dimensions or dtype."""
    expected = request.expect_fingerprint
    if expected is not None and expected != spec.fingerprint:
        message = f"{spec.name} has the fingerprint {spec.fingerprint}, but the request expects {expected[:40]}"
        hint = "vectors of the two must not be mixed; embed the texts again, or serve the model, precision and prompts as before"
        raise FingerprintError(f"{message}: {hint}", param="expect_fingerprint")
    output_type = request.output_type
    if output_type not in spec.output_types:
        raise UnsupportedError(_unsupported(spec, output_type), param="model")
    dimensions, width = request.dimensions, spec.width
    if output_type in (OutputType.SPARSE, OutputType.SCORES):
        if dimensions is not None or request.dtype is not DType.FLOAT32:
            raise InputError(f"{output_type} output is always float32, and its dimensions cannot be chosen", param="dimensions")
        return
    if output_type is OutputType.TOKENS and request.dtype not in (DType.FLOAT32, DType.FLOAT16):
        raise InputError(f"token vectors are float32 or float16, not {request.dtype}", param="dtype")
    if dimensions is not None and not 1 <= dimensions <= width:
        raise InputError(f"dimensions must be between 1 and {width} for this model, not {dimensions}", param="dimensions")
    bits = dimensions or width
    if request.dtype in (DType.BINARY, DType.UBINARY) and bits % 8:
        raise InputError(f"{request.dtype} needs a width divisible by 8, not {bits}", param="dimensions")
    if request.dtype in (DType.INT8, DType.UINT8) and not request.normalize:
        raise InputError(f"{request.dtype} has a fixed scale for unit vectors; it needs normalize=true", param="normalize")


def check_numbers(request: EmbedRequest, spec: ModelSpec) -> None:
    """Raise AnswerTooLargeError if one vector per text is more than the request allows; other results are counted as they come."""
    most, known = request.most_numbers, request.output_type in (OutputType.DENSE, OutputType.SCORES)
    if most is not None and known and len(request.texts) * (request.dimensions or spec.width) > most:
        raise AnswerTooLargeError(most)


def cuts_untrained(spec: ModelSpec, request: EmbedRequest) -> bool:
    """Whether a request cuts dense vectors of a model that, as far as is known, was not trained for it (Matryoshka)."""
    cut = request.output_type is OutputType.DENSE and request.dimensions not in (None, spec.width)
    return cut and not spec.matryoshka


# -- models --------------------------------------------------------------------------------------------------------------

_COMPUTES = {
    OutputType.DENSE: "computes one vector per text",
    OutputType.SPARSE: "computes sparse vectors",
    OutputType.TOKENS: "computes one vector per token",
    OutputType.SCORES: "scores texts (it ranks or classifies)",
    OutputType.MULTI: "computes dense, sparse and token vectors",
}
_REQUESTED = {
    OutputType.DENSE: "dense vectors",
    OutputType.SPARSE: "sparse vectors",
    OutputType.TOKENS: "token vectors",
    OutputType.SCORES: "scores",
}
_HINTS = {
    OutputType.TOKENS: " (a dense model has token vectors if `pooling` is `none`)",
    OutputType.SPARSE: " (bge-m3 has sparse vectors if `pooling` is `none`)",
}


def _unsupported(spec: ModelSpec, output_type: OutputType) -> str:
    hint = _HINTS.get(output_type, "") if spec.output_type is OutputType.DENSE else ""
    return f"{spec.name} {_COMPUTES[spec.output_type]}; it has no head for {_REQUESTED.get(output_type, output_type)}{hint}"


def can_rerank(spec: ModelSpec) -> bool:
    """Whether a model can rank: cross-encoders with one or two labels, and late-interaction models."""
    is_cross_encoder = spec.output_type is OutputType.SCORES and len(spec.labels) <= 2
    return OutputType.TOKENS in spec.output_types or is_cross_encoder


def can_classify(spec: ModelSpec) -> bool:
    """Whether a model is primarily a classifier; a model with a single label is a reranker."""
    return spec.output_type is OutputType.SCORES and len(spec.labels) > 1


def check_reranker(spec: ModelSpec) -> None:
    """Raise UnsupportedError if a model has more than two labels, since these are not a measure of relevance."""
    if len(spec.labels) > 2:
        names = ", ".join(spec.labels[:5])
        message = f"{spec.name} is a classifier with {len(spec.labels)} labels ({names}); it cannot rank"
        raise UnsupportedError(message, param="model")


def check_classifier(spec: ModelSpec) -> None:
    """Raise UnsupportedError if a model has no classification head."""
    if spec.output_type is not OutputType.SCORES:
        message = f"{spec.name} has no head for classification; set `model` to a sequence classification model"
        raise UnsupportedError(message, param="model")
