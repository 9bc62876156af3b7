"""Reads a model folder into a ModelSpec: the sentence-transformers layout, or a plain Hugging Face folder.

Everything comes from the model's own files. What is missing or contradictory is a ModelError that names the file;
nothing is guessed, because a wrong pooling gives wrong vectors without an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from npu_proxy.errors import ModelError
from npu_proxy.graph.build import FAMILIES, Family
from npu_proxy.models.catalog import INSTRUCTIONS
from npu_proxy.models.fingerprint import fingerprint
from npu_proxy.models.foreign import has_graph, translated, weights_of
from npu_proxy.models.jsons import Json, existing, inside, read, read_object, where
from npu_proxy.models.late import Late, pylate, sides_of, stanford
from npu_proxy.models.modules import Stack, read_dense, skipped
from npu_proxy.models.weights import Tensors, weight_files
from npu_proxy.types import Activation, Kind, ModelSpec, Pooling, Similarity

_FIRST = ("Transformer", "MLMTransformer", "StaticEmbedding")
_STATIC_TOKENS = 512
"""Tokens of a text that static models read; their own code stops there as well."""
_BGE_M3 = ("sparse_linear.pt", "colbert_linear.pt")


def read_spec(folder: Path, *, name: str | None = None, pooling: Pooling | None = None, max_length: int = 0) -> ModelSpec:
    """Read the model in ``folder``.

    pooling: required for a folder that does not say it, refused where it contradicts one; `none` gives token vectors.
    max_length: tokens of a text where that is less than the model's own limit, 0 for that.
    Raises ModelError for whatever is missing, contradictory or not supported, naming the file.
    """
    if not folder.is_dir():
        raise ModelError(f"model folder `{folder}` does not exist")
    pooling = None if pooling is None else Pooling(pooling)
    modules, transformer, limits, about, raw = _files(folder)
    model_type = str(raw.get("model_type") or _missing(transformer / "config.json", "model_type"))
    weights, refused = weights_of(transformer, model_type, raw, graph=has_graph(folder))
    found = FAMILIES.get(model_type)
    config = found.standard(raw) if found else translated(raw)
    kind = _kind(raw, limits, about, modules, pooling)
    prompts = cast("dict[str, str]", {key: text or "" for key, text in (about.get("prompts") or {}).items()})
    spec = ModelSpec(
        name=name or folder.resolve().name,
        folder=folder,
        family=model_type,
        config=raw,
        weight_files=weights,
        refused=refused,
        tokenizer_file=existing(transformer / "tokenizer.json", "npu-proxy reads the fast tokenizer only"),
        pooling=Pooling.MEAN,
        dense=(),
        width=0,
        max_length=min(own_length := _max_length(config, limits, transformer), max_length or own_length),
        vocabulary=_number(config, "vocab_size", transformer),
        normalizes=False,
        lower_case=bool(limits.get("do_lower_case", False)),
        prompts=prompts,
        default_prompt=about.get("default_prompt_name"),
        fingerprint="",
        kind=kind,
        similarity=cast("Similarity", about.get("similarity_fn_name") or "cosine"),
        special_tokens=model_type != "model2vec",
    )
    if spec.default_prompt is not None and spec.default_prompt not in spec.prompts:
        raise ModelError(f"config_sentence_transformers.json: default_prompt_name `{spec.default_prompt}` is not among the prompts")
    spec = replace(spec, instruction=_instruction(spec))
    spec = _with_head(spec, config, found, modules, about, limits, pooling)
    return replace(spec, fingerprint=fingerprint(spec))


def _files(folder: Path) -> tuple[Sequence[Json], Path, Json, Json, Json]:
    """Modules, the transformer's folder, its limits, what sentence-transformers says of the model, and config.json."""
    modules = _modules(folder)
    transformer = inside(folder, str(modules[0]["path"])) if modules else folder
    limits = read_object(transformer / "sentence_bert_config.json", optional=True)
    about = read_object(folder / "config_sentence_transformers.json", optional=True)
    return modules, transformer, limits, about, _config(folder, transformer, modules)


def kind_of(folder: Path, pooling: Pooling | None) -> tuple[Kind, Path, Json]:
    """What a model gives, its transformer's folder and config.json, of any family. Raises ModelError."""
    modules, transformer, limits, about, raw = _files(folder)
    return _kind(raw, limits, about, modules, pooling), transformer, raw


def _kind(raw: Json, limits: Json, about: Json, modules: Sequence[Json], pooling: Pooling | None) -> Kind:
    """What the files say that the model gives."""
    types = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
    architecture = str((raw.get("architectures") or [""])[0])
    if "LogitScore" in types:
        raise ModelError("modules.json: rerankers that answer yes or no through a chat template (LogitScore) are not supported")
    if limits.get("transformer_task") == "sequence-classification" or (
        not modules and architecture.endswith("ForSequenceClassification") and pooling is None
    ):
        return Kind.SCORES
    late = (
        "MultiVectorMask" in types or about.get("model_type") in ("ColBERT", "MultiVectorEncoder") or architecture == "HF_ColBERT"
    )
    if late or any("pylate" in str(module["type"]) for module in modules):
        return Kind.TOKENS
    if "SpladePooling" in types or pooling is Pooling.SPLADE:
        return Kind.SPARSE
    return Kind.TOKENS if pooling is Pooling.NONE else Kind.DENSE


def _with_head(
    spec: ModelSpec, config: Json, found: Family | None, modules: Sequence[Json], about: Json, limits: Json, pooling: Pooling | None
) -> ModelSpec:
    """The spec with what stands on the transformer."""
    if spec.kind is Kind.SCORES:
        return _classifier(spec, config, found, about)
    hidden = _number(config, "hidden_size", spec.folder)
    stack = Stack(hidden, spec.vocabulary)
    late: Late | None = None
    if (spec.kind is Kind.TOKENS and (spec.folder / "artifact.metadata").exists()) or _architecture(spec) == "HF_ColBERT":
        stack.dense = [read_dense(Tensors(spec.weight_files), "linear.")]
        stack.width = stack.dense[0].weight.shape[0]
        late = stanford(spec.folder)
    elif modules:
        stack.add(modules[1:], spec.folder)
        late = pylate(about, limits, stack.skip) if spec.kind is Kind.TOKENS and stack.pooling in (None, Pooling.NONE) else None
    chosen = _chosen(spec, stack, pooling, static=not spec.special_tokens, given=bool(modules))
    spec = replace(
        spec,
        pooling=chosen,
        dense=stack.dense,
        width=spec.vocabulary if chosen is Pooling.SPLADE else stack.width,
        normalizes=stack.normalizes,
        include_prompt=stack.include_prompt,
        similarity="dot" if spec.kind is Kind.SPARSE and not about.get("similarity_fn_name") else spec.similarity,
    )
    if late is not None:
        sides = sides_of(late, spec.max_length, spec.tokenizer_file)
        skip, query_skip = (skipped(late.mask, side, spec.tokenizer_file) for side in ("document", "query"))
        sides = replace(sides, skip=skip, query_skip=query_skip)
        return replace(spec, kind=Kind.TOKENS, pooling=Pooling.NONE, sides=sides, prompts={**spec.prompts, **late.prompts})
    if spec.kind is Kind.TOKENS and all((spec.folder / file).is_file() for file in _BGE_M3):
        lexical, projection = (read_dense(Tensors([spec.folder / file]), "") for file in _BGE_M3)
        if projection.weight.shape != (hidden, hidden) or lexical.weight.shape != (1, hidden):
            raise ModelError(f"{_BGE_M3[1]}: the projection is {projection.weight.shape}; only {hidden} to {hidden} is supported")
        return replace(spec, kind=Kind.MULTI, dense=[lexical, projection], width=hidden)
    if spec.kind is Kind.TOKENS:  # a dense model before pooling
        return replace(spec, dense=(), width=hidden)
    return spec


def _chosen(spec: ModelSpec, stack: Stack, pooling: Pooling | None, *, static: bool, given: bool) -> Pooling:
    """The pooling that the files say, or the setting where they do not. Raises ModelError."""
    if static:
        return Pooling.MEAN
    said = Pooling.NONE if spec.kind is Kind.TOKENS else stack.pooling
    if said is None and pooling is None:
        if given:
            raise ModelError("modules.json: there is no Pooling module")
        raise ModelError(
            f"{spec.folder.name}: there is no modules.json, so nothing says how the model pools; "
            f"set `pooling` to one of {', '.join(Pooling)} (the model's card names it)"
        )
    if said is not None and pooling not in (None, said):
        raise ModelError(f"modules.json says pooling `{said}`, the setting `pooling` says `{pooling}`; leave it unset")
    return said or pooling or Pooling.MEAN


def _classifier(spec: ModelSpec, config: Json, found: Family | None, about: Json) -> ModelSpec:
    """A cross-encoder or classifier: labels, and what turns logits into scores."""
    names = cast("Mapping[str, str]", config.get("id2label") or {})
    count = len(names) or int(config.get("num_labels") or 2)
    labels = [str(names.get(str(number), f"LABEL_{number}")) for number in range(count)]
    own = cast("Json", config.get("sentence_transformers") or {})
    stored = about.get("activation_fn") or own.get("activation_fn") or config.get("sbert_ce_default_activation_function")
    return replace(
        spec,
        pooling=found.scores_pooling(config) if found else Pooling.CLS,
        width=count,
        labels=labels,
        activation=_activation(count, str(stored or "").rsplit(".", 1)[-1], config.get("problem_type")),
        types=int(config.get("type_vocab_size") or 0) > 1,
    )


def _activation(count: int, stored: str, problem: str | None) -> Activation:
    """What makes scores of logits. stored: the class that sentence-transformers wrote down, "" where it did not.

    It writes Identity for several labels, whose shares people want all the same; there the problem's type decides.
    """
    if count == 1:
        return "identity" if stored == "Identity" else "sigmoid"
    if stored == "Sigmoid" or problem == "multi_label_classification":
        return "sigmoid"
    return "identity" if problem == "regression" else "softmax"


def _instruction(spec: ModelSpec) -> str:
    """How a task becomes a prompt: as the catalog has it, or as a prompt of the model's own shows."""
    known = INSTRUCTIONS.get(spec.name.lower())
    if known:
        return known
    for prompt in spec.prompts.values():
        head, mark, rest = prompt.partition("\n")
        if head.startswith("Instruct: ") and mark and rest.startswith("Query:"):
            return "Instruct: {task}\n" + rest
        if head.startswith("task: ") and "|" in head and prompt.endswith("query: "):  # EmbeddingGemma
            return "task: {task} | query: "
    return ""


def _config(folder: Path, transformer: Path, modules: Sequence[Json]) -> Json:
    """config.json; for static models, which may have none, what it would say."""
    static = bool(modules) and str(modules[0]["type"]).endswith(".StaticEmbedding")
    file = transformer / "config.json"
    raw = read_object(file, optional=static)
    if static or raw.get("model_type") == "model2vec":
        tensors = Tensors(weight_files(transformer))
        table = tensors["embedding.weight" if "embedding.weight" in tensors else "embeddings"]
        vocabulary = len(tensors["mapping"]) if "mapping" in tensors else len(table)
        return {
            **raw,
            "model_type": "model2vec",
            "hidden_size": table.shape[1],
            "vocab_size": vocabulary,
            "max_position_embeddings": _STATIC_TOKENS,
        }
    return raw or read_object(folder / "config.json")


def _modules(folder: Path) -> Sequence[Json]:
    file = folder / "modules.json"
    if not file.exists():
        return ()
    modules = read(file)
    if not isinstance(modules, list) or not modules:
        raise ModelError("modules.json: a list of modules is expected")
    listed = cast("list[Any]", modules)
    for module in listed:
        if not isinstance(module, dict) or not {"type", "path"} <= set(cast("Json", module)):
            raise ModelError("modules.json: each module needs `type` and `path`")
    listed = [module for _, module in sorted(enumerate(listed), key=lambda one: one[1].get("idx", one[0]))]
    if str(listed[0]["type"]).rsplit(".", 1)[-1] not in _FIRST:
        raise ModelError(f"modules.json: the first module is `{listed[0]['type']}`, only {' or '.join(_FIRST)} is supported")
    return listed


def _max_length(config: Json, limits: Json, folder: Path) -> int:
    """The model's own limit: sentence_bert_config.json, else the tokenizer's, never beyond its positions."""
    positions = _number(config, "max_position_embeddings", folder)
    stated = limits.get("max_seq_length")
    if stated is None:
        stated = read_object(folder / "tokenizer_config.json", optional=True).get("model_max_length", positions)
    return max(1, min(int(stated), positions))


def _architecture(spec: ModelSpec) -> str:
    return str((spec.config.get("architectures") or [""])[0])


def _number(config: Json, key: str, folder: Path) -> int:
    value = config.get(key)
    return value if isinstance(value, int) else _missing(folder / "config.json", key)


def _missing(file: Path, key: str) -> Any:
    raise ModelError(f"{where(file)}: `{key}` is missing")
