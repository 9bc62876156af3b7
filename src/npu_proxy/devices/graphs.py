"""The graphs of one model: built from its weights, or read from the int8 graph named in its spec."""

from __future__ import annotations

import openvino as ov

from npu_proxy.batch import GraphShape, GraphStyle
from npu_proxy.devices.openvino import open_core
from npu_proxy.errors import ModelError
from npu_proxy.graph.build import build, tensor_name
from npu_proxy.models.weights import KeptTensors
from npu_proxy.spec import ModelSpec
from npu_proxy.targets import TARGETS


class Graphs:
    """Call an instance to get a graph. All graphs share the weights in memory until ``release``."""

    def __init__(self, spec: ModelSpec) -> None:
        """Find the weights without reading them. Raises ModelError."""
        self._spec = spec
        self._weights = None if spec.graph else KeptTensors(spec.weight_files, tensor_name(spec.family))

    def __call__(self, shape: GraphShape, style: GraphStyle) -> ov.Model:
        """The graph for batches of a shape. An int8 graph keeps the style it was created with. Raises ModelError."""
        if self._weights is not None:
            return build(self._spec, self._weights, shape, style)
        assert self._spec.graph is not None
        try:
            model = open_core(TARGETS["cpu"]).read_model(self._spec.graph)
            if min(shape.bins, shape.positions, shape.segments) > 0:
                arrays = self._spec.batch_layout.inputs(shape.bins, shape.positions, shape.segments)
                model.reshape({name: ov.PartialShape(list(dimensions)) for name, (dimensions, _) in arrays.items()})
        except RuntimeError as error:
            raise ModelError(f"the {self._spec.precision} graph {self._spec.graph} cannot be read: {error}") from error
        return model

    def release(self) -> None:
        """Free the memory of the weights read so far."""
        if self._weights is not None:
            self._weights.release()
