"""A model of a family that is not built here, as a graph file: traced from torch, compared with it, and kept if it is the same.

The new folder has all but the transformer's weights, which are in the graph. It is served padded, by devices/exported.py.
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

from npu_proxy.devices.kinds import EXPORTED
from npu_proxy.engine.engine import Engine
from npu_proxy.engine.golden import GOLDEN_TEXTS
from npu_proxy.errors import InputError, ModelError, SettingsError
from npu_proxy.graph.build import FAMILIES
from npu_proxy.models.jsons import Json
from npu_proxy.models.layout import kind_of, read_spec
from npu_proxy.models.store import Store
from npu_proxy.settings import Settings
from npu_proxy.types import EmbedRequest, Kind, ModelSpec

Say = Callable[[str], None]
_LEFT = (".*", "onnx", "openvino", "*.onnx*", "*.h5", "*.msgpack", "*.ot")
_WEIGHTS = ("model*.safetensors*", "pytorch_model*")
_LEAST_COSINE = 0.9999
_LONGEST = 200
"""Tokens of the golden texts that both compute."""


def convert(settings: Settings, output: Path, *, trust: bool, say: Say) -> tuple[ModelSpec, float]:
    """Make ``output`` of the setting `model`. Its spec, and the least cosine of a token's vector to torch's.

    trust: run Python code of the model's folder. Raises InputError, SettingsError and ModelError; then there is no ``output``.
    """
    if output.exists():
        raise InputError(f"{output} is there already; name a folder that is not", param="output")
    name, folder = Store(settings.store).resolve(settings.model[0])
    kind, transformer, config = kind_of(folder, settings.pooling)
    for library in ("torch", "transformers"):
        _library(library)
    if config.get("model_type") in FAMILIES:
        say(f"{name} is served from its weights, packed, which is faster; converting it all the same")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=output.parent) as scratch:
        made = Path(scratch) / output.name
        shutil.copytree(folder, made, ignore=lambda place, names: _left(names, weights=Path(place) == transformer))
        say(f"loading {name} with torch")
        module, inputs = _load(transformer, config, kind, trust=trust)
        tokenizer = made / transformer.relative_to(folder) / "tokenizer.json"
        if not tokenizer.is_file():
            _write_tokenizer(transformer, tokenizer, trust=trust)
        say("tracing it")
        file = made / EXPORTED["ir"][1]
        file.parent.mkdir()
        ov.save_model(_traced(module, inputs), file, compress_to_fp16=False)
        spec = read_spec(made, name=output.name, pooling=settings.pooling, max_length=settings.max_length)
        say("comparing it")
        least = _least_cosine(module, file, inputs, Tokenizer.from_file(str(tokenizer)), min(_LONGEST, spec.max_length))
        if not least >= _LEAST_COSINE:
            raise ModelError(f"the graph of {name} gives other vectors than torch does (least cosine {least:.6f}); it was not kept")
        with Engine(settings=replace(settings, model=(str(made),), device="ir")) as engine:
            engine.submit(EmbedRequest(texts=[GOLDEN_TEXTS[1]], want=engine.spec.kind.gives[0])).result().raise_first()
        made.rename(output)
    return spec, least


def _left(names: list[str], *, weights: bool) -> set[str]:
    """Files of a folder that are not copied; weights: those of weights neither (Dense modules keep theirs)."""
    patterns = (*_LEFT, *_WEIGHTS) if weights else _LEFT
    return {name for name in names if any(fnmatch(name, pattern) for pattern in patterns)}


def _library(name: str) -> Any:
    """Torch or transformers, which only this command needs. Raises SettingsError."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise SettingsError("`npu-proxy convert` needs torch: pip install 'npu-proxy[convert]'", param="model") from None


def _load(folder: Path, config: Json, kind: Kind, *, trust: bool) -> tuple[Any, list[str]]:
    """The model as a torch module that gives one tensor, and its inputs in order."""
    torch, transformers = _library("torch"), _library("transformers")
    if kind is Kind.SCORES:
        loader = transformers.AutoModelForSequenceClassification
    elif kind is Kind.SPARSE:
        loader = transformers.AutoModelForMaskedLM
    elif config.get("is_encoder_decoder") or config.get("model_type") in ("t5", "mt5", "umt5"):
        loader = transformers.AutoModelForTextEncoding
    else:
        loader = transformers.AutoModel
    try:
        # Eager attention has no branches on values, which a trace would freeze.
        model = loader.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32, trust_remote_code=trust)
    except Exception as error:  # whatever the libraries raise for a folder they cannot load
        raise ModelError(f"{folder.name}: torch cannot load it: {error}") from error
    model.eval()

    class Module(torch.nn.Module):  # pyright: ignore[reportUntypedBaseClass]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> Any:
            given = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            found = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **given)
            return found["logits"] if "logits" in found else found["last_hidden_state"]

    types = ["token_type_ids"] if int(config.get("type_vocab_size") or 0) > 1 else []
    return Module(), ["input_ids", "attention_mask", *types]


def _write_tokenizer(folder: Path, file: Path, *, trust: bool) -> None:
    """tokenizer.json of a tokenizer that has only its older files. Raises ModelError where there is none of that form."""
    transformers = _library("transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        tokenizer.backend_tokenizer.save(str(file))
    except Exception as error:  # whatever the libraries raise
        raise ModelError(f"{folder.name}: no fast tokenizer can be made of its files: {error}") from error


def _example(lines: list[list[int]]) -> dict[str, Any]:
    """Each input that a graph may have, for texts padded to the longest, int64."""
    shape = (len(lines), max(map(len, lines)))
    given = {name: np.zeros(shape, np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    for number, line in enumerate(lines):
        given["input_ids"][number, : len(line)] = line
        given["attention_mask"][number, : len(line)] = 1
    return given


def _traced(module: Any, inputs: list[str]) -> ov.Model:
    """The module as a graph for any number of texts of any length. Raises ModelError."""
    torch, example = _library("torch"), _example([[5, 6, 7, 8, 9], [6, 7, 8]])
    given = {name: torch.from_numpy(example[name]) for name in inputs}
    try:
        with torch.no_grad(), contextlib.redirect_stdout(None):
            model = ov.convert_model(module, example_input=given, input=[(name, [-1, -1]) for name in inputs])
    except Exception as error:  # whatever torch and the converter raise for a model they cannot trace
        raise ModelError(f"OpenVINO cannot convert the model: {error}") from error
    for port, name in zip(model.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
    scores = model.output(0).get_partial_shape().rank.get_length() == 2
    model.output(0).get_tensor().set_names({"logits" if scores else "last_hidden_state"})
    return model


def _least_cosine(module: Any, file: Path, inputs: list[str], tokenizer: Tokenizer, longest: int) -> float:
    """Of the graph's vectors, computed padded, to torch's, computed a text at a time."""
    torch = _library("torch")
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest)
    lines = [encoding.ids for encoding in tokenizer.encode_batch(list(GOLDEN_TEXTS)) if encoding.ids]
    together = _example(lines)
    found = ov.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({name: together[name] for name in inputs})[0]
    least = 1.0
    for number, line in enumerate(lines):
        alone = _example([line])
        with torch.no_grad():
            wanted = module(*(torch.from_numpy(alone[name]) for name in inputs))[0].numpy()
        one, other = (
            np.atleast_2d(vectors) for vectors in (found[number][: len(line)] if wanted.ndim > 1 else found[number], wanted)
        )
        if one.shape != other.shape or not np.isfinite(one).all():
            return 0.0
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        least = min(least, float(((one * other).sum(1) / np.maximum(lengths, 1e-12)).min()))
        if np.abs(one - other).max() > 1e-2 * max(1.0, float(np.abs(other).max())):
            return 0.0
    return least
