"""Converts a model of an unsupported family to a graph file: traced with torch, compared with it, and kept if they agree.

The new folder contains everything except the transformer's weights, which are in the graph. devices/exported.py serves it, with
padding.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from tokenizers import Tokenizer

from npu_proxy.engine.engine import Engine
from npu_proxy.engine.golden import GOLDEN_TEXTS
from npu_proxy.errors import InputError, ModelError, SettingsError
from npu_proxy.graph.build import FAMILIES
from npu_proxy.models.json_files import Json
from npu_proxy.models.layout import output_type_of
from npu_proxy.models.resolve import read_folder
from npu_proxy.models.store import ModelStore
from npu_proxy.settings import Settings
from npu_proxy.spec import ModelSpec
from npu_proxy.targets import GRAPH_FILES
from npu_proxy.types import EmbedRequest, OutputType

Say = Callable[[str], None]
_NOT_COPIED = (".*", "onnx", "openvino", "*.onnx*", "*.h5", "*.msgpack", "*.ot")
_WEIGHTS = ("model*.safetensors*", "pytorch_model*")
_LEAST_COSINE = 0.9999
_LONGEST = 200
"""Maximum number of tokens per golden text that are compared."""


def convert(settings: Settings, output: Path, *, trust: bool, say: Say) -> tuple[ModelSpec, float]:
    """Convert the setting `model` to the folder ``output``. Return its spec and the minimum cosine of any vector to torch's.

    trust: run Python code from the model's folder. Raises InputError, SettingsError or ModelError without creating ``output``.
    """
    if output.exists():
        raise InputError(f"{output} already exists; choose a new folder", param="output")
    name, folder = ModelStore(settings.store).resolve(settings.model[0])
    output_type, transformer, config = output_type_of(folder, settings.pooling)
    for library in ("torch", "transformers"):
        _library(library)
    if config.get("model_type") in FAMILIES:
        say(f"{name} can be served from its weights, which is faster; converting it anyway")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=output.parent) as scratch:
        staged = Path(scratch) / output.name
        shutil.copytree(folder, staged, ignore=lambda source, names: _not_copied(names, weights=Path(source) == transformer))
        say(f"loading {name} with torch")
        module, inputs = _load(transformer, config, output_type, trust=trust)
        tokenizer = staged / transformer.relative_to(folder) / "tokenizer.json"
        if not tokenizer.is_file():
            _write_tokenizer(transformer, tokenizer, trust=trust)
        say("tracing the model")
        file = staged / GRAPH_FILES["ir"][1]
        file.parent.mkdir()
        ov.save_model(_traced(module, inputs), file, compress_to_fp16=False)
        spec = read_folder(settings, staged, output.name)
        say("comparing the graph with torch")
        least = _least_cosine(module, file, inputs, Tokenizer.from_file(str(tokenizer)), min(_LONGEST, spec.max_length))
        if not least >= _LEAST_COSINE:
            raise ModelError(
                f"the graph of {name} does not give the same vectors as torch (minimum cosine {least:.6f}); it was not kept"
            )
        with Engine(settings=replace(settings, model=(str(staged),), device="ir")) as engine:
            engine.submit(EmbedRequest(texts=[GOLDEN_TEXTS[1]], output_type=engine.spec.output_types[0])).result().raise_first()
        staged.rename(output)
    return spec, least


def _not_copied(names: list[str], *, weights: bool) -> set[str]:
    """Files of a folder that are not copied. weights: whether weights are among them (those of Dense modules are copied)."""
    patterns = (*_NOT_COPIED, *_WEIGHTS) if weights else _NOT_COPIED
    return {name for name in names if any(fnmatch(name, pattern) for pattern in patterns)}


def _library(name: str) -> Any:
    """Import torch or transformers, which only this command needs. Raises SettingsError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise SettingsError("`npu-proxy convert` needs torch: pip install 'npu-proxy[convert]'", param="model") from None


def _load(folder: Path, config: Json, output_type: OutputType, *, trust: bool) -> tuple[Any, list[str]]:
    """The model as a torch module that returns one tensor, and the names of its inputs in order."""
    torch, transformers = _library("torch"), _library("transformers")
    if output_type is OutputType.SCORES:
        loader = transformers.AutoModelForSequenceClassification
    elif output_type is OutputType.SPARSE:
        loader = transformers.AutoModelForMaskedLM
    elif config.get("is_encoder_decoder") or config.get("model_type") in ("t5", "mt5", "umt5"):
        loader = transformers.AutoModelForTextEncoding
    else:
        loader = transformers.AutoModel
    try:
        # Eager attention has no branches on tensor values, which tracing would fix.
        model = loader.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32, trust_remote_code=trust)
    except Exception as error:  # the libraries raise many kinds of errors for a folder that they cannot load
        raise ModelError(f"{folder.name} cannot be loaded with torch: {error}") from error
    model.eval()

    class Module(torch.nn.Module):  # pyright: ignore[reportUntypedBaseClass]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> Any:
            types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **types)
            return outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]

    types = ["token_type_ids"] if int(config.get("type_vocab_size") or 0) > 1 else []
    return Module(), ["input_ids", "attention_mask", *types]


def _write_tokenizer(folder: Path, file: Path, *, trust: bool) -> None:
    """Write tokenizer.json for a tokenizer that has only older files. Raises ModelError if there is no fast version of it."""
    transformers = _library("transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        tokenizer.backend_tokenizer.save(str(file))
    except Exception as error:  # the libraries raise many kinds of errors
        raise ModelError(f"{folder.name}: the tokenizer cannot be converted to a fast tokenizer: {error}") from error


def _example(lines: list[list[int]]) -> dict[str, Any]:
    """All inputs that a graph can have, int64 [texts, longest], for texts padded to the longest one."""
    shape = (len(lines), max(map(len, lines)))
    inputs = {name: np.zeros(shape, np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    for number, line in enumerate(lines):
        inputs["input_ids"][number, : len(line)] = line
        inputs["attention_mask"][number, : len(line)] = 1
    return inputs


def _traced(module: Any, inputs: list[str]) -> ov.Model:
    """The module as a graph for any number of texts of any length. Raises ModelError if it cannot be converted."""
    torch, example = _library("torch"), _example([[5, 6, 7, 8, 9], [6, 7, 8]])
    tensors = {name: torch.from_numpy(example[name]) for name in inputs}
    try:
        with torch.no_grad(), contextlib.redirect_stdout(None):
            model = ov.convert_model(module, example_input=tensors, input=[(name, [-1, -1]) for name in inputs])
    except Exception as error:  # torch and the converter raise many kinds of errors for a model that they cannot trace
        raise ModelError(f"OpenVINO cannot convert the model: {error}") from error
    for port, name in zip(model.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
    scores = model.output(0).get_partial_shape().rank.get_length() == 2
    model.output(0).get_tensor().set_names({"logits" if scores else "last_hidden_state"})
    return model


def _least_cosine(module: Any, file: Path, inputs: list[str], tokenizer: Tokenizer, longest: int) -> float:
    """The minimum cosine of the graph's vectors, computed with padding, to torch's, computed one text at a time."""
    torch = _library("torch")
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest)
    lines = [encoding.ids for encoding in tokenizer.encode_batch(list(GOLDEN_TEXTS)) if encoding.ids]
    padded = _example(lines)
    computed = ov.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({name: padded[name] for name in inputs})[0]
    least = 1.0
    for number, line in enumerate(lines):
        single = _example([line])
        with torch.no_grad():
            expected = module(*(torch.from_numpy(single[name]) for name in inputs))[0].numpy()
        actual, reference = (
            np.atleast_2d(vectors)
            for vectors in (computed[number][: len(line)] if expected.ndim > 1 else computed[number], expected)
        )
        if actual.shape != reference.shape or not np.isfinite(actual).all():
            return 0.0
        lengths = np.linalg.norm(actual, axis=1) * np.linalg.norm(reference, axis=1)
        least = min(least, float(((actual * reference).sum(1) / np.maximum(lengths, 1e-12)).min()))
        if np.abs(actual - reference).max() > 1e-2 * max(1.0, float(np.abs(reference).max())):
            return 0.0
    return least
