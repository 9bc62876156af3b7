"""The commands that ask a model a single question: rerank, classify, similarity; and show, which says what a model is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from npu_proxy.devices.kinds import EXPORTED
from npu_proxy.engine.verbs import classifies, ranks_with
from npu_proxy.errors import InputError
from npu_proxy.prepare.commands import DEFAULTS, Shared
from npu_proxy.settings import Settings
from npu_proxy.types import Kind, ModelSpec, Pooling, Similarity

_TEXT_BYTES = 64_000_000


def rerank(
    query: str,
    *documents: str,
    input: Path | None = None,
    top_n: int | None = None,
    raw: bool = False,
    json: bool = False,
    settings: Shared = DEFAULTS,
) -> None:
    """Rank documents by how well they answer a query, the best first. Of a long document the best part counts.

    Needs a cross-encoder or a late-interaction model: the first such of the setting `model`.

    Parameters
    ----------
    query
        What is asked.
    documents
        The documents, each an argument; or see --input.
    input
        File of documents, one a line. Without it and without arguments, standard input.
    top_n
        Show so many.
    raw
        Logits in place of scores from 0 to 1.
    json
        Print a JSON object a document.
    """
    from npu_proxy.engine.engine import Engine

    given = _given(documents, input)
    with Engine(settings=_choose(settings, ranks_with)) as engine:
        for one in engine.rerank(query, given, top_n=top_n, raw=raw, truncate="chunk"):
            if json:
                _print({"index": one.index, "score": one.score, "document": given[one.index]})
            else:
                print(f"{one.score:9.4f}  {one.index:4}  {given[one.index]}")


def classify(
    *texts: str,
    input: Path | None = None,
    top_n: int | None = 1,
    raw: bool = False,
    json: bool = False,
    settings: Shared = DEFAULTS,
) -> None:
    """Say which label of a classifier each text has.

    Needs a model for sequence classification: the first such of the setting `model`.

    Parameters
    ----------
    texts
        The texts, each an argument; or see --input.
    input
        File of texts, one a line. Without it and without arguments, standard input.
    top_n
        Labels a text, the likeliest first.
    raw
        Logits in place of probabilities.
    json
        Print a JSON object a text.
    """
    from npu_proxy.engine.engine import Engine

    given = _given(texts, input)
    if not given:
        raise InputError(
            "there is no text; give texts as arguments, a file with --input, or lines on standard input", param="input"
        )
    with Engine(settings=_choose(settings, classifies)) as engine:
        for text, found in zip(given, engine.classify(given, top_n=top_n, raw=raw), strict=True):
            if json:
                _print({"text": text, "labels": [asdict(one) for one in found]})
            else:
                print(f"{', '.join(f'{one.label} {one.score:.4f}' for one in found)}  {text}")


def similarity(first: str, *others: str, how: Similarity | None = None, json: bool = False, settings: Shared = DEFAULTS) -> None:
    """Say how alike a text is to others, the most alike first.

    Parameters
    ----------
    first
        The text that is compared.
    others
        Those it is compared with.
    how
        cosine, dot, euclidean or manhattan (distances are negative); the model's own where it is not given.
    json
        Print a JSON object a text.
    """
    from npu_proxy.engine.engine import Engine

    if not others:
        raise InputError("there is nothing to compare with; give more texts", param="others")
    with Engine(settings=settings) as engine:
        vectors = engine.embed([first, *others], normalize=engine.spec.normalizes)
        found = engine.similarity(vectors[:1], vectors[1:], how)[0]
    for index in (-found).argsort(kind="stable"):
        if json:
            _print({"index": int(index), "similarity": float(found[index]), "text": others[index]})
        else:
            print(f"{found[index]:9.4f}  {others[index]}")


def show(model: str = "", /, *, json: bool = False, settings: Shared = DEFAULTS) -> None:
    """Say what a model is: architecture, width, limit, pooling, prompts, precision, source, licence, fingerprint.

    Parameters
    ----------
    model
        A name from `npu-proxy list`, an alias, or a folder; the setting `model` where it is not given.
    json
        Print one JSON object.
    """
    about = describe(replace(settings, model=(model,)) if model else settings)
    if json:
        _print(about)
        return
    for key, value in about.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        if isinstance(value, dict):
            shown = "; ".join(f"{name}: {text!r}" for name, text in value.items())
        if shown not in ("", None):
            print(f"{key:14} {shown}")


def _choose(settings: Settings, fits: Callable[[ModelSpec], bool]) -> Settings:
    """The settings with the first of their models that fits, or as they are where none does: then its error says what is needed."""
    from npu_proxy.models.layout import read_spec
    from npu_proxy.models.store import Store

    for model in settings.model if len(settings.model) > 1 else ():
        name, folder = Store(settings.store).resolve(model)
        if fits(read_spec(folder, name=name, pooling=settings.pooling, max_length=settings.max_length)):
            return replace(settings, model=(model,))
    return settings


def describe(settings: Settings) -> dict[str, object]:
    """What ``show`` says, by name."""
    from npu_proxy.devices.chain import served
    from npu_proxy.models.store import Store

    settings, spec = served(settings)
    stored = Store(settings.store).find(spec.name)
    layers = next((spec.config[name] for name in ("num_hidden_layers", "n_layers", "num_layers") if name in spec.config), 0)
    return {
        "model": spec.name,
        "architecture": f"{spec.family}, {layers} layers",
        "gives": [str(kind) for kind in spec.kind.gives],
        "width": spec.width,
        "tokens": spec.max_length,
        "vocabulary": spec.vocabulary,
        "pooling": str(spec.pooling) if spec.pooling is not Pooling.NONE else "none (a vector a token)",
        "normalizes": spec.normalizes,
        "similarity": "maxsim" if spec.kind is Kind.TOKENS else spec.similarity if spec.kind is not Kind.SCORES else "",
        "labels": list(spec.labels),
        "scores": spec.activation if spec.kind is Kind.SCORES else "",
        "prompts": dict(spec.prompts),
        "default prompt": spec.default_prompt,
        "instruction": spec.instruction,
        "precision": spec.precision,
        "served from": f"its own graph file, padded (device {settings.device})" if settings.device in EXPORTED else "",
        "source": stored.source if stored else "a folder",
        "licence": licence(spec),
        "weights": f"{sum(file.stat().st_size for file in spec.weight_files) / 1e6:.1f} MB",
        "fingerprint": spec.fingerprint,
    }


def licence(spec: ModelSpec) -> str:
    """What the model card's first lines say, or the name of a licence file; "unknown" where neither is there."""
    card = spec.folder / "README.md"
    if card.is_file():
        head = card.read_text(encoding="utf-8", errors="replace")[:20_000]
        if head.startswith("---"):
            for line in head.split("---", 2)[1].splitlines():
                key, _, value = line.partition(":")
                if key.strip() == "license" and value.strip():
                    return value.strip()
    return "see LICENSE" if any(spec.folder.glob("LICENSE*")) else "unknown"


def _given(arguments: Sequence[str], file: Path | None) -> list[str]:
    """The arguments and the lines of a file that say something; without either, those of standard input. Raises InputError."""
    if file is None and arguments:
        return list(arguments)
    try:
        content = sys.stdin.read(_TEXT_BYTES) if file is None else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file or 'standard input'} cannot be read: {error}", param="input") from error
    return [*arguments, *(line for line in content.splitlines() if line.strip())]


def _print(content: dict[str, object]) -> None:
    import msgspec

    print(msgspec.json.encode(content).decode())
