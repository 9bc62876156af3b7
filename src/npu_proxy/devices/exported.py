"""The graph file of a model's own repository, on the padded path: ONNX by ONNX Runtime, OpenVINO IR by OpenVINO's CPU.

The file is another copy of the model, and may be another precision, so vectors of these devices have a fingerprint of their
own and they never stand in a chain. It takes one padded text a line, as exported graphs do; pooling and Dense modules follow
here. It is also how families are served that graph/ does not build; `npu-proxy convert` makes the file (prepare/convert.py).
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset15 as op

from npu_proxy.devices.base import GoldenRow, Report, check_vectors
from npu_proxy.devices.failure import Failure, RowError, first_line
from npu_proxy.devices.kinds import EXPORTED, TARGETS
from npu_proxy.devices.openvino import ROOM_SECONDS
from npu_proxy.devices.shapes import dynamic_shapes
from npu_proxy.errors import ModelError, SettingsError
from npu_proxy.graph import heads
from npu_proxy.graph.packed import RowFormat, RowShape
from npu_proxy.models.fingerprint import file_sha256
from npu_proxy.models.foreign import first_position
from npu_proxy.models.jsons import inside
from npu_proxy.settings import Settings
from npu_proxy.types import Dense, Kind, ModelSpec, Output, Pack, Pooling, Shaped

Vectors = npt.NDArray[np.float32]
Lines = Mapping[str, npt.NDArray[np.int64]]

_RANKS: Mapping[Kind, int] = {Kind.DENSE: 3, Kind.SPARSE: 3, Kind.TOKENS: 3, Kind.SCORES: 2}
"""Dimensions of the output that has the answer: of every token of a line, or of the line."""


class Runner(Protocol):
    """A graph file, loaded. inputs: names in the graph; outputs: dimensions of each by its name. One run at a time."""

    @property
    def inputs(self) -> Sequence[str]: ...
    @property
    def outputs(self) -> Mapping[str, int]: ...
    @property
    def about(self) -> str: ...

    def run(self, output: str, feed: Lines) -> Vectors:
        """One output of some padded texts."""
        ...


def graph_file(settings: Settings, device: str) -> str:
    """The file in a model's folder that the settings have for a device."""
    return str(getattr(settings, EXPORTED[device][0]))


def with_graph(settings: Settings, folder: Path) -> list[str]:
    """The devices whose file is in a model's folder."""
    return [device for device in EXPORTED if (folder / graph_file(settings, device)).is_file()]


def with_file(settings: Settings, spec: ModelSpec) -> ModelSpec:
    """The spec of the same model computed from the file of the setting `device`. Raises ModelError when it cannot be."""
    device, file = settings.device, graph_file(settings, settings.device)
    setting, example = EXPORTED[device]
    path = inside(spec.folder, file, by=setting)
    if not path.is_file():
        others = with_graph(settings, spec.folder)
        cure = f"`device` {others[0]} runs the one it has" if others else f"set `{setting}` to one of its own, such as `{example}`"
        raise ModelError(f"{spec.name} has no file `{file}`; {cure}")
    if spec.kind not in _RANKS:
        raise ModelError(f"{spec.name} gives {spec.kind} answers; device `{device}` computes {', '.join(_RANKS)}")
    parts = sorted({*path.parent.glob(f"{path.name}[._]data*"), *path.parent.glob(f"{path.stem}.bin")})
    digest = hashlib.sha256(f"{device} {spec.fingerprint} {file_sha256(path)}".encode())
    for part in parts:
        digest.update(file_sha256(part).encode())
    return replace(spec, fingerprint=digest.hexdigest()[:16], weight_files=[path, *parts])


class ExportedDevice:
    """A Device over one graph file."""

    ready = True
    streams = most_streams = 1

    def __init__(
        self,
        spec: ModelSpec,
        device: str,
        file: Path,
        *,
        threads: int,
        row_tokens: int = 512,
        golden: GoldenRow | None = None,
    ) -> None:
        """threads: for one row. Raises SettingsError without the runtime, ModelError for a graph it cannot feed."""
        self.name = self.kind = device
        self._runner = _RUNNERS[device](file, threads)
        unknown = [name for name in self._runner.inputs if name not in _KNOWN]
        fitting = [name for name, rank in self._runner.outputs.items() if rank == _RANKS[spec.kind]]
        if unknown or not fitting:
            answer = "scores" if spec.kind is Kind.SCORES else "an answer of every token"
            raise ModelError(
                f"{file.name}: inputs {list(self._runner.inputs)}; needs only {', '.join(_KNOWN)}, and {answer} as an output"
            )
        named = [name for name in fitting if name in _ANSWERS]
        if len(fitting) > 1 and not named:
            raise ModelError(f"{file.name}: none of the outputs {', '.join(fitting)} is called {' or '.join(_ANSWERS)}")
        self._output = (named or fitting)[0]
        self._head = _Head(spec)
        self._format = RowFormat.of(spec)
        self._width = spec.dense[0].weight.shape[1] if spec.dense else spec.width
        self._first = first_position(spec.config)
        self._golden = golden
        self._busy = threading.Lock()
        self.shapes: Sequence[RowShape] = dynamic_shapes(spec.max_length, row_tokens, packed=False)

    def takes(self, shape: Shaped) -> bool:
        """Any row: its texts are laid out anew."""
        return True

    def infer(self, pack: Pack, late: float = math.inf) -> Output:
        """Answers [bins, segments, width] float32, or [bins, positions, width] of every token. Raises RowError."""
        lines = _lines(pack, self._first)
        if not self._busy.acquire(timeout=ROOM_SECONDS):
            raise RowError(Failure.BUSY, f"{self.name} had no room for a row within {ROOM_SECONDS:g} seconds")
        start = time.perf_counter()
        try:
            found = self._runner.run(self._output, {name: lines[name] for name in self._runner.inputs})
        except Exception as error:  # runtimes raise classes of their own
            raise RowError(Failure.ERROR, f"{self.name} failed: {first_line(error)}") from error
        finally:
            self._busy.release()
        if found.shape[-1] != self._width:
            message = f"{self.name} answered with {found.shape[-1]} numbers where the model's files say {self._width}"
            raise RowError(Failure.ERROR, message)
        vectors = np.zeros(self._format.output(pack.shape.bins, pack.shape.positions, pack.shape.segments), np.float32)
        for line, (slot, job) in enumerate(zip(pack.slots, pack.jobs, strict=True)):
            count = job.encoding.tokens
            if pack.kind.per_token:
                vectors[slot.bin, slot.start : slot.start + count] = self._head.tokens(found[line, :count])
            else:
                vectors[slot.bin, slot.segment] = self._head.text(found[line], count, job.encoding.prompt)
        return Output(vectors, self.name, time.perf_counter() - start)

    def reports(self) -> Sequence[Report]:
        """It serves."""
        return [Report(name=self.name, kind=self.kind, state="serving", reason=self._runner.about)]

    def probe(self) -> None:
        """Run the smallest golden row. Raises DeviceError."""
        if self._golden is not None:
            row = self._golden(min(self.shapes, key=lambda shape: shape.tokens))
            check_vectors(self.name, row, self.infer(row).vectors)

    def close(self) -> None:
        """Nothing is held outside this object."""


_ANSWERS = ("last_hidden_state", "token_embeddings", "logits")
"""What exporters call the output that has the answer."""
_KNOWN = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def _lines(pack: Pack, first: int) -> Lines:
    """Each known input, [texts, longest] int64: a row's texts, one a line. first: the position of a text's first token."""
    counts = [job.encoding.tokens for job in pack.jobs]
    lines = {name: np.zeros([len(counts), max(counts)], np.int64) for name in _KNOWN}
    lines["position_ids"][:] = first + np.arange(max(counts))
    for line, (job, count) in enumerate(zip(pack.jobs, counts, strict=True)):
        encoding = job.encoding
        lines["input_ids"][line, :count] = encoding.ids
        lines["attention_mask"][line, : count if encoding.seen < 0 else encoding.seen] = 1
        if encoding.types is not None:
            lines["token_type_ids"][line, :count] = encoding.types
    return lines


class _Head:
    """What stands on the exported graph: pooling, then the model's Dense modules."""

    def __init__(self, spec: ModelSpec) -> None:
        self._scores = spec.kind is Kind.SCORES
        self._pooling = spec.pooling
        self._dense = _compiled(spec.dense) if spec.dense else None

    def text(self, answer: Vectors, count: int, prompt: int) -> Vectors:
        """Of one text, [width]; ``answer`` is [tokens, width] of its line, or its scores."""
        return answer if self._scores else self.tokens(_pool(self._pooling, answer[:count], prompt)[None])[0]

    def tokens(self, vectors: Vectors) -> Vectors:
        """Vectors [n, width] through the Dense modules."""
        return vectors if self._dense is None else np.array(self._dense(vectors)[0], np.float32)


def _compiled(modules: Sequence[Dense]) -> ov.CompiledModel:
    """The Dense modules as a graph of their own, [n, in] to [n, out], in float32."""
    x: Any = op.parameter(ov.PartialShape([-1, modules[0].weight.shape[1]]), np.float32)
    make: Any = ov.Model
    return ov.Core().compile_model(make([heads.dense(x, modules)], [x]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def _pool(pooling: Pooling, hidden: Vectors, prompt: int = 0) -> Vectors:
    """One text's [tokens, width] to its [width]; the definitions are those of graph/heads.py. prompt: tokens left out."""
    count, taken = len(hidden), hidden[prompt:]
    match pooling:
        case Pooling.CLS | Pooling.LAST_TOKEN:
            return hidden[0 if pooling is Pooling.CLS else -1]
        case Pooling.MAX:
            return taken.max(axis=0)
        case Pooling.SPLADE:
            return np.log1p(np.maximum(taken.max(axis=0), 0))
        case _:  # those of one sum with weights
            weights = np.zeros([1, count], np.float32)
            heads.fill_pool(pooling, weights, 0, 0, count, prompt)
            return (weights @ hidden)[0]


class _Onnx:
    """ONNX Runtime with the execution providers that are installed."""

    def __init__(self, file: Path, threads: int) -> None:
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
        self.about = ", ".join(self._session.get_providers())
        self.inputs = [wanted.name for wanted in self._session.get_inputs()]
        self.outputs = {output.name: len(output.shape) for output in self._session.get_outputs()}

    def run(self, output: str, feed: Lines) -> Vectors:
        return np.asarray(self._session.run([output], dict(feed))[0], np.float32)


class _Ir:
    """OpenVINO on the processor, over its own format (.xml and .bin) or any other that it reads."""

    def __init__(self, file: Path, threads: int) -> None:
        wanted = {"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
        core = ov.Core()
        try:
            model = core.read_model(file)
            compiled = core.compile_model(model, "CPU", TARGETS["cpu"].asked("fp32", wanted))
        except RuntimeError as error:
            raise ModelError(f"{file.name} cannot be loaded: {first_line(error)}") from error
        self._request = compiled.create_infer_request()
        self.about = f"{file.name} on the processor, padded"
        # A tensor may have several names; that of an output with no known one is whichever comes first.
        self.inputs = [next((name for name in port.get_names() if name in _KNOWN), port.get_any_name()) for port in compiled.inputs]
        self.outputs = {_name_of(port): port.get_partial_shape().rank.get_length() for port in compiled.outputs if _readable(port)}

    def run(self, output: str, feed: Lines) -> Vectors:
        self._request.infer(dict(feed))
        return np.array(self._request.get_tensor(output).data, np.float32)


def _readable(port: Any) -> bool:
    """Whether an output can be asked for by name, and has a known number of dimensions."""
    return bool(port.get_names()) and port.get_partial_shape().rank.is_static


def _name_of(port: Any) -> str:
    return next((name for name in _ANSWERS if name in port.get_names()), port.get_any_name())


_RUNNERS: Mapping[str, type[_Onnx | _Ir]] = {"onnx": _Onnx, "ir": _Ir}
