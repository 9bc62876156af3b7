"""Reads a model folder into a ModelSpec: the sentence-transformers layout, or a plain Hugging Face folder.

Everything comes from the model's own files. Missing or contradictory information raises a ModelError that names the file.
Nothing is guessed, because a wrong pooling gives wrong vectors without an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

from npu_proxy.errors import ModelError, model_errors
from npu_proxy.graph.build import FAMILIES, Family
from npu_proxy.models.catalog import INSTRUCTIONS
from npu_proxy.models.fingerprint import fingerprint
from npu_proxy.models.graph_files import find_weights, has_graph_file, normalize_config
from npu_proxy.models.json_files import Json, existing
from npu_proxy.models.late_interaction import LateInteractionFiles, late_interaction_config, read_pylate, read_stanford
from npu_proxy.models.model_files import ModelFiles, max_length, missing, number, read_files
from npu_proxy.models.modules import ModuleStack, read_dense, skipped_ids
from npu_proxy.models.weights import Tensors
from npu_proxy.spec import Activation, ModelSpec
from npu_proxy.types import OutputType, Pooling, Similarity

_MOST_LABELS = 100_000
_BGE_M3 = ("sparse_linear.pt", "colbert_linear.pt")


def read_spec(folder: Path, *, name: str | None = None, pooling: Pooling | None = None, max_length: int | None = None) -> ModelSpec:
    """Read the model in ``folder``.

    pooling: required if the folder does not define it; an error if it contradicts the folder; `none` gives token vectors.
    max_length: maximum number of tokens per text, if less than the model's own limit.
    Raises ModelError for anything missing, contradictory or not supported, naming the file.
    """
    if not folder.is_dir():
        raise ModelError(f"model folder `{folder}` does not exist")
    with model_errors(name or folder.resolve().name):
        return _read_spec(folder, name, pooling, max_length)


def _read_spec(folder: Path, name: str | None, pooling: Pooling | None, max_length: int | None) -> ModelSpec:
    pooling = None if pooling is None else Pooling(pooling)
    files = read_files(folder)
    model_type = str(files.config.get("model_type") or missing(files.transformer / "config.json", "model_type"))
    family = FAMILIES.get(model_type)
    config = family.normalize_config(files.config) if family else normalize_config(files.config)
    spec = _transformer_spec(files, config, model_type, name or folder.resolve().name, pooling, max_length)
    if spec.output_type is OutputType.SCORES:
        spec = _with_classifier(spec, config, family, files)
    else:
        spec = _with_modules(spec, config, files, pooling)
    return replace(spec, fingerprint=fingerprint(spec))


def output_type_of(folder: Path, pooling: Pooling | None) -> tuple[OutputType, Path, Json]:
    """A model's output type, and its transformer's folder and config.json, for any family. Raises ModelError."""
    with model_errors(folder.resolve().name):
        files = read_files(folder)
        return _output_type(files, pooling), files.transformer, files.config


def _transformer_spec(
    files: ModelFiles, config: Json, model_type: str, name: str, pooling: Pooling | None, limit: int | None
) -> ModelSpec:
    """The spec of the transformer; pooling, modules and fingerprint are filled in later."""
    weights, refused = find_weights(files.transformer, model_type, files.config, graph=has_graph_file(files.folder))
    output_type, about = _output_type(files, pooling), files.about
    own_limit = max_length(config, files)
    spec = ModelSpec(
        name=name,
        folder=files.folder,
        family=model_type,
        config=files.config,
        weight_files=weights,
        refused=refused,
        tokenizer_file=existing(files.transformer / "tokenizer.json", "npu-proxy supports only fast tokenizers"),
        pooling=Pooling.MEAN,
        dense=(),
        width=0,
        max_length=min(own_limit, limit or own_limit),
        vocabulary=number(config, "vocab_size", files.transformer),
        normalizes=False,
        lower_case=bool(files.limits.get("do_lower_case", False)),
        prompts=cast("dict[str, str]", {key: text or "" for key, text in (about.get("prompts") or {}).items()}),
        default_prompt=about.get("default_prompt_name"),
        fingerprint="",
        output_type=output_type,
        similarity=cast("Similarity", about.get("similarity_fn_name") or "cosine"),
        special_tokens=model_type != "model2vec",
    )
    if spec.default_prompt is not None and spec.default_prompt not in spec.prompts:
        raise ModelError(
            f"config_sentence_transformers.json: default_prompt_name `{spec.default_prompt}` is not one of the prompts"
        )
    return replace(spec, instruction=instruction_template(spec))


def _output_type(files: ModelFiles, pooling: Pooling | None) -> OutputType:
    """The model's output type according to its files."""
    types, about = files.module_types, files.about
    if "LogitScore" in types:
        raise ModelError("modules.json: rerankers with a chat template and yes or no as output (LogitScore) are not supported")
    plain_classifier = not files.modules and files.architecture.endswith("ForSequenceClassification") and pooling is None
    if files.limits.get("transformer_task") == "sequence-classification" or plain_classifier:
        return OutputType.SCORES
    if (
        "MultiVectorMask" in types
        or about.get("model_type") in ("ColBERT", "MultiVectorEncoder")
        or files.architecture == "HF_ColBERT"
        or any("pylate" in str(module["type"]) for module in files.modules)
    ):
        return OutputType.TOKENS
    if "SpladePooling" in types or pooling is Pooling.SPLADE:
        return OutputType.SPARSE
    return OutputType.TOKENS if pooling is Pooling.NONE else OutputType.DENSE


# -- what follows the transformer ----------------------------------------------------------------------------------------


def _with_modules(spec: ModelSpec, config: Json, files: ModelFiles, pooling: Pooling | None) -> ModelSpec:
    """Add pooling, Dense modules and late interaction to the spec."""
    hidden = number(config, "hidden_size", spec.folder)
    stack, late = _read_stack(spec, files, hidden)
    pooling = _pooling(spec, stack, pooling, static=not spec.special_tokens, has_modules=bool(files.modules))
    sparse_default = spec.output_type is OutputType.SPARSE and not files.about.get("similarity_fn_name")
    spec = replace(
        spec,
        pooling=pooling,
        dense=stack.dense,
        width=spec.vocabulary if pooling is Pooling.SPLADE else stack.width,
        normalizes=stack.normalizes,
        include_prompt=stack.include_prompt,
        similarity="dot" if sparse_default else spec.similarity,
    )
    if late is not None:
        return _with_late_interaction(spec, late)
    if spec.output_type is OutputType.TOKENS and all((spec.folder / file).is_file() for file in _BGE_M3):
        return _with_multi_output(spec, hidden)
    if spec.output_type is OutputType.TOKENS:  # a dense model without its pooling
        return replace(spec, dense=(), width=hidden)
    return spec


def _read_stack(spec: ModelSpec, files: ModelFiles, hidden: int) -> tuple[ModuleStack, LateInteractionFiles | None]:
    """The modules after the transformer, and the additional files of late-interaction models."""
    stack = ModuleStack(hidden, spec.vocabulary)
    tokens = spec.output_type is OutputType.TOKENS
    if (tokens and (spec.folder / "artifact.metadata").exists()) or files.architecture == "HF_ColBERT":
        stack.dense = [read_dense(Tensors(spec.weight_files), "linear.")]
        stack.width = stack.dense[0].shape[0]
        return stack, read_stanford(spec.folder)
    if not files.modules:
        return stack, None
    stack.add(files.modules[1:], spec.folder)
    is_late = tokens and stack.pooling in (None, Pooling.NONE)
    return stack, read_pylate(files.about, files.limits, stack.mask) if is_late else None


def _with_late_interaction(spec: ModelSpec, late: LateInteractionFiles) -> ModelSpec:
    config = late_interaction_config(late, spec.max_length, spec.tokenizer_file)
    skip_ids, query_skip_ids = (skipped_ids(late.mask, side, spec.tokenizer_file) for side in ("document", "query"))
    return replace(
        spec,
        output_type=OutputType.TOKENS,
        pooling=Pooling.NONE,
        late_interaction=replace(config, skip_ids=skip_ids, query_skip_ids=query_skip_ids),
        prompts={**spec.prompts, **late.prompts},
    )


def _with_multi_output(spec: ModelSpec, hidden: int) -> ModelSpec:
    """The spec of bge-m3: dense, sparse and token vectors in one pass."""
    lexical, projection = (read_dense(Tensors([spec.folder / file]), "") for file in _BGE_M3)
    if projection.shape != (hidden, hidden) or lexical.shape != (1, hidden):
        raise ModelError(f"{_BGE_M3[1]}: the projection has shape {projection.shape}; only {hidden} to {hidden} is supported")
    return replace(spec, output_type=OutputType.MULTI, dense=[lexical, projection], width=hidden)


def _pooling(spec: ModelSpec, stack: ModuleStack, setting: Pooling | None, *, static: bool, has_modules: bool) -> Pooling:
    """The pooling in the files, or the setting if they define none. Raises ModelError if both are missing or contradictory."""
    if static:
        return Pooling.MEAN
    stated = Pooling.NONE if spec.output_type is OutputType.TOKENS else stack.pooling
    if stated is None and setting is None:
        if has_modules:
            raise ModelError("modules.json: there is no Pooling module")
        raise ModelError(
            f"{spec.folder.name}: modules.json is missing, so the model's pooling is unknown; "
            f"set `pooling` to one of {', '.join(Pooling)} (see the model card)"
        )
    if stated is not None and setting not in (None, stated):
        raise ModelError(f"modules.json has pooling `{stated}`, but the setting `pooling` is `{setting}`; leave it unset")
    return stated or setting or Pooling.MEAN


def _with_classifier(spec: ModelSpec, config: Json, family: Family | None, files: ModelFiles) -> ModelSpec:
    """Add the labels and the activation of a cross-encoder or classifier to the spec."""
    names = cast("Mapping[str, str]", config.get("id2label") or {})
    count = len(names) or int(config.get("num_labels") or 2)
    if not 1 <= count <= _MOST_LABELS:
        raise ModelError(f"config.json: a classifier has from 1 to {_MOST_LABELS} labels, not {count}")
    extra = cast("Json", config.get("sentence_transformers") or {})
    stored = files.about.get("activation_fn") or extra.get("activation_fn") or config.get("sbert_ce_default_activation_function")
    return replace(
        spec,
        pooling=family.classifier_pooling(config) if family else Pooling.CLS,
        width=count,
        labels=[str(names.get(str(index), f"LABEL_{index}")) for index in range(count)],
        activation=_activation(count, str(stored or "").rsplit(".", 1)[-1], config.get("problem_type")),
        type_ids=int(config.get("type_vocab_size") or 0) > 1,
    )


def _activation(count: int, stored: str, problem: str | None) -> Activation:
    """The activation that turns logits into scores. stored: the class name stored by sentence-transformers, or "".

    sentence-transformers stores Identity for models with several labels, although users expect probabilities; for those, the
    problem type decides.
    """
    if count == 1:
        return "identity" if stored == "Identity" else "sigmoid"
    if stored == "Sigmoid" or problem == "multi_label_classification":
        return "sigmoid"
    return "identity" if problem == "regression" else "softmax"


def instruction_template(spec: ModelSpec) -> str:
    """The template that turns a task into a prompt: from the catalog, or derived from the model's own prompts."""
    template = INSTRUCTIONS.get(spec.name.lower())
    if template:
        return template
    for prompt in spec.prompts.values():
        head, newline, rest = prompt.partition("\n")
        if head.startswith("Instruct: ") and newline and rest.startswith("Query:"):
            return "Instruct: {task}\n" + rest
        if head.startswith("task: ") and "|" in head and prompt.endswith("query: "):  # EmbeddingGemma
            return "task: {task} | query: "
    return ""
