"""Reads a model folder into a ModelSpec: the sentence-transformers layout, or a plain Hugging Face folder.

Everything comes from the model's own files, and nothing in them is passed over (unread.py). Missing or contradictory information
raises a ModelError that names the file. Nothing is guessed, because a wrong pooling gives wrong vectors without an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

from npu_proxy.errors import ModelError, model_errors
from npu_proxy.graph import static
from npu_proxy.graph.build import FAMILIES, tensor_name
from npu_proxy.graph.keys import read_keys, size
from npu_proxy.models.added_tokens import with_markers
from npu_proxy.models.classifier import with_classifier, with_score_modules
from npu_proxy.models.fingerprint import fingerprint
from npu_proxy.models.graph_files import find_weights, has_graph_file, normalize_config
from npu_proxy.models.instructions import instruction_template
from npu_proxy.models.json_files import MOST_TOKENS, Json, read_flag
from npu_proxy.models.late_interaction import LateInteractionFiles, late_interaction_config, read_pylate, read_stanford
from npu_proxy.models.lora import adapter_files
from npu_proxy.models.model_files import ModelFiles, check_code, max_length, missing, read_files
from npu_proxy.models.modules import ModuleStack, read_dense
from npu_proxy.models.router import query_weights
from npu_proxy.models.static_files import read_stored_tokenizer, with_static_rules
from npu_proxy.models.tokenizer_config import read_tokenizer
from npu_proxy.models.weights import Tensors
from npu_proxy.spec import ModelSpec, TruncateModule
from npu_proxy.types import OutputType, Pooling, Similarity

_STANFORD = "linear."
"""The projection of Stanford's ColBERT, which is among the weights of the transformer."""
_SENTENCE_BERT = "sentence_bert_config.json"
_CLS_AFTER_PROMPT = 6
"""The first major version of sentence-transformers whose CLS pooling reads the first token after a prompt that is not pooled."""
_BGE_M3 = ("sparse_linear.pt", "colbert_linear.pt")
_SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


def read_spec(
    folder: Path,
    *,
    name: str | None = None,
    pooling: Pooling | None = None,
    max_length: int | None = None,
    accept_unread: Sequence[str] = (),
) -> ModelSpec:
    """Read the model in ``folder``.

    pooling: required if the folder does not define it; an error if it contradicts the folder; `none` gives token vectors.
    max_length: maximum number of tokens per text, if less than the model's own limit. accept_unread: patterns of keys and tensors
    that may be unread. Raises ModelError for anything missing, contradictory, unread or not supported, naming the file.
    """
    if not folder.is_dir():
        raise ModelError(f"model folder `{folder}` does not exist")
    with model_errors(name or folder.resolve().name):
        return _read_spec(folder, name or folder.resolve().name, pooling, max_length, accept_unread)


def _read_spec(folder: Path, name: str, pooling: Pooling | None, limit: int | None, accept: Sequence[str]) -> ModelSpec:
    pooling = None if pooling is None else Pooling(pooling)
    files = read_files(folder, accept)
    model_type = str(files.config.get("model_type") or missing(files.transformer / "config.json", "model_type"))
    family = FAMILIES.get(model_type)
    graph = has_graph_file(folder)
    weights, refused = find_weights(files.base, model_type, graph=graph)
    weights = [*weights, *adapter_files(files.transformer)]
    try:
        with model_errors("config.json"):
            check_code(files)
            config = read_keys(family.KEYS, files.config) if family else normalize_config(files.config.content)
    except ModelError as error:  # a graph file may compute what the family does not
        if not graph:
            raise
        config, refused = normalize_config(files.config.content), refused or str(error)
    spec = _transformer_spec(files, config, model_type, name, pooling, limit)
    spec = replace(spec, weight_files=weights, refused=refused)
    if spec.family in static.MODEL_TYPES:
        spec = with_static_rules(spec, files, limit)
    if spec.output_type is OutputType.SCORES and files.scores_by_modules:
        spec = with_score_modules(spec, files)
    elif spec.output_type is OutputType.SCORES:
        spec = with_classifier(spec, family, files)
    else:
        spec = _with_modules(spec, files, pooling, limit)
    _check_model_type(spec, files)
    beside = ("tokenizer_config.json", _SENTENCE_BERT) if spec.family in static.MODEL_TYPES else ()
    files.reader.refuse_unread(ignored=("config.json", *beside))
    if family is not None and not refused:
        try:
            files.reader.refuse_unread(only="config.json")
        except ModelError as error:  # a graph file contains what it says
            if not graph:
                raise
            spec = replace(spec, refused=str(error))
    spec = replace(spec, accept_unread=tuple(accept), accepted=_accepted(spec, files))
    return replace(spec, fingerprint=fingerprint(spec))


_CLASSES: Mapping[OutputType, Sequence[str]] = {
    OutputType.DENSE: ("SentenceTransformer",),
    OutputType.SPARSE: ("SparseEncoder",),
    OutputType.TOKENS: ("MultiVectorEncoder", "ColBERT", "SentenceTransformer"),
    OutputType.MULTI: ("SentenceTransformer",),
    OutputType.SCORES: ("CrossEncoder",),
}
"""The classes of sentence-transformers that make these outputs, as `model_type` names them."""


def _check_model_type(spec: ModelSpec, files: ModelFiles) -> None:
    """Raise ModelError if another class wrote the folder: sentence-transformers then takes other modules than the stored ones."""
    stated = files.about.content.get("model_type", "SentenceTransformer")
    needed = "model_type" in files.about or (spec.output_type is OutputType.SPARSE and bool(files.about))
    if needed and stated not in _CLASSES[spec.output_type]:
        expected = " or ".join(_CLASSES[spec.output_type])
        found = f"`model_type` is `{str(stated)[:40]}`, but the modules are those of {expected}"
        raise ModelError(f"config_sentence_transformers.json: {found}")


def _accepted(spec: ModelSpec, files: ModelFiles) -> Sequence[str]:
    """The patterns of `accept_unread` that this model needs, or that match one of its tensors."""
    accept = files.reader.accept
    names = Tensors(spec.weight_files, tensor_name(spec.family)) if accept and not spec.refused else ()
    tensors = {pattern for pattern in accept if any(fnmatchcase(name, pattern) for name in names)}
    return sorted(files.reader.accepted | tensors)


def output_type_of(folder: Path, pooling: Pooling | None) -> tuple[OutputType, Path, Json]:
    """A model's output type, and its transformer's folder and config.json, for any family. Raises ModelError."""
    with model_errors(folder.resolve().name):
        files = read_files(folder)
        return _output_type(files, pooling), files.transformer, files.config.content


def _transformer_spec(
    files: ModelFiles, config: Json, model_type: str, name: str, pooling: Pooling | None, limit: int | None
) -> ModelSpec:
    """The spec of the transformer; weights, pooling, modules and fingerprint are filled in later."""
    output_type, about = _output_type(files, pooling), files.about
    own_limit = max_length(config, files)
    lower = read_flag(files.limits, "do_lower_case", _SENTENCE_BERT)
    if model_type in static.MODEL_TYPES:
        tokenizer = read_stored_tokenizer(files.transformer)
    else:
        tokenizer = read_tokenizer(files.transformer, files.tokenizer_config, files.config, files.reader, lower=lower)
    padding = files.config.get("pad_token_id")
    similarity = about.get("similarity_fn_name")
    usual: Similarity = "dot" if output_type is OutputType.SPARSE else "cosine"
    spec = ModelSpec(
        name=name,
        folder=files.folder,
        family=model_type,
        config=config,
        stored_config=files.config.content,
        weight_files=(),
        tokenizer=tokenizer,
        pooling=Pooling.MEAN,
        modules=(),
        width=0,
        max_length=min(own_limit, limit or own_limit),
        vocabulary=size("vocab_size")(config),
        normalizes=False,
        lower_case=lower,
        prompts=_prompts(about),
        default_prompt=about.get("default_prompt_name"),
        fingerprint="",
        output_type=output_type,
        # sentence-transformers ignores names that it does not know.
        similarity=similarity if similarity in _SIMILARITIES else usual,
        special_tokens=model_type != "model2vec",
        padding_id=padding if isinstance(padding, int) else None,
        adapter_scale=files.adapter_scale,
        matryoshka=_matryoshka(files.config),
    )
    if spec.default_prompt is not None and spec.default_prompt not in spec.prompts:
        raise ModelError(
            f"config_sentence_transformers.json: default_prompt_name `{spec.default_prompt}` is not one of the prompts"
        )
    return replace(spec, instruction=instruction_template(spec))


def _prompts(about: Json) -> Mapping[str, str]:
    stored: Any = about.get("prompts") or {}
    if not isinstance(stored, Mapping):
        raise ModelError(f"config_sentence_transformers.json: `prompts` is `{str(stored)[:40]}`, not texts by name")
    prompts = dict(cast("Mapping[str, Any]", stored))
    wrong = next((key for key, text in prompts.items() if not isinstance(text, str | None)), None)
    if wrong is not None:
        raise ModelError(f"config_sentence_transformers.json: the prompt `{wrong}` in `prompts` is not a text")
    return {key: text or "" for key, text in prompts.items()}


def _matryoshka(config: Json) -> Sequence[int]:
    listed: Any = config.get("matryoshka_dimensions") or ()
    return tuple(listed) if isinstance(listed, list) and all(type(size) is int for size in listed) else ()


def _output_type(files: ModelFiles, pooling: Pooling | None) -> OutputType:
    """The model's output type according to its files."""
    types, task = files.module_types, files.limits.get("transformer_task")
    if "LogitScore" in types and not files.scores_by_modules:
        raise ModelError("modules.json has a LogitScore module, but config_sentence_transformers.json names no CrossEncoder")
    plain_classifier = not files.modules and files.architecture.endswith("ForSequenceClassification") and pooling is None
    if task == "sequence-classification" or plain_classifier or files.scores_by_modules:
        return OutputType.SCORES
    if "MultiVectorMask" in types or files.is_late or files.architecture == "HF_ColBERT":
        return OutputType.TOKENS
    if "SpladePooling" in types or pooling is Pooling.SPLADE:
        return OutputType.SPARSE
    return OutputType.TOKENS if pooling is Pooling.NONE else OutputType.DENSE


# -- what follows the transformer ----------------------------------------------------------------------------------------


def _with_modules(spec: ModelSpec, files: ModelFiles, pooling: Pooling | None, limit: int | None) -> ModelSpec:
    """Add pooling, modules and late interaction to the spec."""
    hidden = int(spec.config.get("projected_size") or size("hidden_size")(spec.config))
    stack, late = _read_stack(spec, files, hidden)
    pooling = _pooling(spec, stack, pooling, has_modules=bool(files.modules))
    spec = replace(
        spec,
        pooling=pooling,
        modules=stack.final_modules(),
        splade=stack.splade,
        token_modules=() if late or pooling is Pooling.NONE else stack.token_modules,
        hidden_width=hidden,
        width=spec.vocabulary if pooling is Pooling.SPLADE else stack.width,
        normalizes=stack.normalizes or spec.normalizes,
        include_prompt=stack.include_prompt or (pooling is Pooling.CLS and files.major_version < _CLS_AFTER_PROMPT),
    )
    if files.query_folder is not None:
        if pooling is not Pooling.SPLADE:
            raise ModelError("router_config.json: a table of weights for queries needs a SPLADE model for documents")
        return replace(
            spec,
            query_weights=query_weights(
                spec, files.query_folder, files.tokenizer_config, files.reader, default=files.query_default
            ),
        )
    if late is not None:
        return _with_late_interaction(spec, late, spec.max_length, limit)
    if spec.output_type is OutputType.TOKENS and all((spec.folder / file).is_file() for file in _BGE_M3):
        return _with_multi_output(spec, hidden)
    if spec.output_type is OutputType.TOKENS:  # a dense model without its pooling
        return replace(spec, modules=stack.token_modules, width=stack.token_width)
    return _truncated(spec, files.about.get("truncate_dim"))


def _truncated(spec: ModelSpec, width: Any) -> ModelSpec:
    """The spec with vectors cut to `truncate_dim`, as sentence-transformers cuts them after all modules."""
    if width is None or spec.output_type is not OutputType.DENSE:
        return spec
    if type(width) is not int or width < 1:
        raise ModelError(f"config_sentence_transformers.json: `truncate_dim` is `{str(width)[:40]}`, not a number of at least 1")
    if width >= spec.width:
        return spec
    return replace(spec, modules=[*spec.modules, TruncateModule(width=width)], width=width)


def _read_stack(spec: ModelSpec, files: ModelFiles, hidden: int) -> tuple[ModuleStack, LateInteractionFiles | None]:
    """The modules after the transformer, and the additional files of late-interaction models."""
    tokens = spec.output_type is OutputType.TOKENS
    stack = ModuleStack(hidden, spec.vocabulary, files.reader, late=files.is_late)
    if (tokens and (spec.folder / "artifact.metadata").exists()) or files.architecture == "HF_ColBERT":
        dense = read_dense(Tensors(spec.weight_files), _STANFORD)
        stack.token_modules.append(dense)
        stack.width = dense.shape[0]
        return stack, read_stanford(files.reader.object(spec.folder / "artifact.metadata", optional=True))
    if not files.modules:
        return stack, None
    if spec.family in static.MODEL_TYPES:
        stack.pooling = Pooling.MEAN
    stack.add(files.modules[1:], spec.folder)
    if stack.scores:
        raise ModelError("modules.json: a module gives `scores`, but config_sentence_transformers.json names no CrossEncoder")
    is_late = tokens and stack.pooling in (None, Pooling.NONE)
    return stack, read_pylate(files.about, files.limits, stack.mask) if is_late else None


def _with_late_interaction(spec: ModelSpec, late: LateInteractionFiles, own: int, limit: int | None) -> ModelSpec:
    """Add queries and documents to the spec. own: the limit of texts without a length of their own. limit: the setting's."""
    # These lengths count instead of the tokenizer's limit, not besides it.
    stated = [length for length in (late.query_length, late.document_length, late.expanded_length) if length]
    most = min(max([spec.max_length, *stated]), size("max_position_embeddings")(spec.config), limit or MOST_TOKENS)
    spec = replace(spec, max_length=max(most, spec.max_length))
    stanford = [f"{_STANFORD}weight"] if late.by_stanford else []
    spec = replace(
        spec,
        module_tensors=stanford,
        tokenizer=with_markers(spec.tokenizer, late.markers),
        normalizes=spec.normalizes or late.normalizes,
    )
    config = late_interaction_config(late, (own, spec.max_length), spec.tokenizer, spec.vocabulary)
    return replace(
        spec,
        output_type=OutputType.TOKENS,
        pooling=Pooling.NONE,
        late_interaction=config,
        prompts={**spec.prompts, **late.prompts},
    )


def _with_multi_output(spec: ModelSpec, hidden: int) -> ModelSpec:
    """The spec of bge-m3: dense, sparse and token vectors in one pass."""
    lexical, projection = (read_dense(Tensors([spec.folder / file]), "") for file in _BGE_M3)
    if projection.shape != (hidden, hidden) or lexical.shape != (1, hidden):
        raise ModelError(f"{_BGE_M3[1]}: the projection has shape {projection.shape}; only {hidden} to {hidden} is supported")
    return replace(spec, output_type=OutputType.MULTI, modules=[lexical, projection], width=hidden)


def _pooling(spec: ModelSpec, stack: ModuleStack, setting: Pooling | None, *, has_modules: bool) -> Pooling:
    """The pooling in the files, or the setting if they define none. Raises ModelError if both are missing or contradictory."""
    if spec.family in static.MODEL_TYPES:
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
