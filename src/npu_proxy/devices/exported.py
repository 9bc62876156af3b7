"""Runs the graph file of a model's repository with padded texts: ONNX in ONNX Runtime, IR in OpenVINO's CPU plugin.

The file is another copy of the model, possibly in another precision, so its vectors have their own fingerprint and these
devices are never part of a chain. It takes one padded text per row, as exported graphs do; pooling and Dense modules are
applied here. Families that graph/ does not build are served this way too; `npu-proxy convert` creates the file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import openvino as ov

from npu_proxy.batch import Batch, BatchShape, Output, fill_pooling, token_positions
from npu_proxy.devices.base import DeviceReport, GoldenBatch
from npu_proxy.devices.certify import LEAST_COSINE, KnownOutputs
from npu_proxy.devices.failure import BatchError, Failure, first_line
from npu_proxy.devices.openvino import open_core
from npu_proxy.devices.shapes import dynamic_shapes
from npu_proxy.devices.threads import WAITING, DeviceThreads, Turn
from npu_proxy.errors import ModelError, SettingsError
from npu_proxy.graph import heads
from npu_proxy.graph.nodes import op
from npu_proxy.models.graph_files import OUTPUT_RANKS
from npu_proxy.spec import ModelSpec, Module, SpladeConfig
from npu_proxy.targets import TARGETS
from npu_proxy.types import OutputType, Pooling

Vectors = npt.NDArray[np.float32]
PaddedInputs = Mapping[str, npt.NDArray[np.int64]]

_OUTPUT_NAMES = ("last_hidden_state", "token_embeddings", "logits")
"""Names that exporters give to the output that is read."""
_INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


class Runner(Protocol):
    """A loaded graph file. inputs: names in the graph. outputs: number of dimensions by name. Not thread-safe."""

    @property
    def inputs(self) -> Sequence[str]: ...
    @property
    def outputs(self) -> Mapping[str, int]: ...
    @property
    def about(self) -> str: ...

    def run(self, output: str, inputs: PaddedInputs) -> Vectors:
        """Compute one output for padded texts."""
        ...


class ExportedDevice:
    """A Device that runs one graph file."""

    ready = True
    streams = max_streams = 1

    def __init__(
        self,
        spec: ModelSpec,
        device: str,
        file: Path,
        *,
        threads: int,
        batch_tokens: int = 512,
        golden: GoldenBatch | None = None,
    ) -> None:
        """threads: per batch. Raises SettingsError if the runtime is missing, ModelError for unexpected inputs or outputs."""
        self.name: str = device
        self.kind: str = device
        self._runner = _RUNNERS[device](file, threads)
        self._output = _find_output(self._runner, file.name, spec)
        self._head = _Head(spec)
        self._layout = spec.batch_layout
        self._width = spec.hidden_width
        self._first_position = spec.config.get("first_position", 0)
        self._known = KnownOutputs(golden, LEAST_COSINE) if golden is not None else None
        self._turn = Turn(device)
        self._threads = DeviceThreads(WAITING, device)
        self.shapes: Sequence[BatchShape] = dynamic_shapes(spec.max_length, batch_tokens, packed=False)

    @property
    def busy_since(self) -> float | None:
        """When its current batch began."""
        return self._turn.since

    def takes(self, shape: BatchShape) -> bool:
        """Any shape, because the texts are laid out again."""
        return True

    def submit(self, batch: Batch) -> Future[Output]:
        """Compute vectors [bins, segments, width] float32, or [bins, positions, width] per token. Fails with BatchError."""
        return self._threads.submit(self._infer, batch)

    def _infer(self, batch: Batch) -> Output:
        inputs = _pad(batch, self._first_position, self._layout.unplaced)
        with self._turn:
            start = time.perf_counter()
            try:
                output = self._runner.run(self._output, {name: inputs[name] for name in self._runner.inputs})
            except Exception as error:  # runtimes raise their own exception classes
                raise BatchError(Failure.ERROR, f"{self.name} failed: {first_line(error)}") from error
            return Output(self._laid_out(batch, output), self.name, time.perf_counter() - start)

    def _laid_out(self, batch: Batch, output: Vectors) -> Vectors:
        """The output of the padded texts, after pooling and Dense modules, in the places that the batch has for it."""
        if output.shape[-1] != self._width:
            message = f"{self.name} computed {output.shape[-1]} numbers per vector, but the model's files specify {self._width}"
            raise BatchError(Failure.ERROR, message)
        shape = batch.shape
        vectors = np.zeros(self._layout.output(shape.bins, shape.positions, shape.segments), np.float32)
        for row, (slot, encoding) in enumerate(zip(batch.slots, batch.encodings, strict=True)):
            count = encoding.tokens
            if batch.output_type.per_token:
                vectors[slot.bin, slot.start : slot.start + count] = self._head.tokens(output[row, :count])
            else:
                vectors[slot.bin, slot.segment] = self._head.text(output[row], count, encoding.prompt_tokens)
        return vectors

    def reports(self) -> Sequence[DeviceReport]:
        """Always serving."""
        return [DeviceReport(name=self.name, kind=self.kind, state="serving", reason=self._runner.about)]

    def probe(self) -> None:
        """Compute the smallest golden batch, and compare it with its first output. Raises DeviceError."""
        if self._known is not None:
            self._known.compare(self)

    def doubt(self, reason: str) -> None:
        """There is nothing to compare with."""

    def close(self) -> None:
        """Stop the threads; the loaded file is freed with this object."""
        self._threads.close()


def _find_output(runner: Runner, file: str, spec: ModelSpec) -> str:
    """The name of the output to read. Raises ModelError for a graph whose inputs or outputs are not as expected."""
    unknown = [name for name in runner.inputs if name not in _INPUT_NAMES]
    fitting = [name for name, rank in runner.outputs.items() if rank == OUTPUT_RANKS[spec.output_type]]
    if unknown or not fitting:
        expected = "scores" if spec.output_type is OutputType.SCORES else "one vector per token"
        inputs = ", ".join(_INPUT_NAMES)
        raise ModelError(f"{file} has the inputs {list(runner.inputs)}; it may have only {inputs}, and must output {expected}")
    named = [name for name in fitting if name in _OUTPUT_NAMES]
    if len(fitting) > 1 and not named:
        raise ModelError(f"{file}: none of the outputs {', '.join(fitting)} is named {' or '.join(_OUTPUT_NAMES)}")
    return (named or fitting)[0]


def _pad(batch: Batch, first: int, unplaced: tuple[int, int] | None) -> PaddedInputs:
    """All known inputs, [texts, longest] int64, one text per row. first: the position id of a text's first token.

    unplaced: see BatchLayout; its position is the one before the first.
    """
    nowhere = None if unplaced is None else (unplaced[0], -1)
    counts = [encoding.tokens for encoding in batch.encodings]
    inputs = {name: np.zeros([len(counts), max(counts)], np.int64) for name in _INPUT_NAMES}
    inputs["position_ids"][:] = first + np.arange(max(counts))
    for row, (encoding, count) in enumerate(zip(batch.encodings, counts, strict=True)):
        inputs["input_ids"][row, :count] = encoding.ids
        inputs["position_ids"][row, :count] = first + token_positions(encoding.ids, nowhere)
        inputs["attention_mask"][row, : count if encoding.attended < 0 else encoding.attended] = 1
        if encoding.type_ids is not None:
            inputs["token_type_ids"][row, :count] = encoding.type_ids
    return inputs


class _Head:
    """What follows the exported graph: modules before and after pooling."""

    def __init__(self, spec: ModelSpec) -> None:
        self._scores = spec.output_type is OutputType.SCORES
        self._pooling = spec.pooling
        self._splade = spec.splade
        self._before, self._after = _compile(spec.token_modules), _compile(spec.modules)

    def text(self, output: Vectors, count: int, prompt_tokens: int) -> Vectors:
        """The vector [width] of one text; ``output`` is its row [tokens, width], or its scores."""
        if self._scores:
            return output
        if self._pooling is Pooling.SPLADE:
            return pool_splade(output[:count], self._splade)
        return self._after(pool(self._pooling, self._before(output[:count]), prompt_tokens)[None])[0]

    def tokens(self, vectors: Vectors) -> Vectors:
        """Apply the modules to token vectors [n, width]."""
        return self._after(self._before(vectors))


def _compile(modules: Sequence[Module]) -> Callable[[Vectors], Vectors]:
    """The modules as a separate graph, [n, in] -> [n, out], in float32."""
    if not modules:
        return lambda vectors: vectors
    x: Any = op.parameter(ov.PartialShape([-1, -1]), np.float32)
    model_class: Any = ov.Model
    model = model_class([heads.apply_modules(x, modules)], [x])
    wanted = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    compiled = open_core(TARGETS["cpu"]).compile_model(model, "CPU", wanted)
    return lambda vectors: np.array(compiled(vectors)[0], np.float32)


def pool(pooling: Pooling, hidden: Vectors, prompt_tokens: int = 0) -> Vectors:
    """Pool one text, [tokens, width] -> [width], as graph/heads.py does. prompt_tokens: leading tokens that are left out."""
    count, pooled = len(hidden), hidden[prompt_tokens:]
    match pooling:
        case Pooling.CLS | Pooling.LAST_TOKEN:
            return hidden[prompt_tokens if pooling is Pooling.CLS else -1]
        case Pooling.MAX:
            return pooled.max(axis=0)
        case _:  # a weighted sum
            weights = np.zeros([1, count], np.float32)
            fill_pooling(pooling, weights, 0, 0, count, prompt_tokens)
            return (weights @ hidden)[0]


def pool_splade(logits: Vectors, config: SpladeConfig) -> Vectors:
    """The sparse vector of one text's logits, [tokens, vocabulary] -> [vocabulary], as graph/heads.py makes it."""
    logs = np.log1p(np.maximum(logits if config.sums else logits.max(axis=0, keepdims=True), 0))
    return (np.log1p(logs) if config.log_twice else logs).sum(axis=0)


_INTEGERS: Mapping[str, type[np.signedinteger[Any]]] = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}


class _Onnx:
    """ONNX Runtime with all installed execution providers."""

    def __init__(self, file: Path, threads: int) -> None:
        try:
            import onnxruntime

            onnxruntime.disable_telemetry_events()
        except ImportError:
            raise SettingsError("device `onnx` needs ONNX Runtime: pip install 'npu-proxy[onnx]'", param="device") from None
        options: Any = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self._session: Any = onnxruntime.InferenceSession(str(file), options, providers=onnxruntime.get_available_providers())
        except Exception as error:  # the runtime raises its own exception classes
            raise ModelError(f"{file.name} cannot be loaded: {first_line(error)}") from error
        self.about = ", ".join(self._session.get_providers())
        self._types = {port.name: _INTEGERS.get(port.type) for port in self._session.get_inputs()}
        self.inputs = list(self._types)
        for port in self._session.get_inputs():
            if port.name in _INPUT_NAMES and port.type not in _INTEGERS:
                raise ModelError(
                    f"{file.name}: its input `{port.name}` is a {port.type}; only integers of 32 and 64 bits are supported"
                )
        self.outputs = {port.name: len(port.shape) for port in self._session.get_outputs()}

    def run(self, output: str, inputs: PaddedInputs) -> Vectors:
        given = {name: array.astype(self._types[name], copy=False) for name, array in inputs.items()}
        return np.asarray(self._session.run([output], given)[0], np.float32)


class _Ir:
    """OpenVINO's CPU plugin, for its own format (.xml and .bin) and any other that it reads."""

    def __init__(self, file: Path, threads: int) -> None:
        wanted = {"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
        core = open_core(TARGETS["cpu"])
        try:
            model = core.read_model(file)
            compiled = core.compile_model(model, "CPU", TARGETS["cpu"].requested("fp32", wanted))
        except RuntimeError as error:
            raise ModelError(f"{file.name} cannot be loaded: {first_line(error)}") from error
        self._infer_request = compiled.create_infer_request()
        self.about = f"{file.name} on the CPU, padded"
        # A tensor may have several names; if none is known, any of them is used.
        self.inputs = [
            next((name for name in port.get_names() if name in _INPUT_NAMES), port.get_any_name()) for port in compiled.inputs
        ]
        self.outputs = {_name_of(port): port.get_partial_shape().rank.get_length() for port in compiled.outputs if _is_usable(port)}

    def run(self, output: str, inputs: PaddedInputs) -> Vectors:
        self._infer_request.infer(dict(inputs))
        return np.array(self._infer_request.get_tensor(output).data, np.float32)


def _is_usable(port: Any) -> bool:
    """Whether an output has a name and a known number of dimensions."""
    return bool(port.get_names()) and port.get_partial_shape().rank.is_static


def _name_of(port: Any) -> str:
    return next((name for name in _OUTPUT_NAMES if name in port.get_names()), port.get_any_name())


_RUNNERS: Mapping[str, type[_Onnx | _Ir]] = {"onnx": _Onnx, "ir": _Ir}
