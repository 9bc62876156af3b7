"""The heads of cross-encoders and classifiers: their labels, and the activation that makes scores of logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from npu_proxy.errors import ModelError
from npu_proxy.graph.build import Family
from npu_proxy.graph.keys import size
from npu_proxy.models.json_files import Json
from npu_proxy.models.logit_score import read_head, read_template
from npu_proxy.models.model_files import ModelFiles
from npu_proxy.models.modules import ModuleStack
from npu_proxy.spec import Activation, ModelSpec
from npu_proxy.types import Pooling

_MOST_LABELS = 100_000


def with_classifier(spec: ModelSpec, family: Family | None, files: ModelFiles) -> ModelSpec:
    """Add the labels and the activation of a cross-encoder or classifier to the spec."""
    names = cast("Mapping[str, str]", files.config.get("id2label") or {})
    if not isinstance(files.config.content.get("id2label") or {}, dict) or set(names) != set(map(str, range(len(names)))):
        raise ModelError("config.json: `id2label` must have the numbers of the labels from 0 on as keys")
    count = len(names) or int(files.config.get("num_labels") or 2)
    if not 1 <= count <= _MOST_LABELS:
        raise ModelError(f"config.json: a classifier has from 1 to {_MOST_LABELS} labels, not {count}")
    if files.config.get("num_labels", count) not in (None, count):
        raise ModelError(f"config.json: `num_labels` is {files.config['num_labels']}, but `id2label` has {count} names")
    return replace(
        spec,
        pooling=family.classifier_pooling(spec.config) if family and not spec.refused else Pooling.CLS,
        width=count,
        hidden_width=count,
        labels=[str(names.get(str(index), f"LABEL_{index}")) for index in range(count)],
        activation=_activation(files, count),
        type_ids=spec.tokenizer.types and int(spec.config.get("type_vocab_size") or 0) > 1,
    )


def with_score_modules(spec: ModelSpec, files: ModelFiles) -> ModelSpec:
    """Add the modules of a cross-encoder that ends in a Dense module for its scores, or in yes and no (LogitScore)."""
    hidden = size("hidden_size")(spec.config)
    if files.module_types[1:] == ["LogitScore"]:
        return replace(
            spec,
            pooling=Pooling.LAST_TOKEN,
            modules=[read_head(spec, files.modules[1], files.reader, hidden)],
            pair_template=read_template(files.transformer, files.tokenizer_config, files.limits, spec),
            hidden_width=hidden,
            width=1,
            labels=["LABEL_0"],
            activation=_activation(files, 1),
            special_tokens=False,
            padding_id=None,
        )
    stack = ModuleStack(hidden, spec.vocabulary, files.reader)
    stack.add(files.modules[1:], spec.folder)
    if not stack.scores or stack.pooling is None:
        raise ModelError("modules.json: this CrossEncoder has no Pooling module, or no module that gives `scores`")
    return replace(
        spec,
        pooling=stack.pooling,
        modules=stack.final_modules(),
        token_modules=stack.token_modules,
        hidden_width=hidden,
        width=stack.width,
        labels=[f"LABEL_{index}" for index in range(stack.width)],
        activation=_activation(files, stack.width),
        type_ids=spec.tokenizer.types and int(spec.config.get("type_vocab_size") or 0) > 1,
    )


_ACTIVATIONS: Mapping[str, Activation] = {
    "Identity": "identity",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "ReLU": "relu",
    "Softplus": "softplus",
}
_TORCH = ("torch.nn", "torch.nn.modules.linear", "torch.nn.modules.activation")


def _activation(files: ModelFiles, count: int) -> Activation:
    """The activation that turns logits into scores.

    One label: what sentence-transformers stores, else sigmoid; a plain classifier for regression gives its logit. Several labels:
    sentence-transformers stores Identity, although users expect probabilities; so the problem type decides, as in transformers.
    """
    extra, problem = cast("Json", files.config.get("sentence_transformers") or {}), files.config.get("problem_type")
    default = files.config.get("sbert_ce_default_activation_function")
    stored: Any = (files.about.get("activation_fn") if files.modules else None) or extra.get("activation_fn") or default
    path, _, name = str(stored or "").rpartition(".")
    if stored and (name not in _ACTIVATIONS or path not in _TORCH):
        raise ModelError(
            f"the activation of scores is `{str(stored)[:60]}`; npu-proxy computes {', '.join(_ACTIVATIONS)} of torch.nn"
        )
    activation = _ACTIVATIONS.get(name)
    if count == 1:
        plain = activation is None and not files.modules and problem == "regression"
        return "identity" if plain else activation or "sigmoid"
    if activation not in (None, "identity"):
        return activation
    if problem not in (None, "regression", "single_label_classification", "multi_label_classification"):
        raise ModelError(f"config.json: `problem_type` is `{str(problem)[:40]}`, which is not a problem type of transformers")
    return "sigmoid" if problem == "multi_label_classification" else "identity" if problem == "regression" else "softmax"
