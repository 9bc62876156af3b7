"""The int8 copies of models in the store, each under a fingerprint of its own and with what it was measured to be worth.

store/quantized/FINGERPRINT/graph.xml, graph.bin   the graph, rows of any shape
store/quantized/FINGERPRINT/report.json            of which model it is, its sizes, its accuracy

A copy is never changed, and goes only with its model: a server may have to read it again at any time. The newest counts.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import openvino as ov

from npu_proxy.errors import ModelError, PullError
from npu_proxy.models.fingerprint import file_sha256
from npu_proxy.types import ModelSpec

_GRAPH, _REPORT = "graph.xml", "report.json"
_FILES = (_GRAPH, "graph.bin")


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What an int8 copy is. spearman: of cosines against human scores, x100, over ``pairs`` pairs, before and after."""

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
    """Bytes by name."""

    @property
    def loss(self) -> float:
        """Points of Spearman that int8 costs."""
        return self.spearman_fp32 - self.spearman


def stage(store: Path, spec: ModelSpec, model: ov.Model) -> ModelSpec:
    """Write a graph where it is not served from yet; the spec of it. Raises PullError when the disk is full."""
    folder = None
    try:
        (store / "quantized").mkdir(parents=True, exist_ok=True)
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
    """Remove what ``stage`` wrote."""
    assert staged.graph is not None
    shutil.rmtree(staged.graph.parent, ignore_errors=True)


def publish(store: Path, staged: ModelSpec, report: Report) -> Report:
    """Let a staged graph be served. Raises PullError when the store cannot be written."""
    assert staged.graph is not None
    folder = staged.graph.parent
    files = {name: (folder / name).stat().st_size for name in _FILES}
    report = msgspec.structs.replace(report, fingerprint=staged.fingerprint, files=files)
    target = store / "quantized" / staged.fingerprint
    try:
        (folder / _REPORT).write_bytes(msgspec.json.format(msgspec.json.encode(report)))
        if target.exists():  # the very same graph, measured again
            (folder / _REPORT).replace(target / _REPORT)
        else:
            folder.rename(target)
    except OSError as error:
        raise PullError(f"the store cannot be written: {error.strerror or error}; free space or set `store`") from error
    return report


def reports(store: Path) -> list[Report]:
    """Of every int8 copy in the store that can be read."""
    found: list[Report] = []
    for file in sorted((store / "quantized").glob(f"[!.]*/{_REPORT}")):
        try:
            found.append(msgspec.json.decode(file.read_bytes(), type=Report))
        except (OSError, ValueError):
            continue
    return found


def int8_spec(store: Path, spec: ModelSpec) -> ModelSpec:
    """The spec of a model's int8 copy. Raises ModelError saying how to make it where there is none, or it is damaged."""
    report = max((one for one in reports(store) if one.of == spec.fingerprint), key=lambda one: one.unix, default=None)
    if report is None:
        raise ModelError(f"{spec.name} has no int8 copy in the store; make it with `npu-proxy quantize --pairs FILE {spec.name}`")
    folder = store / "quantized" / report.fingerprint
    for name, size in report.files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise ModelError(f"{folder / name} is damaged; make the int8 copy again with `npu-proxy quantize`")
    return replace(spec, precision="int8", graph=folder / _GRAPH, fingerprint=report.fingerprint)


def remove(store: Path, fingerprint: str) -> None:
    """Remove every int8 copy of a model."""
    for report in reports(store):
        if report.of == fingerprint:
            shutil.rmtree(store / "quantized" / report.fingerprint, ignore_errors=True)
