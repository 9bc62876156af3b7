"""The graphs of one model: from its weights, or from the int8 graph that its spec names."""

from __future__ import annotations

import openvino as ov

from npu_proxy.errors import ModelError
from npu_proxy.graph.build import build, family
from npu_proxy.graph.packed import Form, RowFormat, Style
from npu_proxy.models.weights import Tensors
from npu_proxy.types import ModelSpec


class Graphs:
    """Call it for a graph. All graphs share the weights, memory-mapped; what is made of them keeps them alive."""

    def __init__(self, spec: ModelSpec) -> None:
        """Open the weights; nothing is read yet. Raises ModelError."""
        self._spec = spec
        self._weights = None if spec.graph else Tensors(spec.weight_files, family(spec.family, spec.config).canonical_name)

    def __call__(self, form: Form, style: Style) -> ov.Model:
        """The graph for rows of a form. An int8 graph has the style it was made with. Raises ModelError."""
        if self._weights is not None:
            return build(self._spec, self._weights, form, style)
        assert self._spec.graph is not None
        try:
            model = ov.Core().read_model(self._spec.graph)
            if min(form.bins, form.positions, form.segments) > 0:
                arrays = RowFormat.of(self._spec).inputs(form.bins, form.positions, form.segments)
                model.reshape({name: ov.PartialShape(list(dimensions)) for name, (dimensions, _) in arrays.items()})
        except RuntimeError as error:
            raise ModelError(f"the {self._spec.precision} graph {self._spec.graph} cannot be read: {error}") from error
        return model

    def release(self) -> None:
        """Give back the memory of weights read so far."""
        if self._weights is not None:
            self._weights.release()
