"""The format of /v1/embeddings, which OpenAI, Infinity, Jina, Mistral, NVIDIA, vLLM and Voyage share: their fields combined."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, ClassVar, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from npu_proxy.engine.finish import cast
from npu_proxy.engine.preparer import sanitized
from npu_proxy.engine.validation import check_output
from npu_proxy.errors import InputError
from npu_proxy.server.apis.common import Usage, float_vectors, json_vectors, usage, with_failures
from npu_proxy.server.apis.contract import JSON_BYTES, InferenceRoute, Refused, RequestBody, ServedModel
from npu_proxy.server.apis.inputs import (
    Inputs,
    TextPart,
    cut_of,
    input_type,
    only_one,
    text_inputs,
    texts_of,
    token_limit,
    unit_length,
)
from npu_proxy.types import Chunking, DType, EmbedRequest, EmbedResult, Truncate

_DTYPES = {
    "float": DType.FLOAT32,
    "float32": DType.FLOAT32,
    "float16": DType.FLOAT16,
    "base64": DType.FLOAT32,
    "int8": DType.INT8,
    "uint8": DType.UINT8,
    "binary": DType.BINARY,
    "ubinary": DType.UBINARY,
}
_JOIN = " "
"""What stands between texts that are read as one, for late chunking."""

VLLM_REFUSED: Mapping[str, Refused] = {
    "add_special_tokens": Refused("cannot be turned off", neutral=(True,)),
    "messages": Refused("is a chat, which needs a chat template; send texts as `input`"),
    "chat_template": Refused("is for chats; send texts as `input`"),
    "chat_template_kwargs": Refused("is for chats; send texts as `input`", neutral=({},)),
    "add_generation_prompt": Refused("is for chats; send texts as `input`", neutral=(False,)),
    "continue_final_message": Refused("is for chats; send texts as `input`", neutral=(False,)),
    "mm_processor_kwargs": Refused("is for images; this server takes only text", neutral=({},)),
    "media_io_kwargs": Refused("is for images; this server takes only text", neutral=({},)),
    "padding": Refused("would change the vectors of some models", neutral=("do_not_pad",)),
    "task": Refused("chooses another output; use the route for it", neutral=("embed",)),
    "activation": Refused("is the former name of `use_activation`; send that", neutral=(True,)),
    "softmax": Refused("is the former name of `use_activation`; send that", neutral=(True,)),
    "late_chunking_params": Refused("is for token vectors; `late_chunking` has one vector per text", neutral=({},)),
}
VLLM_HARMLESS: Mapping[str, str] = {
    "user": "who asks; not used",
    "priority": "the lane of the request, for all routes",
    "request_id": "a name for the request; send the header x-request-id",
    "cache_salt": "separates caches; set `cache_scope`",
}


class EmbeddingsBody(RequestBody, kw_only=True):
    """Body of POST /v1/embeddings.

    OpenAI: `input`, `dimensions`, `encoding_format`. Voyage and Mistral: `output_dimension`, `output_dtype`, `truncation`. Jina:
    `task`, `embedding_type`, `normalized`, `late_chunking`. NVIDIA: `input_type`, `embedding_type`, `truncate`. vLLM:
    `truncate_prompt_tokens`, `truncation_side`, `use_activation`, `embed_dtype`, `endianness`. llama.cpp: `embd_normalize`.
    npu-proxy: `prompt_name`, `prompt`, `normalize`, `on_error`. Two names of one thing may not contradict each other.
    """

    input: Inputs
    model: str | None = None
    dimensions: int | None = None
    output_dimension: int | None = None
    encoding_format: str | None = None
    embedding_type: str | list[str] | None = None
    encoding_type: str | list[str] | None = None
    output_dtype: str | None = None
    embed_dtype: str | None = None
    endianness: Literal["native", "little", "big"] | None = None
    input_type: str | None = None
    task: str | None = None
    prompt_name: str | None = None
    prompt: str | None = None
    truncate: bool | str | None = None
    truncation: bool | None = None
    truncation_side: Literal["left", "right"] | None = None
    truncate_prompt_tokens: int | None = None
    normalize: bool | None = None
    normalized: bool | None = None
    use_activation: bool | None = None
    embd_normalize: int | None = None
    late_chunking: bool | None = None

    refused: ClassVar[Mapping[str, Refused]] = {
        **{name: why for name, why in VLLM_REFUSED.items() if name != "task"},
        "modality": Refused("must be text", neutral=("text", ["text"])),
        "return_multivector": Refused("is not supported here; /embed_all has one vector per token", neutral=(False,)),
        "return_tokenized_input": Refused("is not supported; /tokenize has the tokens", neutral=(False,)),
        "instruction": Refused("is not supported; send all of the prompt as `prompt`"),
        "instruct": Refused("is not supported; send all of the prompt as `prompt`"),
    }
    harmless: ClassVar[Mapping[str, str]] = {
        **VLLM_HARMLESS,
        "metadata": "Mistral's notes about the request",
        "extra_body": "a wrapper that clients unfold",
        "timeout": "is sent as the header X-Request-Timeout, or in the query",
    }


class Embedding(msgspec.Struct, kw_only=True):
    """One vector: a list of numbers, base64 of its bytes (little-endian), or one of either per type, if several were asked for.

    It is null if the text failed and `on_error` is `null`.
    """

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float | int] | str | dict[str, list[float | int] | str] | None


class Embeddings(msgspec.Struct, kw_only=True):
    """Reply of POST /v1/embeddings."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage
    id: str
    created: int


def embeddings_route(path: str) -> InferenceRoute[EmbeddingsBody, Embeddings]:
    """Return a route for this format."""
    return InferenceRoute(
        path=path,
        summary="Embed texts",
        body=EmbeddingsBody,
        vectors=True,
        reply=Embeddings,
        to_requests=to_requests,
        to_reply=to_reply,
        applies=lambda fields, _: fields.has("input") or not fields.has("content"),  # which is llama.cpp's
    )


def to_requests(body: EmbeddingsBody, served: ServedModel) -> list[EmbedRequest]:
    """Build the request. Raises InputError, also for fields that contradict each other."""
    words, keyed = types_of(body)
    dtypes = {_DTYPES[word] for word in words}
    late = _late_texts(body) if body.late_chunking else []
    prompt_name, role = _prompt_of(body, served)
    request = EmbedRequest(
        texts=late or text_inputs(body.input, served, "input"),
        input_type=role,
        prompt_name=prompt_name,
        prompt=body.prompt,
        dimensions=dimensions_of(body.dimensions, body.output_dimension),
        normalize=_normalize_of(body),
        truncate=cut_of(body.truncate, body.truncation_side, truncation=body.truncation),
        max_tokens=token_limit(body.truncate_prompt_tokens),
        dtype=DType.FLOAT32 if late or keyed else _made_by_engine(body, *dtypes),
        most_numbers=most_numbers(served, len(words)) if len(words) > 1 else None,
    )
    if late or keyed:  # the reply is cast to these types later, so they are checked now
        for dtype in dtypes:
            check_output(replace(request, dtype=dtype), served.spec)
    return [late_request(request, late, served) if late else request]


def most_numbers(served: ServedModel, types: int) -> int:
    """Return how many numbers a result may have if the answer has them in so many types."""
    return int(served.settings.max_answer_mb * 1e6 / JSON_BYTES / types)


def _made_by_engine(body: EmbeddingsBody, dtype: DType) -> DType:
    """The type that the engine makes: base64 of float32 in the usual byte order, or numbers."""
    plain = dtype is DType.FLOAT32 and body.endianness != "big" and _in_base64(body)
    return DType.BASE64 if plain else dtype


def to_reply(results: Sequence[EmbedResult], body: EmbeddingsBody, served: ServedModel) -> Embeddings:
    """Return the vectors in the order of the texts, in exactly the requested form."""
    (result,) = results
    return Embeddings(
        data=[Embedding(index=index, embedding=vector) for index, vector in enumerate(_vectors(result, body))],
        model=served.requested_name,
        usage=usage(results),
        id=f"embd-{uuid.uuid4().hex}",
        created=int(time.time()),
    )


# -- parts of the body ---------------------------------------------------------------------------------------------------


def dimensions_of(dimensions: int | None, output_dimension: int | None, param: str = "output_dimension") -> int | None:
    """Return the number of dimensions; None for all of them, which 0 means, too (Infinity's client sends it)."""
    _, value = only_one(dimensions=dimensions, **{param: output_dimension})
    return value if isinstance(value, int) and value != 0 else None


def types_of(body: EmbeddingsBody) -> tuple[list[str], bool]:
    """Return the words of the types that a body asks for, and whether vectors have a key per type. Raises InputError."""
    _, kinds = only_one(embedding_type=body.embedding_type, encoding_type=body.encoding_type)  # type: ignore[arg-type]
    if isinstance(kinds, list):
        others = (body.encoding_format, body.output_dtype, body.embed_dtype)
        if any(word is not None and word.lower() not in ("float", "float32") for word in others):
            raise InputError("`embedding_type` is a list of types; send no other type", param="embedding_type")
        return list(dict.fromkeys(_known(word, "embedding_type") for word in kinds)) or ["float"], True
    if body.encoding_format is not None and body.encoding_format.lower() not in ("float", "base64"):
        message = f"`encoding_format` is `{body.encoding_format[:40]}`; it must be float or base64"
        raise InputError(message, param="encoding_format")
    kind = _known(kinds, "embedding_type") if isinstance(kinds, str) else None
    if kind == "base64" and (body.encoding_format or "base64").lower() != "base64":
        raise InputError("`embedding_type` is base64, but `encoding_format` is float; send one of them", param="encoding_format")
    output = None if body.output_dtype is None else _known(body.output_dtype, "output_dtype", _NUMBERS)
    half = body.embed_dtype is not None and _known(body.embed_dtype, "embed_dtype", ("float32", "float16")) == "float16"
    _, word = only_one(
        embedding_type=None if kind == "base64" else kind,
        output_dtype=output,
        embed_dtype="float16" if half and _in_base64(body) else None,  # a list of numbers has no such type
    )
    return [str(word or "float")], False


_NUMBERS = ("float", "int8", "uint8", "binary", "ubinary")
_FORMS = (*_NUMBERS, "base64")


def _known(word: str, param: str, known: Sequence[str] = _FORMS) -> str:
    if word.lower() not in known:
        raise InputError(f"`{param}` is `{word[:40]}`; it must be one of {', '.join(known)}", param=param)
    return word.lower()


def _in_base64(body: EmbeddingsBody) -> bool:
    kinds = (body.embedding_type, body.encoding_type, body.encoding_format)
    return any(isinstance(kind, str) and kind.lower() == "base64" for kind in kinds)


def _normalize_of(body: EmbeddingsBody) -> bool:
    fields = {"normalize": body.normalize, "normalized": body.normalized, "use_activation": body.use_activation}
    _, value = only_one(**fields, embd_normalize=unit_length(body.embd_normalize))
    return value is not False


def _prompt_of(body: EmbeddingsBody, served: ServedModel) -> tuple[str | None, str | None]:
    """Return the prompt's name, and the input type. A `task` is a prompt of the model, if it has one by that name."""
    if body.task is not None and body.prompt_name is None and body.task in served.spec.prompts:
        return body.task, None
    _, role = only_one(input_type=input_type(body.input_type), task=input_type(body.task, "task"))
    return body.prompt_name, role if isinstance(role, str) else None


def _late_texts(body: EmbeddingsBody) -> list[str]:
    """Return the texts that are read as one; none if there is only one. Raises InputError for token ids."""
    given = body.input
    if isinstance(given, list) and any(isinstance(item, int | list) for item in given):
        raise InputError("`late_chunking` needs texts, not token ids, as `input`", param="input")
    texts = texts_of([item for item in given if isinstance(item, str | TextPart)] if isinstance(given, list) else given, "input")
    return texts if len(texts) > 1 else []


# -- late chunking -------------------------------------------------------------------------------------------------------


def late_request(request: EmbedRequest, texts: Sequence[str], served: ServedModel) -> EmbedRequest:
    """Return a request that reads texts as one, so that the vector of each reflects the others (late chunking)."""
    texts = [sanitized(text, served.settings.sanitize) for text in texts]  # which may make them shorter
    ends = accumulate(len(text) + len(_JOIN) for text in texts[:-1])
    chunking = Chunking(late=True, spans=True, boundaries=tuple(ends))
    return replace(request, texts=[_JOIN.join(texts)], truncate=Truncate.CHUNK, chunking=chunking)


def late_vectors(result: EmbedResult) -> npt.NDArray[np.float32]:
    """Return one vector [texts, width] per text that was read together with the others."""
    (chunks,) = result.raise_first().chunks
    return np.stack([chunk.vector for chunk in chunks])


# -- vectors in the reply ------------------------------------------------------------------------------------------------


def _vectors(result: EmbedResult, body: EmbeddingsBody) -> list[Any]:
    """Return the vectors as JSON values, null for texts that failed."""
    words, keyed = types_of(body)
    late = bool(body.late_chunking and _late_texts(body))
    big = body.endianness == "big"
    if not keyed and not late:
        return encoded(json_vectors(result), in_base64=_in_base64(body), big=big)  # the engine has made the type
    floats = late_vectors(result) if late else float_vectors(result)
    by_type = {
        word: encoded(list(cast(floats, _DTYPES[word])), in_base64=word == "base64" or (not keyed and _in_base64(body)), big=big)
        for word in words
    }
    if not keyed:
        return by_type[words[0]]
    rows = [{word: rows[index] for word, rows in by_type.items()} for index in range(len(floats))]
    return rows if late else with_failures(rows, result)


def encoded(rows: Sequence[Any], *, in_base64: bool, big: bool = False) -> list[Any]:
    """Return vectors as JSON values: arrays, or base64 of their bytes, little-endian unless ``big``."""
    if not in_base64:
        return list(rows)
    order = ">" if big else "<"
    return [
        base64.b64encode(row.astype(row.dtype.newbyteorder(order)).tobytes()).decode() if isinstance(row, np.ndarray) else row
        for row in rows
    ]
