"""Makes an int8 copy of a model (weights and activations), and keeps it only if it is nearly as good as fp32.

Quality is measured first: the Spearman correlation of cosines with human scores of sentence pairs (STS-B), for fp32 and int8, on
the CPU, in the same run.
"""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from npu_proxy.batch import NATIVE_STYLE, Batch, GraphShape
from npu_proxy.bulk.files import find_inputs
from npu_proxy.bulk.texts import read_fields
from npu_proxy.devices.cpu import OpenVinoCpu
from npu_proxy.devices.graphs import Graphs
from npu_proxy.devices.shapes import ROW_TOKENS, dynamic_shapes
from npu_proxy.engine.components import EngineComponents
from npu_proxy.engine.engine import Engine
from npu_proxy.engine.golden import GOLDEN_TEXTS, GoldenBatches
from npu_proxy.engine.packing import pack, plan_batch
from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.errors import InputError, ModelError, SettingsError
from npu_proxy.models import quantized
from npu_proxy.models.quantized import Int8Report
from npu_proxy.models.resolve import read_model
from npu_proxy.settings import Settings
from npu_proxy.spec import ModelSpec

Say = Callable[[str], None]
_WINDOW = 512
_LEAST_PAIRS = 100
_LEAST_COSINE = 0.98
"""The minimum cosine of golden texts to fp32 that the certification of an accelerator requires of this copy."""
CALIBRATION_TEXTS = 2000
"""Maximum number of texts to calibrate on; more take longer and change little."""


@dataclass(frozen=True, kw_only=True)
class SentencePairs:
    """Sentence pairs with human scores."""

    left: Sequence[str]
    right: Sequence[str]
    scores: Sequence[float]

    def every(self, start: int, step: int) -> SentencePairs:
        """Every ``step``-th pair from ``start``, so that the selection is spread over the whole file."""
        return SentencePairs(left=self.left[start::step], right=self.right[start::step], scores=self.scores[start::step])


def read_pairs(path: Path) -> SentencePairs:
    """Read pairs from the STS benchmark's .csv (tabs, no header), or from a .csv, .jsonl or .parquet file with named columns.

    The columns are sentence1, sentence2 and score. Raises InputError naming what is missing.
    """
    try:
        columns = _sts_benchmark(path) if _is_sts_benchmark(path) else _columns(path)
        pairs = SentencePairs(
            left=_sentences(columns[0]), right=_sentences(columns[1]), scores=[float(score) for score in columns[2]]
        )
    except (InputError, OSError, ValueError, TypeError, KeyError, IndexError) as error:
        hint = "expected the columns sentence1, sentence2 and score, or the STS benchmark's sts-test.csv"
        raise InputError(f"`{path}` cannot be read as sentence pairs: {error}; {hint}", param="pairs") from error
    if len(pairs.scores) < _LEAST_PAIRS:
        raise InputError(f"`{path}` has only {len(pairs.scores)} pairs; at least {_LEAST_PAIRS} are required", param="pairs")
    return pairs


def _sentences(column: Sequence[Any]) -> list[str]:
    if bad := next((row for row, text in enumerate(column, 1) if not isinstance(text, str) or not text.strip()), 0):
        raise ValueError(f"row {bad} has an empty sentence")
    return list(column)


def _is_sts_benchmark(path: Path) -> bool:
    if path.suffix != ".csv":
        return False
    with path.open(encoding="utf-8") as file:
        return "sentence1" not in file.readline()


def _sts_benchmark(path: Path) -> list[list[Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [[row[5] for row in rows], [row[6] for row in rows], [float(row[4]) for row in rows]]


def _columns(path: Path) -> list[list[Any]]:
    names = ("sentence1", "sentence2", "score")
    rows = [values for _, values in read_fields(find_inputs([str(path)]), names)]
    return [list(column) for column in zip(*rows, strict=True)]


def quantize(
    settings: Settings, pairs: SentencePairs, texts: Sequence[str] = (), *, most_loss: float = 1.0, say: Say = print
) -> Int8Report:
    """Make, measure and keep an int8 copy of the settings' model. The newest copy of a model is the one that is served.

    pairs: measured on. texts: calibrated on; if empty, the sentences of every other pair are, and the other pairs are measured on.
    most_loss: maximum loss in points of Spearman correlation x100. Raises ModelError if the loss is larger or an accelerator could
    not be certified, and SettingsError if NNCF is not installed.
    """
    spec = read_model(settings)
    if not texts:
        half = pairs.every(0, 2)
        texts, pairs = [*half.left, *half.right], pairs.every(1, 2)
    texts = texts[:CALIBRATION_TEXTS]
    tokenizer = RequestTokenizer(spec)
    batches = list(calibration_batches(spec, tokenizer, texts))
    say(f"{spec.name}: calibrating on {len(texts)} texts in {len(batches)} batches")
    model, tools = _quantized(spec, batches)
    staged = quantized.stage(settings.store, spec, model)
    try:
        say(f"measuring fp32 and int8 on {len(pairs.scores)} sentence pairs")
        before, after = (_embed(settings, version, tokenizer, pairs) for version in (spec, staged))
        *cosines, golden = [(a * b).sum(1) for a, b in zip(before, after, strict=True)]
        cosines = np.concatenate(cosines)
        report = Int8Report(
            of=spec.fingerprint,
            model=spec.name,
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
                f"int8 loses {report.loss:.2f} points of Spearman correlation ({report.spearman_fp32:.2f} to"
                f" {report.spearman:.2f}), more than {most_loss:g}; it was not kept. Calibrate on more texts, or raise --most-loss"
            )
        if not golden.min() >= _LEAST_COSINE:
            raise ModelError(
                f"the cosine of a golden text in int8 to fp32 is {golden.min():.4f}; accelerators need at least {_LEAST_COSINE:g}"
                " to be certified. The copy was not kept; calibrate on more texts"
            )
        return quantized.publish(settings.store, staged, report)
    finally:
        quantized.discard(staged)


def calibration_batches(spec: ModelSpec, tokenizer: RequestTokenizer, texts: Sequence[str]) -> Iterator[Batch]:
    """The texts in batches as the engine packs them: with many bin lengths, and padding at the ends of bins."""
    encodings = tokenizer.plain(texts)
    shapes = dynamic_shapes(spec.max_length, ROW_TOKENS, packed=True)
    while encodings:
        plan = plan_batch([encoding.tokens for encoding in encodings[:_WINDOW]], shapes)
        yield pack(encodings, plan, spec.batch_layout, spec.output_type)
        packed = set(plan.indices)
        encodings = [encoding for index, encoding in enumerate(encodings) if index not in packed]


def _quantized(spec: ModelSpec, batches: Sequence[Batch]) -> tuple[ov.Model, str]:
    """The quantized graph and the versions of the tools. In the native style, whose operations plugins have in int8."""
    try:
        import nncf
    except ImportError:
        raise SettingsError("int8 needs NNCF: pip install 'npu-proxy[quantize]'", param="precision") from None
    logging.getLogger("nncf").setLevel(logging.ERROR)
    graphs = Graphs(spec)
    model: Any = nncf.quantize(
        graphs(GraphShape(), NATIVE_STYLE),
        nncf.Dataset(batches, _inputs),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(batches),
    )
    return model, f"nncf {nncf.__version__}, openvino {ov.get_version()}"


def _inputs(batch: Batch) -> dict[str, Any]:
    return dict(batch.inputs)


def _embed(settings: Settings, spec: ModelSpec, tokenizer: RequestTokenizer, pairs: SentencePairs) -> Sequence[npt.NDArray[Any]]:
    """Vectors of the left and right sentences and of the golden texts, computed on the CPU."""

    def components(settings: Settings, _stopping: object) -> EngineComponents:
        golden = GoldenBatches(tokenizer, spec)
        device = OpenVinoCpu(spec, threads=settings.threads, golden=golden)
        return EngineComponents(spec=spec, tokenizer=tokenizer, device=device, canaries=golden.canaries)

    with Engine(settings=settings, components=components) as engine:
        return [np.stack(list(engine.stream(side))) for side in (pairs.left, pairs.right, GOLDEN_TEXTS)]


def _spearman(vectors: Sequence[npt.NDArray[Any]], pairs: SentencePairs) -> float:
    from scipy.stats import spearmanr  # NNCF depends on it

    result: Any = spearmanr((vectors[0] * vectors[1]).sum(1), pairs.scores)
    return 100 * float(result.statistic)
