"""Compare what npu-proxy computes of a model folder with what the model's own library computes, text by text.

The library (sentence-transformers, or model2vec for its models) must be installed beside npu-proxy; it gets one text at a time, in
float32. This is the tool for a folder that one does not know, and for the golden models of the tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from npu_proxy.engine.engine import Engine
from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.errors import InputError, ModelError, NpuProxyError, SettingsError
from npu_proxy.settings import Settings
from npu_proxy.spec import ModelSpec
from npu_proxy.types import EmbedRequest, OutputType, Pair, Pooling, SparseVector, TextInput

Vectors = npt.NDArray[np.float32]
Reference = Callable[[Sequence[TextInput]], list[Vectors | Exception]]
"""Computes one array per text, or the error that it is."""

LEAST_COSINE = 0.99999
MOST_DIFFERENCE = 1e-3
"""The largest difference of logits."""
_SHOWN = 10
_LONGEST = 1100
"""Texts at the limit are compared up to this many tokens."""
PLAIN = (
    "the cat sleeps",
    "A big RED house, and a small one!",
    "payment with the card at the bank",
    "x",
    "?",
    "1 + 1 = 2, 3.14159 and 1e-5",
    "don't stop-it, it's John's",
    "  leading and trailing spaces  ",
    "\tthe cat\n",
    "two\n\nparagraphs\r\nand lines",
    "many     spaces   inside",
    "naïve café — 日本語テキスト",
    "ÀÉÎÕÜ straße İstanbul ǅ",
    "e\u0301 combining, a\u0308 too",
    "the\u00a0cat\u200bdog\u2028line",
    "zero\x00width\ufeffbom",
    "👩‍👩‍👧‍👦 emoji 🚀",
    "مرحبا بالعالم",
    "हिन्दी में पाठ",
    "한국어 문장",
    "Ελληνικά και Русский",
    "ﬁne ﬂuﬀ ①②③ \uff26\uff35\uff2c\uff2c width",
    "snake_case camelCase kebab-case path/to/file.txt",
    "https://example.com/?q=a&b=c#d",
    "user@example.com",
    "def f(x): return x ** 2  # code",
    '{"json": [1, 2, {"a": null}]}',
    "<b>html</b> &amp; entities",
    "$100 €50 £20 ¥1000",
    "C++ C# .NET F#",
    "...!!!???",
    "''quoted'' ``text'' “curly”",
    "a" * 150,
    "ab" * 60 + " end",
    "the " * 40,
    "one two three four five " * 3,
    "UPPER lower MiXeD",
    "query: the cat",
    "passage: the dog",
    "\U0001d400\U0001d401 math letters",
    "qqxqq zzvzz wwkww",
    "\u2581the\u2581cat",
)
"""Texts that tokenizers treat differently."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One text. cosine: of both vectors, NaN if there is an error. difference: the largest of all numbers. error: whose, and what.

    refused: whether npu-proxy refuses the text, which is an answer, too.
    """

    text: TextInput
    cosine: float
    difference: float
    error: str = ""
    refused: bool = False


def awkward_texts(engine: Engine) -> list[str]:
    """Texts that are easily computed wrongly: ``PLAIN``, special and unknown tokens as text, and texts around the limit."""
    spec = engine.spec
    special = list(dict.fromkeys(spec.tokenizer.tokens.values()))
    written = [f"the {token} cat" for token in special] + [f"{token}the cat{token.lower()}" for token in special[:4]]
    written += [" ".join(special), "[unused0] the [unused1]", "<unk> [UNK] the", "the cat [mask] [MASK] <mask>"]
    return [*PLAIN, *written, *_texts_at(engine, spec.max_length)]


def _texts_at(engine: Engine, limit: int) -> list[str]:
    """Texts one token below the limit, at it, above it, and far above it."""
    if limit > _LONGEST:
        return ["the cat sleeps " * 100]
    word = "the "
    tokenizer = RequestTokenizer(engine.spec)
    one, two = (len(tokens) for tokens in tokenizer.tokens([word * 4, word * 8], "", special=True))
    per_word, fixed = max(1, (two - one) // 4), one - (two - one)
    count = max(1, (limit - fixed) // per_word)
    return [word * max(1, count + more) for more in (-2, -1, 0, 1, 2)] + [word * (3 * count)]


def compare(engine: Engine, reference: Reference, texts: Sequence[TextInput], *, side: str = "document") -> list[Comparison]:
    """Compare texts one by one. side: query or document, for late interaction; other models get no prompt but their default."""
    output_type, input_type = engine.spec.output_types[0], side if engine.spec.has_sides else None
    request = EmbedRequest(texts=texts, normalize=False, output_type=output_type, input_type=input_type)
    result = engine.submit(request).result()
    own: list[Vectors | Exception] = [
        result.errors[index] or _array(result.embeddings[index], engine.spec) for index in range(len(texts))
    ]
    return [_compared(text, a, b, engine.spec) for text, a, b in zip(texts, own, reference(texts), strict=True)]


def _array(output: Any, spec: ModelSpec) -> Vectors:
    if isinstance(output, SparseVector):
        wide = np.zeros(spec.vocabulary, np.float32)
        wide[output.indices] = output.values
        return wide
    return np.asarray(output, np.float32)


def _compared(text: TextInput, own: Vectors | Exception, other: Vectors | Exception, spec: ModelSpec) -> Comparison:
    if isinstance(own, Exception) or isinstance(other, Exception):
        both = isinstance(own, Exception) and isinstance(other, Exception)
        error = "both" if both else f"npu-proxy: {own}" if isinstance(own, Exception) else f"reference: {other}"
        refused = isinstance(own, InputError)
        return Comparison(text=text, cosine=float("nan"), difference=float("nan"), error=error[:200], refused=refused)
    if own.shape != other.shape:
        return Comparison(text=text, cosine=-1.0, difference=float("inf"), error=f"shapes {own.shape} and {other.shape}")
    if spec.normalizes:
        own, other = _unit(own), _unit(other)
    cosine = 1.0 if spec.output_type is OutputType.SCORES else float((_unit(own.ravel()) * _unit(other.ravel())).sum())
    if not own.any() and not other.any():
        cosine = 1.0
    return Comparison(text=text, cosine=cosine, difference=float(np.abs(own - other).max(initial=0.0)))


def _unit(vectors: Vectors) -> Vectors:
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=-1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-30)).astype(np.float32)


def agrees(one: Comparison, spec: ModelSpec) -> bool:
    """Whether both computed the same of a text."""
    if one.error:
        return one.error == "both" or one.refused
    if spec.output_type is OutputType.SCORES:
        return one.difference <= MOST_DIFFERENCE
    return one.cosine >= LEAST_COSINE


def compare_folder(settings: Settings, *, trust: bool = False) -> tuple[ModelSpec, list[Comparison]]:
    """Compare the setting `model` over ``awkward_texts``: its spec, and every text (for late interaction, as query, too).

    Raises ModelError if npu-proxy refuses the model or its library does, and SettingsError if the library is missing.
    """
    with Engine(settings=replace(settings, on_empty="embed", cache_mb=0, cache_disk_mb=0)) as engine:
        spec = engine.spec
        plain = awkward_texts(engine)
        texts = [Pair("the cat", text) for text in plain] if spec.output_type is OutputType.SCORES else plain
        found: list[Comparison] = []
        for side in ("document", "query") if spec.has_sides else ("document",):
            try:
                reference = load_reference(spec, side=side, trust=trust)
            except NpuProxyError:
                raise
            except Exception as error:  # libraries raise anything
                why = f"{type(error).__name__}: {str(error)[:300]}"
                raise ModelError(f"{spec.name} cannot be loaded by its own library ({why})") from error
            found += compare(engine, reference, texts, side=side)
    return spec, found


def summary(spec: ModelSpec, found: Sequence[Comparison]) -> str:
    """What to print of a comparison: the least cosine or largest difference, then the texts that differ or are refused."""
    worst = [one for one in found if not agrees(one, spec)]
    compared = [one for one in found if not one.error]
    least = min((one.cosine for one in compared), default=float("nan"))
    largest = max((one.difference for one in compared), default=float("nan"))
    measure = f"largest difference {largest:.2g}" if spec.output_type is OutputType.SCORES else f"minimum cosine {least:.7f}"
    verdict = f"{len(worst)} of {len(found)} texts differ" if worst else f"all {len(found)} texts agree"
    lines = [f"{spec.name}: {verdict}; {measure}"]
    for one in sorted(worst, key=lambda one: one.cosine)[:_SHOWN] + [one for one in found if one.refused][:_SHOWN]:
        what = one.error or f"cosine {one.cosine:.5f}, difference {one.difference:.3g}"
        lines.append(f"  {str(one.text)[:60]!r}: {what}")
    return "\n".join(lines)


# -- the references ------------------------------------------------------------------------------------------------------


def load_reference(spec: ModelSpec, *, side: str = "document", trust: bool = False) -> Reference:
    """The model in its own library, in float32. side: query or document, for late interaction. trust: run the folder's own code.

    Raises SettingsError if the library is not installed, and what the library raises for the folder.
    """
    if spec.by_model2vec:
        static: Any = _library("model2vec").StaticModel.from_pretrained(str(spec.folder))

        def average(text: TextInput) -> Any:
            return static.encode([text])[0]

        return lambda texts: [_attempt(average, text) for text in texts]
    library, torch = _library("sentence_transformers"), _library("torch")
    classes = {
        OutputType.SCORES: "CrossEncoder",
        OutputType.SPARSE: "SparseEncoder",
        OutputType.TOKENS: "MultiVectorEncoder" if spec.late_interaction else "SentenceTransformer",
    }
    load: Any = getattr(library, classes.get(spec.output_type, "SentenceTransformer"))
    model: Any = load(str(spec.folder), device="cpu", trust_remote_code=trust, **_pooled(spec, library))
    model.float()
    identity: Any = torch.nn.Identity()
    if spec.output_type is OutputType.SCORES:

        def logits(text: TextInput) -> Any:
            pair = [text.first, text.second] if isinstance(text, Pair) else [text]
            return np.atleast_1d(model.predict([pair], activation_fn=identity, show_progress_bar=False)[0])

        return lambda texts: [_attempt(logits, text) for text in texts]
    encode = getattr(model, f"encode_{side}") if spec.has_sides else model.encode
    wanted = {"output_value": "token_embeddings"} if spec.output_type is OutputType.TOKENS and not spec.late_interaction else {}

    def vector(text: TextInput) -> Any:
        found = encode([text], batch_size=1, show_progress_bar=False, **wanted)[0]
        return found.to_dense() if getattr(found, "is_sparse", False) else found

    return lambda texts: [_attempt(vector, text) for text in texts]


def _pooled(spec: ModelSpec, library: Any) -> dict[str, Any]:
    """The modules of a folder without modules.json, with the pooling that npu-proxy was given."""
    if (spec.folder / "modules.json").exists() or spec.output_type is not OutputType.DENSE or spec.pooling is Pooling.NONE:
        return {}
    models = library.models
    transformer = models.Transformer(str(spec.folder))
    return {"modules": [transformer, models.Pooling(spec.hidden_width, pooling_mode=str(spec.pooling))], "model_name_or_path": None}


def _attempt(compute: Callable[[TextInput], Any], text: TextInput) -> Vectors | Exception:
    try:
        found = compute(text)
        return np.asarray(found.cpu() if hasattr(found, "cpu") else found, np.float32)
    except Exception as error:  # libraries raise anything
        return error


def _library(name: str) -> Any:
    """A library, offline and silent. Raises SettingsError if it is missing."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        return import_module(name)
    except ImportError as error:
        package = name.replace("_", "-")
        raise SettingsError(f"comparing needs {package}: pip install {package} ({error})", param="model") from None
