"""An int8 copy of a model: weights and activations, calibrated on real texts, kept only when it is nearly as good as fp32.

How good is measured before anything is kept: Spearman of cosines against human scores of sentence pairs (STS-B), for
both, on the CPU, in the same run.
"""

from __future__ import annotations

import csv
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from npu_proxy.devices.openvino import OpenVinoCpu
from npu_proxy.devices.shapes import ROW_TOKENS, dynamic_shapes
from npu_proxy.engine.engine import Engine
from npu_proxy.engine.golden import GOLDEN_TEXTS
from npu_proxy.engine.packing import pack, plan_row
from npu_proxy.engine.parts import Parts
from npu_proxy.engine.tokenize import TextEncoder
from npu_proxy.errors import InputError, ModelError, SettingsError
from npu_proxy.graph.packed import NATIVE, Form, RowFormat
from npu_proxy.models import quantized
from npu_proxy.models.graphs import Graphs
from npu_proxy.models.layout import read_spec
from npu_proxy.models.quantized import Report
from npu_proxy.models.store import Store
from npu_proxy.settings import Settings
from npu_proxy.types import Job, Lane, ModelSpec, Pack

Say = Callable[[str], None]
_WINDOW = 512
_LEAST_PAIRS = 100
_LEAST_COSINE = 0.98
"""Of golden texts to fp32: what an accelerator's certification will ask of this copy."""
CALIBRATION_TEXTS = 2000
"""Texts that are calibrated on at most; more take longer and change little."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Sentence pairs with human scores."""

    one: Sequence[str]
    other: Sequence[str]
    scores: Sequence[float]

    def every(self, start: int, step: int) -> Pairs:
        """A share of them, spread over the whole file."""
        return Pairs(one=self.one[start::step], other=self.other[start::step], scores=self.scores[start::step])


def read_pairs(path: Path) -> Pairs:
    """Pairs of a file: the STS benchmark's own .csv (tabs, no header), or .csv, .jsonl or .parquet with named columns.

    Columns: sentence1, sentence2, score. Raises InputError naming what is missing.
    """
    import pyarrow as pa

    try:
        if path.suffix == ".csv" and "sentence1" not in _first_line(path):
            with path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
            columns: list[list[Any]] = [[row[5] for row in rows], [row[6] for row in rows], [float(row[4]) for row in rows]]
        else:
            table = _table(path)
            columns = [table.column(name).to_pylist() for name in ("sentence1", "sentence2", "score")]
        pairs = Pairs(one=_sentences(columns[0]), other=_sentences(columns[1]), scores=[float(score) for score in columns[2]])
    except (OSError, ValueError, TypeError, KeyError, IndexError, pa.ArrowException) as error:
        hint = "expected columns sentence1, sentence2 and score, or the STS benchmark's own sts-test.csv"
        raise InputError(f"`{path}` cannot be read as sentence pairs: {error}; {hint}", param="pairs") from error
    if len(pairs.scores) < _LEAST_PAIRS:
        raise InputError(f"`{path}` has {len(pairs.scores)} pairs; at least {_LEAST_PAIRS} say anything", param="pairs")
    return pairs


def _sentences(column: Sequence[Any]) -> list[str]:
    if bad := next((row for row, text in enumerate(column, 1) if not isinstance(text, str) or not text.strip()), 0):
        raise ValueError(f"row {bad} has an empty sentence")
    return list(column)


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline()


def _table(path: Path) -> Any:
    from pyarrow import csv as arrow_csv
    from pyarrow import json as arrow_json
    from pyarrow import parquet

    readers: dict[str, Callable[[Path], Any]] = {
        ".csv": arrow_csv.read_csv,
        ".jsonl": arrow_json.read_json,
        ".parquet": parquet.read_table,
    }
    if path.suffix not in readers:
        raise ValueError(f"unknown kind of file; readable are {', '.join(readers)}")
    return readers[path.suffix](path)


def quantize(settings: Settings, pairs: Pairs, texts: Sequence[str] = (), *, most_loss: float = 1.0, say: Say = print) -> Report:
    """Make, measure and keep the int8 copy of the settings' model; an older one of the same model goes.

    pairs: measured on. texts: calibrated on; without any, the sentences of every other pair, and the rest is measured on.
    most_loss: points of Spearman x100 that it may cost. Raises ModelError when it costs more, SettingsError without NNCF.
    """
    name, folder = Store(settings.store).resolve(settings.model[0])
    spec = read_spec(folder, name=name, pooling=settings.pooling, max_length=settings.max_length)
    if not texts:
        half = pairs.every(0, 2)
        texts, pairs = [*half.one, *half.other], pairs.every(1, 2)
    texts = texts[:CALIBRATION_TEXTS]
    encoder = TextEncoder(spec)
    rows = list(calibration_rows(spec, encoder, texts))
    say(f"{name}: calibrating on {len(texts)} texts in {len(rows)} rows")
    model, tools = _quantized(spec, rows)
    staged = quantized.stage(settings.store, spec, model)
    try:
        say(f"measuring fp32 and int8 on {len(pairs.scores)} sentence pairs")
        before, after = (_embedded(settings, one, encoder, pairs) for one in (spec, staged))
        *cosines, golden = [(a * b).sum(1) for a, b in zip(before, after, strict=True)]
        cosines = np.concatenate(cosines)
        report = Report(
            of=spec.fingerprint,
            model=name,
            tools=tools,
            calibration_texts=len(texts),
            pairs=len(pairs.scores),
            spearman_fp32=_spearman(before, pairs),
            spearman=_spearman(after, pairs),
            least_cosine=float(cosines.min()),
            mean_cosine=float(cosines.mean()),
            unix=time.time(),
        )
        if not report.loss <= most_loss:
            raise ModelError(
                f"int8 costs {report.loss:.2f} points of Spearman ({report.spearman_fp32:.2f} to {report.spearman:.2f}), more than"
                f" {most_loss:g}; it was not kept. Calibrate on more texts, or raise --most-loss"
            )
        if not golden.min() >= _LEAST_COSINE:
            raise ModelError(
                f"int8 changes golden texts to cosine {golden.min():.4f}; below {_LEAST_COSINE:g} no accelerator would be"
                " certified. It was not kept; calibrate on more texts"
            )
        return quantized.publish(settings.store, staged, report)
    finally:
        quantized.discard(staged)


def calibration_rows(spec: ModelSpec, encoder: TextEncoder, texts: Sequence[str]) -> Iterator[Pack]:
    """The texts in rows as the engine packs them: of many bin lengths, with padding at their ends."""
    jobs = [Job(encoding=one, lane=Lane.BULK, queued_at=0.0, waiters=[]) for one in encoder.plain(texts)]
    shapes = dynamic_shapes(spec.max_length, ROW_TOKENS, packed=True)
    while jobs:
        plan = plan_row([job.encoding.tokens for job in jobs[:_WINDOW]], shapes)
        yield pack(jobs, plan, RowFormat.of(spec), spec.kind)
        taken = {index for bin in plan.bins for index in bin}
        jobs = [job for index, job in enumerate(jobs) if index not in taken]


def _quantized(spec: ModelSpec, rows: Sequence[Pack]) -> tuple[ov.Model, str]:
    """The quantized graph, and what made it. The native style: the plugins have int8 forms of those operations."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # it reports to Google Analytics
    try:
        import nncf
    except ImportError:
        raise SettingsError("int8 needs NNCF: pip install 'npu-proxy[quantize]'", param="precision") from None
    logging.getLogger("nncf").setLevel(logging.ERROR)
    graphs = Graphs(spec)
    model: Any = nncf.quantize(
        graphs(Form(), NATIVE),
        nncf.Dataset(rows, _inputs),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(rows),
    )
    return model, f"nncf {nncf.__version__}, openvino {ov.get_version()}"


def _inputs(row: Pack) -> dict[str, Any]:
    return dict(row.inputs)


def _embedded(settings: Settings, spec: ModelSpec, encoder: TextEncoder, pairs: Pairs) -> Sequence[npt.NDArray[Any]]:
    """Vectors of both sides of the pairs and of the golden texts, on the CPU."""

    def parts(settings: Settings, _stopping: object) -> Parts:
        return Parts(spec=spec, encoder=encoder, device=OpenVinoCpu(spec, threads=settings.threads))

    with Engine(settings=settings, parts=parts) as engine:
        return [np.stack(list(engine.stream(side))) for side in (pairs.one, pairs.other, GOLDEN_TEXTS)]


def _spearman(vectors: Sequence[npt.NDArray[Any]], pairs: Pairs) -> float:
    from scipy.stats import spearmanr  # NNCF brings it

    result: Any = spearmanr((vectors[0] * vectors[1]).sum(1), pairs.scores)
    return 100 * float(result.statistic)
