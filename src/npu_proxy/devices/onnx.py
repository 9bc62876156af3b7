"""ONNX Runtime, in this process: runs the ONNX file of a model's repository with the execution providers that are installed.

The file is another copy of the model, and may be another precision, so vectors of this device have a fingerprint of their
own and it never stands in a chain. It takes one padded text a line, as exported graphs do; pooling happens here.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npu_proxy.devices.base import GoldenRow, Report, check_vectors
from npu_proxy.devices.failure import Failure, RowError, first_line
from npu_proxy.devices.openvino import ROOM_SECONDS
from npu_proxy.devices.shapes import dynamic_shapes
from npu_proxy.errors import ModelError, SettingsError
from npu_proxy.graph.packed import RowShape
from npu_proxy.models.fingerprint import file_sha256
from npu_proxy.types import Kind, ModelSpec, Output, Pack, Pooling, Shaped

_KNOWN = ("input_ids", "attention_mask", "token_type_ids")


def with_onnx(spec: ModelSpec, file: str) -> ModelSpec:
    """The spec of the same model computed from ``file`` (relative to its folder). Raises ModelError when it cannot be."""
    path = (spec.folder / file).resolve()
    if not path.is_relative_to(spec.folder.resolve()) or not path.is_file():
        raise ModelError(f"{spec.name} has no file `{file}`; set `onnx_file` to one of its own, such as `onnx/model.onnx`")
    if spec.dense:
        raise ModelError(f"{spec.name} has Dense modules behind its encoder; device `onnx` does not compute them")
    if spec.kind not in (Kind.DENSE, Kind.SCORES) or spec.pooling is Pooling.NONE:
        raise ModelError(f"{spec.name} gives {spec.kind} answers; device `onnx` computes vectors and scores only")
    digest = hashlib.sha256(f"onnx {spec.fingerprint} {file_sha256(path)}".encode())
    for part in sorted(path.parent.glob(f"{path.name}_data*")):
        digest.update(file_sha256(part).encode())
    return replace(spec, fingerprint=digest.hexdigest()[:16])


class OnnxDevice:
    """A Device over one ONNX Runtime session, which is thread-safe."""

    name = "onnx"
    kind = "onnx"
    ready = True

    def __init__(
        self, spec: ModelSpec, file: Path, *, threads: int, row_tokens: int = 512, streams: int = 1, golden: GoldenRow | None = None
    ) -> None:
        """threads: for one row. Raises SettingsError without ONNX Runtime, ModelError for a graph it cannot feed."""
        try:
            import onnxruntime
        except ImportError:
            raise SettingsError("device `onnx` needs ONNX Runtime: pip install 'npu-proxy[onnx]'", param="device") from None
        options: Any = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self._session: Any = onnxruntime.InferenceSession(str(file), options, providers=onnxruntime.get_available_providers())
        except Exception as error:  # the runtime raises classes of its own for whatever is wrong with a file
            raise ModelError(f"{file.name} cannot be loaded: {first_line(error)}") from error
        self.providers: list[str] = self._session.get_providers()
        self._inputs = [wanted.name for wanted in self._session.get_inputs()]
        unknown = [name for name in self._inputs if name not in _KNOWN]
        self._scores = spec.kind is Kind.SCORES
        wanted = 2 if self._scores else 3
        tokens = [output.name for output in self._session.get_outputs() if len(output.shape) == wanted]
        if unknown or not tokens:
            answer = "scores" if self._scores else "token vectors"
            raise ModelError(f"{file.name}: inputs {self._inputs}; needs only {', '.join(_KNOWN)}, and {answer} as an output")
        self._output = tokens[0]
        self._pooling = spec.pooling
        self._width = spec.width
        self._golden = golden
        self._busy = threading.BoundedSemaphore(streams)
        self.streams = self.most_streams = streams
        self.shapes: Sequence[RowShape] = dynamic_shapes(spec.max_length, row_tokens, packed=False)

    def takes(self, shape: Shaped) -> bool:
        """Any row: its texts are laid out anew."""
        return True

    def infer(self, pack: Pack, late: float = math.inf) -> Output:
        """Vectors [bins, segments, width] float32. Raises RowError."""
        ids, mask, types = _lines(pack)
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        if not self._busy.acquire(timeout=ROOM_SECONDS):
            raise RowError(Failure.BUSY, f"onnx had no room for a row within {ROOM_SECONDS:g} seconds")
        start = time.perf_counter()
        try:
            hidden = self._session.run([self._output], {name: feed[name] for name in self._inputs})[0]
        except Exception as error:  # the runtime raises classes of its own
            raise RowError(Failure.ERROR, f"onnx failed: {first_line(error)}") from error
        finally:
            self._busy.release()
        vectors = np.zeros([pack.shape.bins, pack.shape.segments, self._width], np.float32)
        for line, slot in enumerate(pack.slots):
            count = int(mask[line].sum())
            vectors[slot.bin, slot.segment] = hidden[line] if self._scores else _pool(self._pooling, hidden[line, :count])
        return Output(vectors, self.name, time.perf_counter() - start)

    def reports(self) -> Sequence[Report]:
        """It serves."""
        return [Report(name=self.name, kind=self.kind, state="serving", reason=", ".join(self.providers))]

    def probe(self) -> None:
        """Run the smallest golden row. Raises DeviceError."""
        if self._golden is not None:
            row = self._golden(min(self.shapes, key=lambda shape: shape.tokens))
            check_vectors(self.name, row, self.infer(row).vectors)

    def close(self) -> None:
        """Nothing is held outside this object."""


def _lines(pack: Pack) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ids, mask and types [texts, longest] int64 of a row's texts, one a line."""
    counts = [job.encoding.tokens for job in pack.jobs]
    ids = np.zeros([len(counts), max(counts)], np.int64)
    mask, types = np.zeros_like(ids), np.zeros_like(ids)
    for line, (job, count) in enumerate(zip(pack.jobs, counts, strict=True)):
        ids[line, :count] = job.encoding.ids
        mask[line, :count] = 1
        if job.encoding.types is not None:
            types[line, :count] = job.encoding.types
    return ids, mask, types


def _pool(pooling: Pooling, hidden: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """One text's token vectors [tokens, width] to its vector [width]; the definitions are those of graph/heads.py."""
    count = len(hidden)
    match pooling:
        case Pooling.CLS:
            return hidden[0]
        case Pooling.LAST_TOKEN:
            return hidden[-1]
        case Pooling.MAX:
            return hidden.max(axis=0)
        case Pooling.MEAN:
            return hidden.mean(axis=0, dtype=np.float32)
        case Pooling.MEAN_SQRT_LENGTH:
            return hidden.sum(axis=0, dtype=np.float32) / np.float32(count**0.5)
        case Pooling.WEIGHTED_MEAN:
            weights = np.arange(1, count + 1, dtype=np.float32)
            return (weights @ hidden) / weights.sum()
        case Pooling.SPLADE | Pooling.NONE:
            raise AssertionError(f"{pooling} is refused before")
