"""What models' documentation says but their files may not: instructions for queries and documents, Matryoshka dimensions.

A model is one row, or a few models with the same documentation. What a model's files contain takes precedence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from npu_proxy.spec import ModelSpec

_SENTENCE = "Represent this sentence for searching relevant passages: "
_SENTENCE_ZH = "为这个句子生成表示以用于检索相关文章："  # noqa: RUF001 (a fullwidth colon, and no space)
_SEARCH = "Given a web search query, retrieve relevant passages that answer the query"


@dataclass(frozen=True, kw_only=True)
class Documentation:
    """query, document: put before each; "" for none. dimensions: those that the model was trained for. source: where it says so."""

    query: str = ""
    document: str = ""
    dimensions: Sequence[int] = ()
    source: str


def _card(name: str) -> str:
    return f"https://huggingface.co/{name}"


_E5 = Documentation(query="query: ", document="passage: ", source=_card("intfloat/e5-base-v2"))
_E5_INSTRUCT = Documentation(query=f"Instruct: {_SEARCH}\nQuery: ", source=_card("intfloat/multilingual-e5-large-instruct"))
_BGE_EN = Documentation(query=_SENTENCE, source="https://github.com/FlagOpen/FlagEmbedding")
_BGE_ZH = Documentation(query=_SENTENCE_ZH, source="https://github.com/FlagOpen/FlagEmbedding")
_ARCTIC = Documentation(query=_SENTENCE, source="https://github.com/Snowflake-Labs/arctic-embed")
_INSTRUCTOR = Documentation(
    query="Represent the Wikipedia question for retrieving supporting documents: ",
    document="Represent the Wikipedia document for retrieval: ",
    source=_card("hkunlp/instructor-large"),
)
_STATIC_MRL = (1024, 512, 256, 128, 64, 32)
_STATIC = "https://huggingface.co/blog/static-embeddings"


def _nomic(name: str, dimensions: Sequence[int] = ()) -> Documentation:
    return Documentation(query="search_query: ", document="search_document: ", dimensions=dimensions, source=_card(name))


def _qwen3(size: str, width: int) -> Documentation:
    # Unlike the instruct models of e5, there is no space after `Query:`.
    source = _card(f"Qwen/Qwen3-Embedding-{size}")
    return Documentation(query=f"Instruct: {_SEARCH}\nQuery:", dimensions=range(32, width + 1), source=source)


DOCUMENTED: Mapping[str, Documentation] = {
    **{f"intfloat/e5-{size}{version}": _E5 for size in ("small", "base", "large") for version in ("", "-v2")},
    **{f"intfloat/multilingual-e5-{size}": _E5 for size in ("small", "base", "large")},
    "intfloat/multilingual-e5-large-instruct": _E5_INSTRUCT,
    "intfloat/e5-mistral-7b-instruct": _E5_INSTRUCT,
    **{f"baai/bge-{size}-en{version}": _BGE_EN for size in ("small", "base", "large") for version in ("", "-v1.5")},
    **{f"baai/bge-{size}-zh{version}": _BGE_ZH for size in ("small", "base", "large") for version in ("", "-v1.5")},
    "nomic-ai/nomic-embed-text-v1": _nomic("nomic-ai/nomic-embed-text-v1"),
    "nomic-ai/nomic-embed-text-v1.5": _nomic("nomic-ai/nomic-embed-text-v1.5", (768, 512, 256, 128, 64)),
    "nomic-ai/nomic-embed-text-v2-moe": _nomic("nomic-ai/nomic-embed-text-v2-moe", (768, 256)),
    "nomic-ai/modernbert-embed-base": _nomic("nomic-ai/modernbert-embed-base", (768, 256)),
    "lightonai/modernbert-embed-large": _nomic("lightonai/modernbert-embed-large", (1024, 256)),
    "alibaba-nlp/gte-multilingual-base": Documentation(
        dimensions=range(128, 769), source=_card("Alibaba-NLP/gte-multilingual-base")
    ),
    "qwen/qwen3-embedding-0.6b": _qwen3("0.6B", 1024),
    "qwen/qwen3-embedding-4b": _qwen3("4B", 2560),
    "qwen/qwen3-embedding-8b": _qwen3("8B", 4096),
    "google/embeddinggemma-300m": Documentation(
        query="task: search result | query: ",
        document="title: none | text: ",
        dimensions=(768, 512, 256, 128),
        source=_card("google/embeddinggemma-300m"),
    ),
    "mixedbread-ai/mxbai-embed-large-v1": Documentation(
        query=_SENTENCE, dimensions=range(1, 1025), source=_card("mixedbread-ai/mxbai-embed-large-v1")
    ),
    "mixedbread-ai/mxbai-embed-xsmall-v1": Documentation(
        dimensions=range(1, 385), source="https://mixedbread.ai/blog/mxbai-embed-xsmall-v1"
    ),
    **{f"snowflake/snowflake-arctic-embed-{size}": _ARCTIC for size in ("xs", "s", "m", "m-long", "l")},
    "snowflake/snowflake-arctic-embed-m-v1.5": Documentation(
        query=_SENTENCE, dimensions=(768, 256), source=_card("Snowflake/snowflake-arctic-embed-m-v1.5")
    ),
    "snowflake/snowflake-arctic-embed-m-v2.0": Documentation(
        query="query: ", dimensions=(768, 256), source=_card("Snowflake/snowflake-arctic-embed-m-v2.0")
    ),
    "snowflake/snowflake-arctic-embed-l-v2.0": Documentation(
        query="query: ", dimensions=(1024, 256), source=_card("Snowflake/snowflake-arctic-embed-l-v2.0")
    ),
    **{f"hkunlp/instructor-{size}": _INSTRUCTOR for size in ("base", "large", "xl")},
    "whereisai/uae-large-v1": Documentation(query=_SENTENCE, source="https://github.com/SeanLee97/AnglE"),
    "sentence-transformers/static-retrieval-mrl-en-v1": Documentation(dimensions=_STATIC_MRL, source=_STATIC),
    "sentence-transformers/static-similarity-mrl-multilingual-v1": Documentation(dimensions=_STATIC_MRL, source=_STATIC),
    "ibm-granite/granite-embedding-311m-multilingual-r2": Documentation(
        dimensions=(768, 512, 384, 256, 128), source=_card("ibm-granite/granite-embedding-311m-multilingual-r2")
    ),
    "tomaarsen/mpnet-base-nli-matryoshka": Documentation(
        dimensions=(768, 512, 256, 128, 64), source="https://huggingface.co/blog/matryoshka"
    ),
}
"""By full name in lower case."""

_TEMPLATES: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "intfloat/multilingual-e5-large-instruct",
            "intfloat/e5-mistral-7b-instruct",
            "alibaba-nlp/gte-qwen2-1.5b-instruct",
            "alibaba-nlp/gte-qwen2-7b-instruct",
        ),
        "Instruct: {task}\nQuery: ",
    ),
}
"""Instruction templates of models whose files do not contain one, by full name in lower case."""


def instruction_template(spec: ModelSpec) -> str:
    """The template that turns a task into a prompt: from its documentation, or derived from the model's own prompts."""
    template = _TEMPLATES.get(spec.name.lower())
    if template:
        return template
    for prompt in spec.prompts.values():
        head, newline, rest = prompt.partition("\n")
        if head.startswith("Instruct: ") and newline and rest.startswith("Query:"):
            return "Instruct: {task}\n" + rest
        if head.startswith("task: ") and "|" in head and prompt.endswith("query: "):  # EmbeddingGemma
            return "task: {task} | query: "
    return ""
