"""Compile every batch shape of every golden family and of the default model with the vendor's NPU compiler, and say what it says.

The microseconds are the compiler's own cost model of one inference: good for ranking graphs and for catching regressions,
not a measurement. It warns about kernels it does not model. Nothing runs on an NPU here, and no vector is checked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import openvino as ov

from npu_proxy.batch import NATIVE_STYLE, BatchShape, GraphShape
from npu_proxy.devices.graphs import Graphs
from npu_proxy.devices.shapes import ROW_TOKENS, static_shapes
from npu_proxy.engine.packing import plan_batch
from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.errors import ModelError
from npu_proxy.models.layout import read_spec
from npu_proxy.models.quantized import int8_spec
from npu_proxy.models.store import ModelStore
from npu_proxy.settings import Settings
from npu_proxy.spec import ModelSpec
from npu_proxy.types import Pooling

HERE = Path(__file__).parent
PLATFORMS = {"3720": "Meteor, Arrow Lake", "4000": "Lunar Lake", "5010": "Panther Lake"}
ANSI = re.compile(r"\x1b\[[0-9;]*m")


COMPARED = "1x32x1,1x64x1,1x128x1,1x256x1,1x128,1x256,8x32,4x64,2x128,16x32,8x64,4x128,2x256,16x64,8x128,4x256"
"""For the default model: one text per row in buckets, several texts per row, and rows of bins."""


@dataclass(frozen=True)
class Row:
    model: str
    shape: str
    form: str
    tokens: int
    segments: int
    platform: str
    tries: int
    seconds: float
    blob: int
    microseconds: float | None
    unmodelled: str
    error: str


MEASURED = ("seconds", "blob", "microseconds", "unmodelled", "error")
WAYS: dict[str, Sequence[str]] = {
    "padded to 256": ["1x256"],
    "padded to 32, 64, 128, 256": ["1x32", "1x64", "1x128", "1x256"],
    "packed 1x256": ["1x256"],
    "bins 2x256": ["2x256"],
    "bins 4x128, 2x256, 1x128 (ours)": ["4x128", "2x256", "1x128"],
    "bins 8x64, 4x128, 2x256": ["8x64", "4x128", "2x256"],
    "bins 16x32, 8x64, 4x128, 2x256": ["16x32", "8x64", "4x128", "2x256"],
    "bins 16x64, 8x128, 4x256": ["16x64", "8x128", "4x256"],
}


def compile_one(work: Path, file: Path, platform: str, limit: float) -> tuple[float, int, float | None, str, str]:
    """Seconds, blob bytes, estimate, kernels outside the cost model, error."""
    environment = {**os.environ, "WINEPREFIX": str(work / "prefix"), "WINEDEBUG": "-all"}
    blob, said = work / "out.blob", work / "said.txt"
    blob.unlink(missing_ok=True)
    options = [f"NPU_PLATFORM={platform}", "NPU_COMPILER_TYPE=PLUGIN", "LOG_LEVEL=LOG_INFO"]
    command = ["/usr/lib/wine/wine64", "./npuc.exe", "NPU", f"Z:{file}", f"Z:{blob}", *options]
    start = time.monotonic()
    with said.open("wb") as output:  # a file, not a pipe: the wine server keeps a pipe open
        try:
            subprocess.run(
                command, check=False, cwd=work / "run", env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return time.monotonic() - start, 0, None, "", f"no end after {limit:g} s"
    text = ANSI.sub("", said.read_text(errors="replace"))
    estimate = re.search(r"Estimated inference latency: ([\d.]+) us", text)
    unmodelled = re.search(r"unsupported by VPUNN[^\[]*\[([^\]]*)\]", text)
    done = re.search(r"COMPILE_OK NPU ([\d.]+)s", text)
    error = "" if done else (text[text.find("MSG:") :][:400].replace("\n", " ") if "MSG:" in text else text[-200:])
    return (
        float(done[1]) if done else time.monotonic() - start,
        blob.stat().st_size if blob.exists() else 0,
        float(estimate[1]) if estimate else None,
        unmodelled[1].replace("builtin_", "") if unmodelled else "",
        error,
    )


def shapes_of(text: str) -> list[BatchShape]:
    """`8x64` or `8x64x8` (bins, positions, segments per bin), separated by commas."""
    shapes: list[BatchShape] = []
    for shape in text.split(","):
        bins, positions, *segments = map(int, shape.split("x"))
        shapes.append(BatchShape(bins=bins, positions=positions, segments=segments[0] if segments else max(1, positions // 8)))
    return shapes


def models() -> list[ModelSpec]:
    """The golden models (one per pooling, family and output type), and of the default model and its int8 copy in the store."""
    golden = Path(__file__).parents[2] / "tests" / "golden"
    specs = [read_spec(folder) for folder in sorted(golden.iterdir()) if (folder / "texts.json").exists()]
    specs.append(read_spec(golden / "bge_m3", name="bge_m3, three answers", pooling=Pooling.NONE))
    store = Settings().store
    stored = ModelStore(store).find(Settings().model[0])
    if stored is None:
        return specs
    spec = read_spec(stored.folder, name=stored.name)
    with suppress(ModelError):  # it was never quantized
        specs.append(replace(int8_spec(store, spec), name=f"{spec.name} int8"))
    return [*specs, spec]


def measure(spec: ModelSpec, shape: BatchShape, platform: str, work: Path, limit: float) -> Row:
    """Compile one graph for one platform, and again where that fails: under Wine it sometimes does."""
    file = work / "model.xml"
    ov.save_model(Graphs(spec)(GraphShape.static(shape), NATIVE_STYLE), file, compress_to_fp16=True)
    form = "padded" if shape.segments == 1 else "packed" if shape.bins == 1 else "bins"
    row = Row(spec.name, str(shape), form, shape.tokens, shape.segments, platform, 1, *compile_one(work, file, platform, limit))
    if row.error:
        row = replace(row, **dict(zip(MEASURED, compile_one(work, file, platform, limit), strict=True)), tries=2)
    return row


def useful(
    rows: Sequence[Row], lengths: Sequence[int], ways: Mapping[str, Sequence[str]]
) -> list[tuple[str, str, float, float, int]]:
    """For each platform and way: microseconds per useful token, waste and rows, when texts of these lengths are all waiting."""
    found = []
    for platform in sorted({row.platform for row in rows}):
        for way, names in ways.items():
            form = "padded" if way.startswith("padded") else ""
            estimates = {
                row.shape: row
                for row in rows
                if row.platform == platform and row.shape in names and (row.form == "padded") == bool(form) and row.microseconds
            }
            if len(estimates) < len(names):
                continue
            shapes = [
                BatchShape(
                    bins=int(name.split("x")[0]),
                    positions=int(name.split("x")[1]),
                    segments=row.segments,
                    work=row.microseconds or 0,
                )
                for name, row in estimates.items()
            ]
            total, positions, count = _run(lengths, shapes)
            found.append((platform, way, total / sum(lengths), positions / sum(lengths), count))
    return found


def _run(lengths: Sequence[int], shapes: Sequence[BatchShape]) -> tuple[float, int, int]:
    """Microseconds, positions and rows, planned as the engine plans batches, from a window of 512 texts."""
    left, total, positions, count = list(lengths), 0.0, 0, 0
    while left:
        window = left[:512]
        plan = plan_batch(window, shapes)
        taken = set(plan.indices)
        left = [length for index, length in enumerate(window) if index not in taken] + left[512:]
        total, positions, count = total + plan.shape.work, positions + plan.shape.tokens, count + 1
    return total, positions, count


def corpus_lengths(spec: ModelSpec, data: Path, count: int = 3000) -> list[int]:
    """Token lengths of texts of the corpus, chosen at random."""
    texts = [json.loads(line)["text"] for line in (data / "corpus.jsonl").read_text(encoding="utf-8").split("\n") if line]
    chosen = np.random.default_rng(0).permutation(len(texts))[:count]
    return [encoding.tokens for encoding in RequestTokenizer(spec).plain([texts[index] for index in chosen])]


def write(output: Path, rows: Sequence[Row], summary: Sequence[tuple[str, str, float, float, int]]) -> None:
    """The figures as JSON, and as a page."""
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    lines = ["# What the NPU compiler says", "", (__doc__ or "").strip(), "", f"OpenVINO {ov.__version__}. Platforms: "]
    lines[-1] += ", ".join(f"{number} is {name}" for number, name in PLATFORMS.items()) + "."
    if summary:
        lines += [
            "",
            "Estimated microseconds per useful token, 3,000 texts of the corpus, rows planned as the engine plans them:",
            "",
        ]
        lines += ["| platform | rows | us per token | positions per token | rows |", "| --- | --- | --- | --- | --- |"]
        lines += [
            f"| {platform} | {way} | {per_token:.2f} | {waste:.3f} | {count} |"
            for platform, way, per_token, waste, count in summary
        ]
    lines += ["", "Every graph:", "", "| model | row | form | platform | compile, s | blob, MB | estimate, us | us per position |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        estimate = (
            f"{row.microseconds:.0f} | {row.microseconds / row.tokens:.2f}" if row.microseconds else f"{row.error or '-'} | -"
        )
        lines.append(
            f"| {row.model} | {row.shape} | {row.form} | {row.platform} | {row.seconds:.1f} | {row.blob / 1e6:.1f} | {estimate} |"
        )
    output.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", default="", help="bins x positions [x segments], separated by commas; default: what the device compiles"
    )
    parser.add_argument("--platforms", default=",".join(PLATFORMS))
    parser.add_argument("--models", default="", help="only models whose name holds this")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds per compilation")
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "shared" / "data", help="folder of corpus.jsonl")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "table.json")
    parser.add_argument("--work", type=Path, default=Path(os.environ.get("WORK", HERE / ".work")))
    arguments = parser.parse_args()
    rows: list[Row] = []
    specs = [spec for spec in models() if arguments.models in spec.name]
    print(f"{'model':40} {'row':>7} {'form':>7} {'platform':>8} {'compile':>8} {'blob':>9} {'estimate':>9} {'per position':>12}")
    for spec in specs:
        for shape in shapes_of(arguments.shapes) if arguments.shapes else shapes_for(spec):
            for platform in arguments.platforms.split(","):
                row = measure(spec, shape, platform, arguments.work, arguments.limit)
                rows.append(row)
                estimate = f"{row.microseconds:6.0f} us {row.microseconds / row.tokens:7.2f} us" if row.microseconds else row.error
                print(
                    f"{spec.name:40} {row.shape:>7} {row.form:>7} {platform:>8} {row.seconds:6.1f} s"
                    f" {row.blob / 1e6:6.1f} MB {estimate}",
                    flush=True,
                )
    real = [spec for spec in specs if spec.name == Settings().model[0]]
    summary = []
    if real and (arguments.data / "corpus.jsonl").exists():
        summary = useful([row for row in rows if row.model == real[0].name], corpus_lengths(real[0], arguments.data), WAYS)
    for platform, way, per_token, waste, count in summary:
        print(f"{platform}  {way:40} {per_token:6.2f} us per useful token, {waste:.3f} positions per token, {count} rows")
    write(arguments.output, rows, summary)
    failed = [row for row in rows if row.error]
    print(f"{len(rows) - len(failed)} of {len(rows)} compiled; the estimates are the vendor's cost model, not measurements")
    raise SystemExit(1 if failed else 0)


def shapes_for(spec: ModelSpec) -> list[BatchShape]:
    """What the device compiles; for the default model also what it is compared with."""
    own = static_shapes(spec.max_length, ROW_TOKENS, packed=True)
    compared = shapes_of(COMPARED) if spec.name == Settings().model[0] else []
    return list(dict.fromkeys([*own, *compared]))


if __name__ == "__main__":
    main()
