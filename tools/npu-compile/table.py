"""Compile every row shape of every golden family and of the default model with the vendor's NPU compiler, and say what it says.

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
from dataclasses import asdict, dataclass
from pathlib import Path

import openvino as ov

from npu_proxy.graph.build import build, family
from npu_proxy.graph.packed import NATIVE, Form, RowShape
from npu_proxy.models.layout import read_spec
from npu_proxy.models.store import Store
from npu_proxy.models.weights import Tensors
from npu_proxy.settings import Settings
from npu_proxy.types import ModelSpec

HERE = Path(__file__).parent
PLATFORMS = {"3720": "Meteor, Arrow Lake", "4000": "Lunar Lake", "5010": "Panther Lake"}
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Row:
    model: str
    shape: str
    tokens: int
    segments: int
    platform: str
    seconds: float
    blob: int
    microseconds: float | None
    unmodelled: str
    error: str


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
            subprocess.run(command, cwd=work / "run", env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=limit)
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


def shapes_of(text: str) -> list[RowShape]:
    """`8x64` or `8x64x8` (bins, positions, segments a bin), separated by commas."""
    shapes = []
    for one in text.split(","):
        bins, positions, *segments = map(int, one.split("x"))
        shapes.append(RowShape(bins=bins, positions=positions, segments=segments[0] if segments else max(1, positions // 8)))
    return shapes


def models() -> list[ModelSpec]:
    """The golden models (one a pooling and family) and the default model where it is in the store."""
    golden = Path(__file__).parents[2] / "tests" / "golden"
    specs = [read_spec(folder) for folder in sorted(golden.iterdir()) if (folder / "modules.json").exists()]
    stored = Store(Settings().store).find(Settings().model)
    return [*specs, *([read_spec(stored.folder, name=stored.name)] if stored else [])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="", help="bins x positions [x segments], by commas; default: what the device compiles")
    parser.add_argument("--platforms", default=",".join(PLATFORMS))
    parser.add_argument("--models", default="", help="only models whose name holds this")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds a compilation")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "table.json")
    parser.add_argument("--work", type=Path, default=Path(os.environ.get("WORK", HERE / ".work")))
    arguments = parser.parse_args()
    rows: list[Row] = []
    print(f"{'model':44} {'shape':>8} {'platform':>8} {'compile':>8} {'blob':>9} {'estimate':>10} {'a token':>8}")
    for spec in models():
        if arguments.models not in spec.name:
            continue
        weights = Tensors(spec.weight_files, family(spec).canonical_name)
        for shape in shapes_of(arguments.shapes) if arguments.shapes else device_shapes(spec):
            file = arguments.work / "model.xml"
            ov.save_model(build(spec, weights, Form.of(shape), NATIVE), file, compress_to_fp16=True)
            for platform in arguments.platforms.split(","):
                found = Row(
                    spec.name,
                    str(shape),
                    shape.tokens,
                    shape.segments,
                    platform,
                    *compile_one(arguments.work, file, platform, arguments.limit),
                )
                rows.append(found)
                a_token = f"{found.microseconds / shape.tokens:7.2f}" if found.microseconds else "-"
                print(
                    f"{spec.name:44} {found.shape:>8} {platform:>8} {found.seconds:6.1f} s {found.blob / 1e6:6.1f} MB"
                    f" {found.microseconds or 0:7.0f} us {a_token:>8} {found.error}",
                    flush=True,
                )
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    failed = [row for row in rows if row.error]
    print(f"{len(rows) - len(failed)} of {len(rows)} compiled; the estimates are the vendor's cost model, not measurements")
    raise SystemExit(1 if failed else 0)


def device_shapes(spec: ModelSpec) -> list[RowShape]:
    from npu_proxy.devices.chain import static_shapes
    from npu_proxy.devices.kinds import TARGETS

    return static_shapes(TARGETS["npu"].kind, spec, Settings())


if __name__ == "__main__":
    main()
