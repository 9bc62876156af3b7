"""Rerankers that answer yes or no (LogitScore): a causal language model reads a chat template with the query and the document.

The score is the difference of the logits of two tokens after the last one, which is one linear layer: the difference of two rows of
the vocabulary head. The template is rendered once, when the model is read, and must put the texts in as they are.
Source: sentence-transformers 6.2 ``logit_score.py``; Qwen3-Reranker (Zhang et al. 2025).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from npu_proxy.errors import ModelError
from npu_proxy.graph.build import tensor_name
from npu_proxy.models.json_files import Json, JsonObject, inside
from npu_proxy.models.unread import FolderReader
from npu_proxy.models.weights import Tensors
from npu_proxy.spec import DenseModule, ModelSpec, PairTemplate
from npu_proxy.system import run_python

_FAMILIES = ("qwen3",)
"""Families whose vocabulary head is one linear layer without anything after it."""
_QUERY, _DOCUMENT = "qqFirstTextqq", "ddSecondTextdd"
_FILLERS = ((_QUERY, _DOCUMENT), ("0", "1 2 3 4"), ("  a <b> 'c'\n", '\t"d" & e  '), ("the cat", ""))
_SECONDS, _MOST_BYTES = 10.0, 1 << 30
_LARGEST = 1 << 20
_RENDER = """
import json, sys
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
given = json.loads(sys.stdin.buffer.read())
def fail(message):
    raise ValueError(message)
environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
environment.globals["raise_exception"] = fail
try:
    template = environment.from_string(given["template"])
    texts = [template.render(messages=messages, **given["arguments"]) for messages in given["conversations"]]
    if max(map(len, texts)) > 100_000:
        fail("it makes over 100,000 characters")
except Exception as error:
    print(json.dumps([f"{type(error).__name__}: {error}"[:200]]))
    sys.exit(1)
print(json.dumps(texts))
"""


@dataclass(frozen=True, kw_only=True)
class RowDifference(Mapping[str, npt.NDArray[Any]]):
    """The tensor ``weight`` [1, width] of the layer whose output is the logit of one token, minus that of another."""

    tensors: Tensors
    name: str
    true_id: int
    false_id: int | None

    def __getitem__(self, key: str) -> npt.NDArray[Any]:
        if key != "weight":
            raise KeyError(key)
        ids = [self.true_id, *([] if self.false_id is None else [self.false_id])]
        rows = self.tensors.rows(self.name, ids).astype(np.float32)
        return rows[:1] if self.false_id is None else rows[:1] - rows[1:]

    def __iter__(self) -> Iterator[str]:
        return iter(["weight"])

    def __len__(self) -> int:
        return 1


def read_head(spec: ModelSpec, module: JsonObject, reader: FolderReader, hidden: int) -> DenseModule:
    """The layer that gives the score. module: the entry of modules.json. Raises ModelError."""
    config = reader.object(inside(spec.folder, str(module["path"])) / "config.json", kind="LogitScore")
    if spec.family not in _FAMILIES:
        raise ModelError(f"modules.json: LogitScore is not supported for model_type `{spec.family}`, only {', '.join(_FAMILIES)}")
    true_id, false_id = config.get("true_token_id"), config.get("false_token_id")
    for key, value in (("true_token_id", true_id), ("false_token_id", 0 if false_id is None else false_id)):
        if type(value) is not int or not 0 <= value < spec.vocabulary:
            raise ModelError(f"LogitScore: `{key}` is `{str(value)[:40]}`, not a token id below {spec.vocabulary}")
    if config.get("module_input_name", "causal_logits") != "causal_logits":
        raise ModelError(f"LogitScore: `module_input_name` is `{config['module_input_name']}`, not causal_logits")
    tensors = Tensors(spec.weight_files, tensor_name(spec.family))
    tied = bool(spec.config.get("tie_word_embeddings"))
    name = "lm_head.weight" if "lm_head.weight" in tensors or not tied else "embed_tokens.weight"
    shape = tuple(tensors.shape(name))
    if shape != (spec.vocabulary, hidden):
        raise ModelError(f"tensor `{name}` has the shape {list(shape)}, unlike `vocab_size` and `hidden_size`")
    assert isinstance(true_id, int)
    rows = RowDifference(tensors=tensors, name=name, true_id=true_id, false_id=false_id)
    return DenseModule(tensors=rows, prefix="", shape=(1, hidden), activation="torch.nn.modules.linear.Identity")


def read_template(folder: Path, settings: JsonObject, limits: JsonObject, spec: ModelSpec) -> PairTemplate:
    """What the chat template puts around a query and a document. settings: tokenizer_config.json. Raises ModelError."""
    file = folder / "chat_template.jinja"
    template: Any = _read(file) if file.is_file() else settings.get("chat_template")
    if not isinstance(template, str):
        raise ModelError(f"{folder.name}: chat_template.jinja is missing, which a LogitScore module needs")
    options, restores = _options(limits)
    system = spec.prompts.get(spec.default_prompt or "", "")
    arguments = {"tools": None, "documents": None, "add_generation_prompt": False, **spec.tokenizer.tokens, **options}
    rendered = _render(template, [_messages(system, *texts) for texts in _FILLERS], arguments)
    made = _split(rendered[0])
    for texts, text in zip(_FILLERS, rendered, strict=True):
        if made.join(*texts) != text:
            raise ModelError(f"{file.name}: the template changes the texts that it gets, or depends on them; this is not supported")
    return PairTemplate(before=made.before, between=made.between, after=made.after, keeps_end=restores)


def _read(file: Path) -> str:
    try:
        if file.stat().st_size > _LARGEST:
            raise ModelError(f"{file.name} has over {_LARGEST} bytes")
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{file.name} cannot be read: {error}") from error


def _options(limits: JsonObject) -> tuple[Json, bool]:
    """The arguments of the template in sentence_bert_config.json, and whether its end is kept when a pair is cut."""
    message: Any = (limits.get("modality_config") or {}).get("message")
    if not isinstance(message, Mapping) or message.get("format", "flat") != "flat":
        raise ModelError("sentence_bert_config.json: `modality_config` needs a `message` of `format` flat for a LogitScore module")
    processing = limits.get("processing_kwargs") or {}
    options = dict(processing.get("chat_template") or {})
    restores = options.pop("restore_suffix", True)
    if not isinstance(restores, bool) or not all(isinstance(value, str | bool | int | None) for value in options.values()):
        raise ModelError("sentence_bert_config.json: `processing_kwargs` has arguments of the chat template that are not known")
    return options, restores


def _messages(system: str, query: str, document: str) -> Sequence[Mapping[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "query", "content": query}, {"role": "document", "content": document}]


def _render(template: str, conversations: Sequence[Any], arguments: Json) -> Sequence[str]:
    """Render in a process with limited memory and time: a template is a program."""
    return _rendered(msgspec.json.encode({"template": template, "conversations": conversations, "arguments": arguments}))


@lru_cache(maxsize=16)
def _rendered(given: bytes) -> Sequence[str]:
    code, printed = run_python(_RENDER, given, _SECONDS, _MOST_BYTES)
    if code != 0:
        reason = printed.strip()[2:-2] or f"exit code {code}"
        how = f"took over {_SECONDS:g} seconds" if code is None else f"failed ({reason})"
        raise ModelError(f"chat_template.jinja: rendering it with a query and a document {how}")
    return msgspec.json.decode(printed, type=list[str])


def _split(text: str) -> PairTemplate:
    before, found, rest = text.partition(_QUERY)
    between, also, after = rest.partition(_DOCUMENT)
    if not found or not also or _QUERY in rest or _DOCUMENT in after:
        raise ModelError("chat_template.jinja: the template does not put in the query and then the document, each once")
    return PairTemplate(before=before, between=between, after=after)
