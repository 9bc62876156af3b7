"""Whether stored vectors were made by a model: a sample of the texts is embedded again, with each of the model's prompts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npu_proxy.bulk.files import find_inputs
from npu_proxy.bulk.texts import TextSource, read_fields, read_texts
from npu_proxy.engine.engine import Engine
from npu_proxy.engine.similarity import normalize
from npu_proxy.errors import InputError

_SEED = 1
_LEAST = {"f": 0.9995, "i": 0.99, "u": 0.99}
"""The minimum cosine of the same text's vectors, by the kind of numbers that are stored."""
_RELATED = 0.95
"""At a mean cosine from here on, probably the same model in another precision or with other settings."""

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Match:
    """How vectors of the model with one prompt compare with the stored ones: the lowest and the mean cosine."""

    prompt: str
    text: str
    least: float
    mean: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The comparison with each prompt, best first. same: whether the best one made the stored vectors."""

    sampled: int
    count: int
    dimensions: int
    width: int
    kind: str
    matches: Sequence[Match]
    same: bool

    @property
    def related(self) -> bool:
        """Whether the vectors are at least similar."""
        return self.matches[0].mean >= _RELATED


def verify(engine: Engine, vectors: Path, source: Path, *, text_field: str, vector_field: str, sample: int) -> Verdict:
    """Compare a random sample of stored vectors with what the engine computes for their texts.

    vectors: a .npy file [n, width], or a .parquet or .jsonl file with a vector per record in ``vector_field``. Records without a
    vector are left out. Raises InputError if the two files do not belong together.
    """
    texts, stored, count = _sample(vectors, source, text_field, vector_field, sample)
    kind = stored.dtype.kind
    floats = stored.astype(np.float32) - (128 if kind == "u" else 0)
    spec, dimensions = engine.spec, stored.shape[1]
    if dimensions > spec.width:
        raise InputError(f"the vectors have {dimensions} dimensions, but {spec.name} has {spec.width}", param="vectors")
    given = normalize(floats)
    matches: list[Match] = []
    for prompt, text in {"": "", **spec.prompts}.items():
        if text in {match.text for match in matches}:
            continue
        made = normalize(np.asarray(engine.embed(texts, prompt=text, normalize=False))[:, :dimensions])
        cosines = (made * given).sum(axis=1)
        matches.append(Match(prompt=prompt, text=text, least=float(cosines.min()), mean=float(cosines.mean())))
    matches.sort(key=lambda match: -match.mean)
    return Verdict(
        sampled=len(texts),
        count=count,
        dimensions=dimensions,
        width=spec.width,
        kind=str(stored.dtype),
        matches=matches,
        same=matches[0].least >= _LEAST[kind],
    )


def _sample(
    vectors: Path, source: Path, text_field: str, vector_field: str, sample: int
) -> tuple[list[str], npt.NDArray[Any], int]:
    """A random sample of texts and their vectors, and how many there are; read in one pass, in bounded memory."""
    chosen: list[tuple[str, npt.NDArray[Any]]] = []
    random_numbers, count, seen = random.Random(_SEED), 0, 0  # noqa: S311 (a sample, not a secret)
    missing = object()
    rows = _vectors(vectors, vector_field)
    for text in read_texts(find_inputs([str(source)]), TextSource(field=text_field)):
        row = next(rows, missing)
        if row is missing:
            raise InputError(f"`{vectors}` has {count} vectors, but `{source}` has more texts", param="vectors")
        count += 1
        if not isinstance(row, np.ndarray) or not np.isfinite(row).all():
            continue  # a text that could not be embedded
        seen += 1
        if len(chosen) < sample:
            chosen.append((text, row))
        elif (place := random_numbers.randrange(seen)) < sample:
            chosen[place] = (text, row)
    if next(rows, missing) is not missing:
        raise InputError(f"`{vectors}` has more vectors than `{source}` has texts ({count})", param="vectors")
    if not chosen:
        raise InputError(f"`{vectors}` has no vectors", param="vectors")
    if len({row.shape for _, row in chosen}) > 1:
        raise InputError(f"`{vectors}` has vectors of different lengths", param="vectors")
    return [text for text, _ in chosen], np.stack([row for _, row in chosen]), count


def _vectors(path: Path, field: str) -> Iterator[npt.NDArray[Any] | None]:
    """The stored vectors in order; None for a record without one."""
    if path.suffix.lower() == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"`{path}` is not a .npy file: {error}", param="vectors") from error
        if array.ndim != 2 or array.dtype.kind not in _LEAST:
            raise InputError(
                f"`{path}` is a {array.dtype} array of shape {array.shape}; expected [n, width] numbers", param="vectors"
            )
        yield from (np.array(row) for row in array)
        return
    for place, (value,) in read_fields(find_inputs([str(path)]), [field], "; set --vector-field"):
        if value is not None and not (isinstance(value, list) and value and isinstance(value[0], int | float)):
            raise InputError(f"{place}: `{field}` is not a list of numbers", param="vector_field")
        yield None if value is None else np.asarray(value, np.float32)
