"""The int8 copies of models in the store, each with its own fingerprint and a report of its measured quality.

store/quantized/FINGERPRINT/graph.xml, graph.bin   the graph, for batches of any shape
store/quantized/FINGERPRINT/report.json            its model, file sizes and accuracy

A copy is never changed, and is removed only together with its model, because a server may read it again at any time. The newest
copy of a model is the one that is used.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from npu_proxy.errors import ModelError, PullError
from npu_proxy.models.fingerprint import file_sha256
from npu_proxy.spec import ModelSpec
from npu_proxy.system import private_folder

_GRAPH, _REPORT = "graph.xml", "report.json"
_FILES = (_GRAPH, "graph.bin")


class Int8Report(msgspec.Struct, frozen=True, kw_only=True):
    """Describes an int8 copy.

    spearman_fp32, spearman: Spearman correlation x100 of cosines with human scores over ``pairs`` pairs, in fp32 and in int8.
    """

    of: str
    """Fingerprint of the model it was made from."""
    model: str
    tools: str
    calibration_texts: int
    pairs: int
    spearman_fp32: float
    spearman: float
    least_cosine: float
    mean_cosine: float
    unix: float
    fingerprint: str = ""
    files: Mapping[str, int] = {}
    """Size in bytes by file name."""

    @property
    def loss(self) -> float:
        """Points of Spearman correlation that int8 loses."""
        return self.spearman_fp32 - self.spearman


def stage(store: Path, spec: ModelSpec, model: Any) -> ModelSpec:
    """Write a graph to a staging folder, and return its spec. Raises PullError if the store cannot be written."""
    import openvino as ov

    folder = None
    try:
        private_folder(store / "quantized")
        folder = Path(tempfile.mkdtemp(prefix=".staging-", dir=store / "quantized"))
        ov.save_model(model, folder / _GRAPH, compress_to_fp16=False)
    except (OSError, RuntimeError) as error:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise PullError(f"the store cannot be written: {error}; free space or set `store`") from error
    digest = hashlib.sha256(f"int8 {spec.fingerprint}".encode())
    for name in _FILES:
        digest.update(file_sha256(folder / name).encode())
    return replace(spec, precision="int8", graph=folder / _GRAPH, fingerprint=digest.hexdigest()[:16])


def discard(staged: ModelSpec) -> None:
    """Remove the folder that ``stage`` wrote."""
    assert staged.graph is not None
    shutil.rmtree(staged.graph.parent, ignore_errors=True)


def publish(store: Path, staged: ModelSpec, report: Int8Report) -> Int8Report:
    """Move a staged graph to where it is served from. Raises PullError if the store cannot be written."""
    assert staged.graph is not None
    folder = staged.graph.parent
    files = {name: (folder / name).stat().st_size for name in _FILES}
    report = msgspec.structs.replace(report, fingerprint=staged.fingerprint, files=files)
    target = store / "quantized" / staged.fingerprint
    try:
        (folder / _REPORT).write_bytes(msgspec.json.format(msgspec.json.encode(report)))
        if target.exists():  # the same graph, measured again
            (folder / _REPORT).replace(target / _REPORT)
        else:
            folder.rename(target)
    except OSError as error:
        raise PullError(f"the store cannot be written: {error.strerror or error}; free space or set `store`") from error
    return report


def int8_reports(store: Path, of: str | None = None) -> list[Int8Report]:
    """The readable reports of all int8 copies in the store, or only of copies of the model with the fingerprint ``of``."""
    reports: list[Int8Report] = []
    for file in sorted((store / "quantized").glob(f"[!.]*/{_REPORT}")):
        try:
            reports.append(msgspec.json.decode(file.read_bytes(), type=Int8Report))
        except (OSError, ValueError):
            continue
    return [report for report in reports if of in (None, report.of)]


def int8_spec(store: Path, spec: ModelSpec) -> ModelSpec:
    """The spec of a model's newest int8 copy. Raises ModelError if there is none or it is damaged."""
    report = max(int8_reports(store, spec.fingerprint), key=lambda report: report.unix, default=None)
    if report is None:
        raise ModelError(f"{spec.name} has no int8 copy in the store; make it with `npu-proxy quantize --pairs FILE {spec.name}`")
    folder = store / "quantized" / report.fingerprint
    for name, size in report.files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise ModelError(f"{folder / name} is damaged; make the int8 copy again with `npu-proxy quantize`")
    return replace(spec, precision="int8", graph=folder / _GRAPH, fingerprint=report.fingerprint)


def remove_int8(store: Path, fingerprint: str) -> None:
    """Remove every int8 copy of a model."""
    for report in int8_reports(store, fingerprint):
        shutil.rmtree(store / "quantized" / report.fingerprint, ignore_errors=True)
